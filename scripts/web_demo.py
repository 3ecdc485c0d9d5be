"""A web page to talk to a model, and to look inside: chat, and a microscope.

    streamlit run scripts/web_demo.py                            own weights, from out/
    streamlit run scripts/web_demo.py -- --save_dir out/demo     other ones
    streamlit run scripts/web_demo.py -- --load_from ./MiniMind2 any transformers folder

The models that are found can be chosen on the page. Behind `--` the flags are those of eval_llm.py.
"""

import time
from dataclasses import dataclass
from typing import Literal

import streamlit as st

from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from scripts.serving.chat_model import TalkArgs
from scripts.web.chat import chat_page, end_answer, kept
from scripts.web.microscope import microscope_page
from scripts.web.models import (
    Loaded,
    default_model,
    demo_training,
    find_lora,
    find_models,
    load,
)
from scripts.web.texts import LANGUAGES, Words

# A picture of our own: those of Streamlit's icons would be fetched from the internet.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="#2b6cb0"/>
<path d="M7 23V10l9 9 9-9v13" fill="none" stroke="#fff" stroke-width="3.5" stroke-linecap="round"
stroke-linejoin="round"/></svg>"""
STYLE = "<style>.stMainBlockContainer {padding-top: 4.5rem; padding-bottom: 2rem}</style>"


@dataclass
class Args(TalkArgs):
    historys: int = option(8, "how many earlier messages the model sees; 0: each prompt alone")
    language: Literal["auto", "en", "zh"] = option("auto", "of the page; auto: the browser's")


def main() -> None:
    st.set_page_config("MiniMind", ICON, layout="wide")
    st.html(STYLE)
    try:
        args = parse_arguments(Args, __doc__)
    except UserError as error:
        st.error(error)
        return
    words = Words(choose_language(args))
    loaded = choose_model(args, words)

    def chat() -> None:
        if loaded:
            chat_page(args, loaded, words, look=lambda: st.switch_page(second))
        else:
            no_model_page(args, words)

    def microscope() -> None:
        if loaded:
            microscope_page(loaded, words)
        else:
            no_model_page(args, words)

    first = st.Page(chat, title=words("chat"), icon=":material/chat:", default=True)
    second = st.Page(microscope, title=words("microscope"), icon=":material/biotech:")
    st.navigation([first, second], position="top").run()


def choose_language(args: Args) -> str:
    """That of the browser, until another one is chosen."""
    first = args.language
    if first == "auto":
        first = "zh" if (st.context.locale or "").startswith("zh") else "en"
    return st.sidebar.segmented_control(
        "Language",
        list(LANGUAGES),
        default=first,
        format_func=LANGUAGES.get,
        required=True,
        label_visibility="collapsed",
        **kept("language"),
    )


def choose_model(args: Args, words: Words) -> Loaded | None:
    """The model that is chosen in the sidebar, or None where there is none yet."""
    found = find_models(args)
    if not found or demo_training().running:  # which has written its first stage, perhaps
        return None
    with st.sidebar:
        first = found.index(default_model(found, args))
        chosen = st.selectbox(
            words("model"), found, first, format_func=lambda each: each.label, key="model"
        )
        additions = find_lora(chosen)
        lora = None
        if additions:
            lora = st.selectbox(
                words("lora"),
                [None, *additions],
                format_func=lambda path: path.stem if path else words("none"),
                key="lora",
            )
    if st.session_state.get("talks_to") != (chosen.path, lora):
        end_answer(words)  # what another model was writing
        st.session_state.talks_to = (chosen.path, lora)
    try:
        with st.spinner(words("loading")):
            loaded = load(args, chosen, lora)
    except UserError as error:
        st.error(f"{words('cannot_load')} {error}")
        st.stop()
    config, chat = loaded.chat.model.config, loaded.chat
    st.sidebar.caption(
        words(
            "about",
            millions=chat.parameters / 1e6,
            layers=config.num_hidden_layers,
            device=chat.model.device,
        )
    )
    return loaded


# -- without a model -------------------------------------------------------------------------------


def no_model_page(args: Args, words: Words) -> None:
    """How to get a model, and the demo's, trained at the press of a button."""
    st.title(words("no_model"))
    st.write(words("no_model_where", folder=args.save_dir))
    st.markdown("1. " + words("way_demo"))
    st.code("make demo", language="bash")
    train_demo(args, words)
    st.markdown("2. " + words("way_own"))
    st.code("python trainer/train_pretrain.py\npython trainer/train_full_sft.py", language="bash")
    st.markdown("3. " + words("way_folder"))
    st.code("streamlit run scripts/web_demo.py -- --load_from ./MiniMind2", language="bash")


@st.fragment(run_every=2)
def train_demo(args: Args, words: Words) -> None:
    """The button, or how far the training is."""
    training = demo_training()
    if training.running:
        spent = (time.time() - training.started) / 60
        told = words("training", spent=f"{spent:.1f}", minutes=training.minutes)
        st.progress(min(1.0, spent / training.minutes), told)
        st.code(training.last_lines(), language=None)
        if st.button(words("stop_training"), icon=":material/stop_circle:"):
            training.stop()
            st.rerun()
        return
    if find_models(args):
        st.rerun()
    if training.failed:
        st.error(words("training_failed"))
        st.code(training.last_lines(), language=None)
    minutes = st.slider(words("minutes"), 3, 60, 12, key="minutes")
    if st.button(words("train"), icon=":material/model_training:", type="primary"):
        try:
            training.start(args.save_dir, minutes)
        except UserError as error:
            st.error(error)
            return
        st.rerun()


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        with exit_on_user_error():
            parse_arguments(Args, __doc__)  # for --help, and for what is wrong
            raise UserError("this is a web page: streamlit run scripts/web_demo.py")
