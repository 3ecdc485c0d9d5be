"""The chat page: streamed answers, folded reasoning, tool calls step by step."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import streamlit as st

from dataset.lm_dataset import Message, encode_chat, encode_text
from dataset.reply_parser import Reply, ReplyParser
from dataset.tools.builtin import TOOLS
from dataset.tools.loop import MAX_TURNS, answer_calls
from model.inference.engine import QueueFull, Request
from model.inference.sampling import SamplingParams
from model.inference.streaming import StreamingDetokenizer
from scripts.serving.arguments import ChatArgs
from scripts.serving.prompts import CHAT_EXAMPLES, TEXT_EXAMPLES
from scripts.web.models import ServedModel
from scripts.web.texts import Translator

SECONDS_PER_FRAME = 0.07
AVATARS = {"user": ":material/person:", "assistant": ":material/neurology:"}


# -- controls --------------------------------------------------------------------------------------


class ChatControls:
    """The controls in the sidebar: tools, reasoning, sampling, history, system message."""

    def __init__(self, args: ChatArgs, served: ServedModel, t: Translator):
        self.tools, self.open_thinking, self.system, self.historys = [], False, "", 0
        is_base_model = served.loaded.is_base_model  # these controls need a chat template
        with st.sidebar:
            if not is_base_model:
                self.tools = st.multiselect(
                    t("tools"),
                    list(TOOLS),
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


# -- generating ------------------------------------------------------------------------------------


class PromptTooLong(Exception):
    """The conversation leaves no room for an answer: (its tokens, how many may be)."""


class StreamingAnswer:
    """A message that the engine thread is generating.

    It goes on when Streamlit reruns the page, as it does for every touch of a control, and ends
    with `stop`.

    Raises:
        PromptTooLong, QueueFull
    """

    def __init__(
        self,
        served: ServedModel,
        messages: list[Message],
        controls: ChatControls,
        tool_rounds: int,
    ):
        loaded = served.loaded
        ids = encode_prompt(served, messages, controls)
        room = loaded.max_positions - len(ids)
        if room < 1:
            raise PromptTooLong(len(ids), loaded.max_positions - 1)
        sampling = controls.sampling
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        self.request = Request(ids, sampling, detokenizer=StreamingDetokenizer(loaded.tokenizer))
        self.thread, self.tool_rounds = served.thread, tool_rounds
        self.parser = None if loaded.is_base_model else ReplyParser(controls.open_thinking)
        self.message: Message = {"role": "assistant", "content": ""}
        self.finished, self.error = False, None
        self.updated = threading.Event()
        self.start_time, self.first_token_seconds = time.perf_counter(), None
        self.thread.start(self.request, self.on_update)

    def on_update(self, error: Exception | None) -> None:
        """Called in the engine's thread, after each step and at the end."""
        self.seconds = time.perf_counter() - self.start_time
        if self.first_token_seconds is None:
            self.first_token_seconds = self.seconds
        self.error = error
        self.finished = bool(error or self.request.finish_reason)
        self.updated.set()

    def read(self) -> bool:
        """Wait for more text and add it to the message; False when the message is complete."""
        self.updated.wait(1)
        self.updated.clear()
        # Read the flag before the text: text that arrives in between is read by the next call.
        finished = self.finished
        text = self.request.detokenizer.read()
        if self.parser is None:
            self.message["content"] += text
        else:
            for kind, part in (*self.parser.feed(text), *(self.parser.end() if finished else ())):
                if kind == "tool_call":
                    self.message.setdefault("tool_calls", []).append(part)
                else:
                    key = "reasoning_content" if kind == "reasoning" else "content"
                    self.message[key] = self.message.get(key, "") + part
        return not finished

    def stop(self) -> None:
        self.thread.cancel(self.request)

    def status(self, t: Translator) -> str:
        """Speed, and the finish reason unless the model itself ended the answer."""
        if self.first_token_seconds is None:
            return t("stopped")
        num_tokens = len(self.request.tokens)
        status = t(
            "speed",
            tokens=num_tokens,
            rate=num_tokens / self.seconds,
            first=self.first_token_seconds,
        )
        if self.request.finish_reason == "length":
            status += " · " + t("length_reached")
        elif self.request.finish_reason != "stop":
            status += " · " + t("stopped")
        return status


def encode_prompt(
    served: ServedModel, messages: list[Message], controls: ChatControls
) -> list[int]:
    tokenizer = served.loaded.tokenizer
    if served.loaded.is_base_model:
        return encode_text(tokenizer, messages[-1]["content"]).ids[:-1]  # without EOS
    messages = recent_turns(messages, controls.historys)
    if controls.system:
        messages = [{"role": "system", "content": controls.system}, *messages]
    return encode_chat(
        tokenizer,
        [without_note(message) for message in messages],
        add_generation_prompt=True,
        open_thinking=controls.open_thinking,
        tools=[TOOLS[name].schema for name in controls.tools] or None,
    ).ids


def recent_turns(messages: list[Message], historys: int) -> list[Message]:
    """The last turn, and `historys` / 2 turns before it. A turn begins with a user message."""
    starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return messages[starts[max(0, len(starts) - 1 - historys // 2)] :]


def without_note(message: Message) -> Message:
    """A message without the page's own remark, which the chat template does not know."""
    return {key: value for key, value in message.items() if key != "note"}


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


def run_tools(answer: StreamingAnswer, controls: ChatControls) -> list[Message]:
    """The tool messages with the results of an answer's calls; none if it calls nothing."""
    if answer.request.finish_reason != "stop" or not controls.tools:
        return []
    message = answer.message
    reply = Reply(message["content"], tool_calls=message.get("tool_calls", []))
    results = answer_calls(reply, controls.tools)
    return [{"role": "tool", "content": result.text} for result in results]


# -- the page --------------------------------------------------------------------------------------


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
    name = call["name"] if call else t("invalid_call")
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
        st.markdown(escape_markdown(message["content"]) + (" ▍" if live else ""))
    if note := message.get("note"):
        st.caption(note)


def escape_markdown(text: str) -> str:
    """Markdown that keeps line breaks, shows tags, and takes no dollar for a formula."""
    for sign in "$<~":
        text = text.replace(sign, "\\" + sign)
    return text.replace("\n", "  \n")


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
