"""An answer of the chat page: its prompt, the message that grows, and the tools that it calls."""

import threading
import time
from dataclasses import replace

from dataset.encoding import ends_in_thought
from dataset.lm_dataset import Message, encode_chat, encode_text
from dataset.reply_parser import Reply, ReplyParser
from dataset.tools.call import ALL_TOOLS
from dataset.tools.loop import answer_calls
from model.inference.engine import Request
from model.inference.streaming import StreamingDetokenizer
from scripts.web.controls import ChatControls
from scripts.web.models import ServedModel
from scripts.web.texts import Translator


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
        self.parser = (
            None if loaded.is_base_model else ReplyParser(ends_in_thought(loaded.tokenizer, ids))
        )
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
        tools=[ALL_TOOLS[name].schema for name in controls.tools] or None,
    ).ids


def recent_turns(messages: list[Message], historys: int) -> list[Message]:
    """The last turn, and `historys` / 2 turns before it. A turn begins with a user message."""
    starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return messages[starts[max(0, len(starts) - 1 - historys // 2)] :]


def without_note(message: Message) -> Message:
    """A message without the page's own remark, which the chat template does not know."""
    return {key: value for key, value in message.items() if key != "note"}


def run_tools(answer: StreamingAnswer, controls: ChatControls) -> list[Message]:
    """The tool messages with the results of an answer's calls; none if it calls nothing."""
    if answer.request.finish_reason != "stop" or not controls.tools:
        return []
    message = answer.message
    reply = Reply(message["content"], tool_calls=message.get("tool_calls", []))
    results = answer_calls(reply, controls.tools)
    return [{"role": "tool", "content": result.text} for result in results]
