"""The controls of the chat page in the sidebar."""

import streamlit as st

from dataset.tools.call import ALL_TOOLS
from model.inference.sampling import SamplingParams
from scripts.serving.arguments import ChatArgs
from scripts.web.models import ServedModel
from scripts.web.texts import Translator


class ChatControls:
    """The controls in the sidebar: tools, reasoning, sampling, history, system message."""

    def __init__(self, args: ChatArgs, served: ServedModel, t: Translator):
        self.tools, self.open_thinking, self.system, self.historys = [], False, "", 0
        is_base_model = served.loaded.is_base_model  # these controls need a chat template
        with st.sidebar:
            if not is_base_model:
                self.tools = st.multiselect(
                    t("tools"),
                    list(ALL_TOOLS),
                    help=t("tools_help"),
                    placeholder=t("none_chosen"),
                    **persistent("tools"),
                )
                self.open_thinking = st.toggle(
                    t("open_thinking"),
                    args.open_thinking,
                    help=t("open_thinking_help"),
                    **persistent("open_thinking"),
                )
            with st.expander(t("sampling"), icon=":material/tune:"):
                self.sampling = sampling_controls(args, t)
            if not is_base_model:
                with st.expander(t("context"), icon=":material/history:"):
                    maximum = max(40, args.historys)
                    self.historys = st.slider(
                        t("historys"), 0, maximum, args.historys, 2, **persistent("historys")
                    )
                    self.system = st.text_area(t("system"), height=80, **persistent("system"))


def sampling_controls(args: ChatArgs, t: Translator) -> SamplingParams:
    def slider(name: str, minimum: float, maximum: float) -> float:
        value = getattr(args, name)
        maximum = max(maximum, value)
        return st.slider(t(name), min(minimum, value), maximum, value, **persistent(name))

    def number(name: str, maximum: int | None = None) -> int | None:
        return st.number_input(t(name), 0, maximum, getattr(args, name), **persistent(name))

    return SamplingParams(
        temperature=slider("temperature", 0.0, 2.0),
        top_p=slider("top_p", 0.05, 1.0),
        max_new_tokens=slider("max_new_tokens", 1, 2048),
        repetition_penalty=slider("repetition_penalty", 1.0, 2.0),
        top_k=number("top_k"),
        seed=number("seed", 2**31 - 1),
    )


def persistent(key: str) -> dict[str, str]:
    """Arguments of a control that keeps its value while another page is shown."""
    return {"key": key, "persist_state": "session"}
