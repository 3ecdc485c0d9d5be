"""The chat page: answers as they come, thoughts folded, tools called step by step."""

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
from eval_llm import CHAT_PROMPTS, TEXT_PROMPTS
from model.inference.engine import QueueFull, Request
from model.inference.sampling import Sampling
from model.inference.streaming import TextStream
from scripts.serving.chat_model import TalkArgs
from scripts.web.models import Loaded
from scripts.web.texts import Words

SECONDS_PER_FRAME = 0.07
AVATARS = {"user": ":material/person:", "assistant": ":material/neurology:"}


class Settings:
    """What the controls say: how to answer, and what the model is told besides the messages."""

    def __init__(self, args: TalkArgs, loaded: Loaded, words: Words):
        self.tools, self.thinking, self.system, self.memory = [], False, "", 0
        with st.sidebar:
            if not loaded.continues:
                self.tools = st.multiselect(
                    words("tools"),
                    list(TOOLS),
                    help=words("tools_help"),
                    placeholder=words("choose"),
                    **kept("tools"),
                )
                self.thinking = st.toggle(
                    words("think"), args.open_thinking, help=words("think_help"), **kept("think")
                )
            with st.expander(words("sampling"), icon=":material/tune:"):
                self.sampling = how_to_sample(args, words)
            if not loaded.continues:
                with st.expander(words("context"), icon=":material/history:"):
                    most = max(40, args.historys)
                    self.memory = st.slider(
                        words("memory"), 0, most, args.historys, 2, **kept("memory")
                    )
                    self.system = st.text_area(words("system"), height=80, **kept("system"))


def how_to_sample(args: TalkArgs, words: Words) -> Sampling:
    def slider(name: str, least: float, most: float) -> float:
        value = getattr(args, name)
        most = max(most, value)
        return st.slider(words(name), min(least, value), most, value, **kept(name))

    def number(name: str, most: int | None = None) -> int | None:
        return st.number_input(words(name), 0, most, getattr(args, name), **kept(name))

    return Sampling(
        temperature=slider("temperature", 0.0, 2.0),
        top_p=slider("top_p", 0.05, 1.0),
        max_new_tokens=slider("max_new_tokens", 1, 2048),
        repetition_penalty=slider("repetition_penalty", 1.0, 2.0),
        top_k=number("top_k"),
        seed=number("seed", 2**31 - 1),
    )


def kept(name: str) -> dict[str, str]:
    """For a control that keeps its value while another page is shown."""
    return {"key": name, "persist_state": "session"}


class Answer:
    """A message that the engine is writing. It goes on when the page is drawn anew, as with every
    touch of a control, and ends with `stop`.

    Raises:
        TooLong, QueueFull
    """

    def __init__(self, loaded: Loaded, messages: list[Message], settings: Settings, rounds: int):
        tokenizer = loaded.chat.tokenizer
        ids = prompt_of(loaded, messages, settings)
        room = loaded.room - len(ids)
        if room < 1:
            raise TooLong(len(ids), loaded.room - 1)
        sampling = settings.sampling
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        self.request = Request(ids, sampling, text=TextStream(tokenizer))
        self.thread, self.rounds = loaded.thread, rounds
        self.parser = None if loaded.continues else ReplyParser(settings.thinking)
        self.message: Message = {"role": "assistant", "content": ""}
        self.ended, self.error = False, None
        self.news = threading.Event()
        self.started, self.first = time.perf_counter(), None
        self.thread.start(self.request, self.tell)

    def tell(self, error: Exception | None) -> None:
        """Called in the engine's thread."""
        if self.first is None:
            self.first = time.perf_counter() - self.started
        self.seconds = time.perf_counter() - self.started
        self.error = error
        self.ended = bool(error or self.request.finish_reason)
        self.news.set()

    def read(self) -> bool:
        """Wait a little for more of it and put that into the message; False when it is whole."""
        self.news.wait(1)
        self.news.clear()
        ended = self.ended  # before the text is taken: what comes after that has its own turn
        text = self.request.text.take()
        if self.parser is None:
            self.message["content"] += text
        else:
            for kind, part in (*self.parser.feed(text), *(self.parser.end() if ended else ())):
                if kind == "tool_call":
                    self.message.setdefault("tool_calls", []).append(part)
                else:
                    key = "reasoning_content" if kind == "reasoning" else "content"
                    self.message[key] = self.message.get(key, "") + part
        return not ended

    def stop(self) -> None:
        self.thread.cancel(self.request)

    def note(self, words: Words) -> str:
        """How long it took, and why it ended if that is not plain."""
        if self.first is None:
            return words("stopped")
        tokens = len(self.request.tokens)
        rate = tokens / self.seconds
        told = words("speed", tokens=tokens, rate=rate, first=self.first)
        if self.request.finish_reason == "length":
            told += " · " + words("full")
        elif self.request.finish_reason != "stop":
            told += " · " + words("stopped")
        return told


