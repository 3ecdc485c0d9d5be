"""The chat page: streamed answers, folded reasoning, tool calls step by step."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import streamlit as st
from markdown_it import MarkdownIt

from dataset.lm_dataset import Message
from dataset.tools.loop import MAX_TURNS
from model.inference.engine import QueueFull
from scripts.serving.arguments import ChatArgs
from scripts.serving.prompts import CHAT_EXAMPLES, TEXT_EXAMPLES
from scripts.web.answer import PromptTooLong, StreamingAnswer, run_tools
from scripts.web.controls import ChatControls
from scripts.web.models import ServedModel
from scripts.web.texts import Translator

SECONDS_PER_FRAME = 0.07
AVATARS = {"user": ":material/person:", "assistant": ":material/neurology:"}


def chat_page(
    args: ChatArgs, served: ServedModel, t: Translator, open_microscope: Callable[[], None]
) -> None:
    state = st.session_state
    state.setdefault("messages", [])
    is_base_model = served.loaded.is_base_model
    controls = ChatControls(args, served, t)
    placeholder = t("text_placeholder" if is_base_model else "message_placeholder")
    prompt = st.chat_input(placeholder, key="prompt")
    if not (state.messages or prompt):
        prompt = welcome(served, t, open_microscope)
    if prompt and prompt.strip():
        stop_answer(t)
        state.messages.append({"role": "user", "content": prompt})
        start_answer(served, controls, t)
    if is_base_model:
        st.caption(t("base_model"))
    for turn in split_turns(state.messages):
        show_turn(turn, served, controls, t)
    if state.messages and not state.get("answer"):
        show_buttons(served, controls, t, open_microscope)


def welcome(served: ServedModel, t: Translator, open_microscope: Callable[[], None]) -> str | None:
    """What an empty chat shows; returns the example prompt that was clicked."""
    st.subheader(t("welcome"))
    examples = TEXT_EXAMPLES if served.loaded.is_base_model else CHAT_EXAMPLES
    with st.container(horizontal=True):
        clicked = [prompt for prompt in examples if st.button(prompt, key=f"example {prompt}")]
    if st.button(t("look_inside"), icon=":material/biotech:", type="tertiary"):
        open_microscope()
    return clicked[0] if clicked else None


def start_answer(
    served: ServedModel, controls: ChatControls, t: Translator, tool_rounds: int = 0
) -> None:
    """Start generating the next message of the conversation, or say why not."""
    state = st.session_state
    try:
        state.answer = StreamingAnswer(served, state.messages, controls, tool_rounds)
        state.messages.append(state.answer.message)
    except PromptTooLong as error:
        tokens, room = error.args
        note = t("too_long", tokens=tokens, room=room)
        state.messages.append({"role": "assistant", "content": "", "note": note})
    except QueueFull:
        state.messages.append({"role": "assistant", "content": "", "note": t("queue_full")})


def stop_answer(t: Translator) -> None:
    """Stop generating; the text so far stays."""
    if answer := st.session_state.pop("answer", None):
        answer.stop()
        answer.message["note"] = answer.status(t)


def split_turns(messages: list[Message]) -> list[list[Message]]:
    """Messages as they are shown: each user message alone, all messages between two together."""
    turns: list[list[Message]] = []
    for message in messages:
        if not turns or "user" in (message["role"], turns[-1][-1]["role"]):
            turns.append([])
        turns[-1].append(message)
    return turns


def show_turn(
    turn: list[Message], served: ServedModel, controls: ChatControls, t: Translator
) -> None:
    role = turn[0]["role"]
    with st.chat_message(role, avatar=AVATARS[role]):
        show_messages(turn, t)
        answer = st.session_state.get("answer")
        if answer and answer.message is turn[-1]:
            show_streaming(answer, served, controls, t)


def show_streaming(
    answer: StreamingAnswer, served: ServedModel, controls: ChatControls, t: Translator
) -> None:
    """Show an answer as it is generated; then run the tools it calls, and start the next answer."""
    state = st.session_state
    message_area, button_area = st.empty(), st.empty()
    if button_area.button(t("stop"), icon=":material/stop_circle:", key="stop"):
        stop_answer(t)
        st.rerun()
    while answer.read():
        with message_area.container():
            show_message(answer.message, t, live=True)
        time.sleep(SECONDS_PER_FRAME)
    del state.answer
    note = answer.status(t)
    if answer.error:
        note = t("failed", error=answer.error)
    elif results := run_tools(answer, controls):
        state.messages += results
        if answer.tool_rounds + 1 < MAX_TURNS:
            start_answer(served, controls, t, answer.tool_rounds + 1)
            st.rerun()
        note += " · " + t("tool_limit_reached")
    answer.message["note"] = note
    st.rerun()


# -- messages --------------------------------------------------------------------------------------


def show_messages(turn: list[Message], t: Translator) -> None:
    """The messages of a turn, except the one that `show_streaming` shows."""
    answer = st.session_state.get("answer")
    calls: list[dict[str, Any]] = []
    step = 0
    for message in turn:
        if message["role"] == "tool":
            step += 1
            call = calls.pop(0) if calls else None
            show_tool_call(step, call, message["content"], t)
        elif not (answer and answer.message is message):
            show_message(message, t)
            calls = list(message.get("tool_calls", []))


def show_tool_call(step: int, call: dict[str, Any] | None, result: str, t: Translator) -> None:
    """A call and its result; without a call where its JSON was invalid."""
    name = escape_prose(call["name"], "[]") if call else t("invalid_call")
    with st.expander(t("step", step=step, name=name), icon=":material/build:"):
        if call:
            st.caption(t("arguments"))
            st.code(json.dumps(call["arguments"], ensure_ascii=False), language="json")
        st.caption(t("result"))
        st.code(result, language="json", wrap_lines=True)


def show_message(message: Message, t: Translator, live: bool = False) -> None:
    """Args: live: it is still being generated."""
    if reasoning := message.get("reasoning_content"):
        thinking = live and not message["content"]
        title = t("thinking" if thinking else "reasoning")
        with st.expander(title, icon=":material/psychology:"):
            st.markdown(escape_markdown(reasoning))
    if message["content"] or live:
        shown = escape_markdown(message["content"])
        if live:  # a fence ends a block only if nothing else is in its line
            shown += "\n▍" if shown.endswith(("```", "~~~")) else " ▍"
        st.markdown(shown)
    if note := message.get("note"):
        st.caption(escape_markdown(note))


CODE = re.compile(
    r"(?P<escape>\\[!-/:-@\[-`{-~])"
    r"|^ {0,3}(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:\n {0,3}(?P=fence)[`~]*[ \t]*$|\Z)"
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL | re.MULTILINE,
)
MARKDOWN = MarkdownIt().enable("table")  # as the page: a cell ends at any |, in code too
MARKDOWN.validateLink = lambda url: True  # type: ignore[method-assign]  # all of them are looked at
SAFE_LINK = re.compile(r"https?:|mailto:|[^:]*$", re.IGNORECASE)


def escape_markdown(text: str) -> str:
    """Markdown that keeps line breaks, shows tags, takes no dollar for a formula and an image for
    a link. Code, in a block or in a line, is shown as it is written.

    A browser fetches an image without asking, and its address may tell a stranger what was said
    here. So where a renderer still finds one, or a link such as data:, nothing is taken for a link
    or for code."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        if not code["escape"]:
            parts += [escape_prose(text[end : code.start()]), code[0]]
            end = code.end()
    shown = "".join(parts) + escape_prose(text[end:])
    return shown if is_harmless(shown) else escape_prose(text, more="[]")


