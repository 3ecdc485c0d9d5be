"""A web page to chat with a model, to look inside it (the microscope), and to train and watch it.

    streamlit run scripts/web_demo.py                            own weights, from out/
    streamlit run scripts/web_demo.py -- --save_dir out/demo     own weights from another folder
    streamlit run scripts/web_demo.py -- --load_from ./MiniMind2 any transformers folder

The page offers all models that it finds. The flags after `--` are those of eval_llm.py.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from scripts.serving.arguments import ChatArgs


@dataclass
class Args(ChatArgs):
    historys: int = option(8, "number of earlier messages in the prompt; 0: each prompt alone")
    language: Literal["auto", "en", "zh"] = option(
        "auto", "language of the page; auto: the browser's"
    )
    runs_dir: list[str] = option([], "more folders whose trainings are shown, besides save_dir")
    remote_training: bool = option(
        False, "let visitors from other machines start and stop trainings, too"
    )


def without_streamlit() -> None:
    """What `python scripts/web_demo.py` answers."""
    with exit_on_user_error():
        parse_arguments(Args, __doc__)  # for --help, and for wrong flags
        raise UserError("this is a web page; start it with: streamlit run scripts/web_demo.py")


if __name__ == "__main__" and "streamlit" not in sys.modules:
    without_streamlit()

import streamlit as st

from scripts.web.chat import chat_page, escape_markdown, stop_answer
from scripts.web.controls import persistent
from scripts.web.microscope import microscope_page
from scripts.web.models import (
    ServedModel,
    default_model,
    demo_training,
    find_lora,
    find_models,
    serve_model,
)
from scripts.web.processes import last_lines
from scripts.web.texts import LANGUAGES, Translator
from scripts.web.training import may_control, training_page

# Our own icon: the page would fetch one of Streamlit's from the internet.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="#2b6cb0"/>
<path d="M7 23V10l9 9 9-9v13" fill="none" stroke="#fff" stroke-width="3.5" stroke-linecap="round"
stroke-linejoin="round"/></svg>"""
STYLE = "<style>.stMainBlockContainer {padding-top: 4.5rem; padding-bottom: 2rem}</style>"


def main() -> None:
    st.set_page_config("MiniMind", ICON, layout="wide")
    st.html(STYLE)
    try:
        args = parse_arguments(Args, __doc__)
    except UserError as error:
        st.error(escape_markdown(str(error)))
        return
    t = Translator(choose_language(args))

    def chat() -> None:
        if served := choose_model(args, t):
            chat_page(args, served, t, open_microscope=lambda: st.switch_page(microscope_link))
        else:
            no_model_page(args, t)

    def microscope() -> None:
        if served := choose_model(args, t):
            microscope_page(served, t)
        else:
            no_model_page(args, t)

    def training() -> None:
        training_page(args, t)

    chat_link = st.Page(chat, title=t("chat"), icon=":material/chat:", default=True)
    microscope_link = st.Page(microscope, title=t("microscope"), icon=":material/biotech:")
    training_link = st.Page(training, title=t("training_page"), icon=":material/monitoring:")
    st.navigation([chat_link, microscope_link, training_link], position="top").run()


def choose_language(args: Args) -> str:
    """The language control, which starts with --language or the browser's."""
    default = args.language
    if default == "auto":
        default = "zh" if (st.context.locale or "").startswith("zh") else "en"
    return st.sidebar.segmented_control(
        "Language",
        list(LANGUAGES),
        default=default,
        format_func=LANGUAGES.get,
        required=True,
        label_visibility="collapsed",
        **persistent("language"),
    )


def choose_model(args: Args, t: Translator) -> ServedModel | None:
    """The model that is chosen in the sidebar, loaded; None if there is none yet."""
    found = find_models(args)
    # The demo's training saves its first stage before it is through: wait for the last one.
    if not found or demo_training().running:
        return None
    with st.sidebar:
        default = found.index(default_model(found, args))
        model = st.selectbox(
            t("model"),
            found,
            default,
            format_func=lambda model: model.label,
            **persistent("model"),
        )
        adapters = find_lora(model)
        lora = None
        if adapters:
            lora = st.selectbox(
                t("lora"),
                [None, *adapters],
                format_func=lambda path: path.stem if path else t("none"),
                **persistent("lora"),
            )
    if st.session_state.get("chosen_model") != (model.path, lora):
        stop_answer(t)  # another model is generating it
        st.session_state.chosen_model = (model.path, lora)
    try:
        with st.spinner(t("loading")):
            served = serve_model(args, model, lora)
    except UserError as error:
        st.error(escape_markdown(f"{t('cannot_load')} {error}"))
        st.stop()
    loaded = served.loaded
    st.sidebar.caption(
        t(
            "about",
            millions=loaded.num_parameters / 1e6,
            layers=loaded.model.config.num_hidden_layers,
            device=loaded.model.device,
        )
    )
    return served


# -- without a model -------------------------------------------------------------------------------


def no_model_page(args: Args, t: Translator) -> None:
    """How to get a model, with a button that trains the demo's."""
    st.title(t("no_model"))
    st.write(t("no_model_where", folder=args.save_dir))
    st.markdown("1. " + t("way_demo"))
    st.code("make demo", language="bash")
    if may_control(args):
        train_demo(args, t)
    else:
        st.caption(t("read_only"))
    st.markdown("2. " + t("way_own"))
    st.code("python trainer/train_pretrain.py\npython trainer/train_full_sft.py", language="bash")
    st.markdown("3. " + t("way_folder"))
    st.code("streamlit run scripts/web_demo.py -- --load_from ./MiniMind2", language="bash")


@st.fragment(run_every=2)
def train_demo(args: Args, t: Translator) -> None:
    """A button that starts the demo's training, or the training's progress."""
    training = demo_training()
    process = training.process
    if process and process.running:
        elapsed = (time.time() - process.started) / 60
        text = t("training", elapsed=f"{elapsed:.1f}", minutes=training.minutes)
        st.progress(min(1.0, elapsed / training.minutes), text)
        st.code(last_lines(process.output), language=None)
        if st.button(t("stop_training"), icon=":material/stop_circle:"):
            training.stop()
            st.rerun()
        return
    if find_models(args):
        st.rerun()
    if process and process.failed:
        st.error(t("training_failed"))
        st.code(last_lines(process.output), language=None)
    minutes = st.slider(t("minutes"), 3, 60, 12, key="minutes")
    if st.button(t("train"), icon=":material/model_training:", type="primary"):
        try:
            training.start(args.save_dir, minutes)
        except UserError as error:
            st.error(escape_markdown(str(error)))
            return
        st.rerun()


if __name__ == "__main__":
    main() if st.runtime.exists() else without_streamlit()