class TooLong(Exception):
    """The conversation leaves no room for an answer: its tokens, and how many there may be."""


def prompt_of(loaded: Loaded, messages: list[Message], settings: Settings) -> list[int]:
    """The tokens that the model is to go on with."""
    if loaded.continues:
        return encode_text(loaded.chat.tokenizer, messages[-1]["content"]).ids[:-1]
    told = recent(messages, settings.memory)
    if settings.system:
        told = [{"role": "system", "content": settings.system}, *told]
    return encode_chat(
        loaded.chat.tokenizer,
        [without_note(message) for message in told],
        add_generation_prompt=True,
        open_thinking=settings.thinking,
        tools=[TOOLS[name].schema for name in settings.tools] or None,
    ).ids


def recent(messages: list[Message], memory: int) -> list[Message]:
    """The last turn and so many messages before it: whole turns, which begin with the user."""
    turns = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return messages[turns[max(0, len(turns) - 1 - memory // 2)] :]


def without_note(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "note"}


# -- the page --------------------------------------------------------------------------------------


def chat_page(args: TalkArgs, loaded: Loaded, words: Words, look: Callable[[], None]) -> None:
    """`look` goes to the microscope."""
    state = st.session_state
    state.setdefault("messages", [])
    settings = Settings(args, loaded, words)
    asked = st.chat_input(words("go_on" if loaded.continues else "say"), key="asked")
    if not (state.messages or asked):
        asked = greeting(loaded, words, look)
    if asked and asked.strip():
        end_answer(words)
        state.messages.append({"role": "user", "content": asked})
        begin_answer(loaded, settings, words, rounds=0)
    if loaded.continues:
        st.caption(words("continues"))
    for turn in turns_of(state.messages):
        show_turn(turn, loaded, settings, words)
    if state.messages and not state.get("answer"):
        buttons(loaded, settings, words, look)


def greeting(loaded: Loaded, words: Words, look: Callable[[], None]) -> str | None:
    """What stands there before anything was said; the example that was chosen."""
    st.subheader(words("hello"))
    examples = TEXT_PROMPTS if loaded.continues else CHAT_PROMPTS
    with st.container(horizontal=True):
        chosen = [each for each in examples if st.button(each, key=f"example {each}")]
    if st.button(words("look_inside"), icon=":material/biotech:", type="tertiary"):
        look()
    return chosen[0] if chosen else None


def begin_answer(loaded: Loaded, settings: Settings, words: Words, rounds: int) -> None:
    state = st.session_state
    try:
        state.answer = Answer(loaded, state.messages, settings, rounds)
        state.messages.append(state.answer.message)
    except TooLong as error:
        tokens, room = error.args
        told = words("too_long", tokens=tokens, room=room)
        state.messages.append({"role": "assistant", "content": "", "note": told})
    except QueueFull:
        state.messages.append({"role": "assistant", "content": "", "note": words("busy")})


def end_answer(words: Words) -> None:
    """Give up what is being written; what there is of it stays."""
    if answer := st.session_state.pop("answer", None):
        answer.stop()
        answer.message["note"] = answer.note(words)


def turns_of(messages: list[Message]) -> list[list[Message]]:
    """A message of the user alone; everything until the next together."""
    turns: list[list[Message]] = []
    for message in messages:
        if not turns or "user" in (message["role"], turns[-1][-1]["role"]):
            turns.append([])
        turns[-1].append(message)
    return turns


def show_turn(turn: list[Message], loaded: Loaded, settings: Settings, words: Words) -> None:
    role = turn[0]["role"]
    with st.chat_message(role, avatar=AVATARS[role]):
        show_messages(turn, words)
        answer = st.session_state.get("answer")
        if answer and answer.message is turn[-1]:
            follow(answer, loaded, settings, words)


def follow(answer: Answer, loaded: Loaded, settings: Settings, words: Words) -> None:
    """Show an answer as it comes, and those that follow when it calls tools."""
    state = st.session_state
    place, below = st.empty(), st.empty()
    if below.button(words("stop"), icon=":material/stop_circle:", key="stop"):
        end_answer(words)
        st.rerun()
    while answer.read():
        with place.container():
            show_message(answer.message, words, live=True)
        time.sleep(SECONDS_PER_FRAME)
    del state.answer
    note = answer.note(words)
    if answer.error:
        note = words("failed", error=answer.error)
    elif results := results_of(answer, settings):
        state.messages += results
        if answer.rounds + 1 < MAX_TURNS:
            begin_answer(loaded, settings, words, answer.rounds + 1)
            st.rerun()
        note += " · " + words("rounds")
    answer.message["note"] = note
    st.rerun()


def results_of(answer: Answer, settings: Settings) -> list[Message]:
    """What the tools say that an answer calls."""
    if answer.request.finish_reason != "stop" or not settings.tools:
        return []
    message = answer.message
    reply = Reply(message["content"], tool_calls=message.get("tool_calls", []))
    results = answer_calls(reply, settings.tools)
    return [{"role": "tool", "content": result.text} for result in results]


# -- messages --------------------------------------------------------------------------------------


def show_messages(turn: list[Message], words: Words) -> None:
    """The messages of a turn. What is being written is shown by `follow`."""
    answer = st.session_state.get("answer")
    calls: list[dict[str, Any]] = []
    step = 0
    for message in turn:
        if message["role"] == "tool":
            step += 1
            call = calls.pop(0) if calls else None
            show_step(step, call, message["content"], words)
        elif not (answer and answer.message is message):
            show_message(message, words)
            calls = list(message.get("tool_calls", []))


def show_step(step: int, call: dict[str, Any] | None, result: str, words: Words) -> None:
    name = call["name"] if call else words("unreadable_call")
    with st.expander(words("step", step=step, name=name), icon=":material/build:"):
        if call:
            st.caption(words("called_with"))
            st.code(json.dumps(call["arguments"], ensure_ascii=False), language="json")
        st.caption(words("result"))
        st.code(result, language="json", wrap_lines=True)


def show_message(message: Message, words: Words, live: bool = False) -> None:
    if thoughts := message.get("reasoning_content"):
        busy = live and not message["content"]
        with st.expander(words("thinking" if busy else "thoughts"), icon=":material/psychology:"):
            st.markdown(as_markdown(thoughts))
    if message["content"] or live:
        st.markdown(as_markdown(message["content"]) + (" ▍" if live else ""))
    if note := message.get("note"):
        st.caption(note)


def as_markdown(text: str) -> str:
    """As the model wrote it: line breaks stay, tags show, and dollars are no formulas."""
    for sign in "$<~":
        text = text.replace(sign, "\\" + sign)
    return text.replace("\n", "  \n")


def buttons(loaded: Loaded, settings: Settings, words: Words, look: Callable[[], None]) -> None:
    state = st.session_state
    with st.container(horizontal=True):
        if st.button(words("again"), icon=":material/refresh:", type="tertiary"):
            while state.messages[-1]["role"] != "user":
                state.messages.pop()
            begin_answer(loaded, settings, words, rounds=0)
            st.rerun()
        if st.button(words("new"), icon=":material/add_comment:", type="tertiary"):
            state.messages.clear()
            st.rerun()
        st.download_button(
            words("save"),
            json.dumps(state.messages, ensure_ascii=False, indent=2),
            "chat.json",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )
        if not loaded.continues:
            icon = ":material/biotech:"
            if st.button(words("look"), icon=icon, type="tertiary"):
                state.source = "source_chat"
                look()