def escape_prose(text: str, more: str = "") -> str:
    """Args: more: signs to escape, besides those that are always escaped."""
    signs = rf"\\[^\n]|!(?=\[)|[$<~{re.escape(more)}]"
    escaped = re.sub(signs, lambda sign: sign[0] if sign[0][0] == "\\" else "\\" + sign[0], text)
    return escaped.replace("\n", "  \n")


def is_harmless(markdown: str) -> bool:
    """Whether a renderer finds no image in it, and no link but to pages and mail addresses."""
    inline = [part for token in MARKDOWN.parse(markdown) for part in token.children or ()]
    links = [str(part.attrGet("href")) for part in inline if part.type == "link_open"]
    return all(part.type != "image" for part in inline) and all(map(SAFE_LINK.match, links))


def show_buttons(
    served: ServedModel, controls: ChatControls, t: Translator, open_microscope: Callable[[], None]
) -> None:
    state = st.session_state
    with st.container(horizontal=True):
        if st.button(t("regenerate"), icon=":material/refresh:", type="tertiary"):
            while state.messages[-1]["role"] != "user":
                state.messages.pop()
            start_answer(served, controls, t)
            st.rerun()
        if st.button(t("new_chat"), icon=":material/add_comment:", type="tertiary"):
            state.messages.clear()
            st.rerun()
        st.download_button(
            t("save"),
            json.dumps(state.messages, ensure_ascii=False, indent=2),
            "chat.json",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )
        if not served.loaded.is_base_model:
            icon = ":material/biotech:"
            if st.button(t("inspect"), icon=icon, type="tertiary"):
                state.source = "source_chat"
                open_microscope()
