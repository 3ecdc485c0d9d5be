"""A tokenizer's chat template, and messages and tools in the form in which it takes them."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dataset.jsonl import parse_json
from dataset.shipped_template import Span, Unusual, render_shipped, shipped_template
from model.errors import UserError

GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
# Our own template, and some others, look for the tools in the first system message.
READS_TOOLS_OF_MESSAGE = re.compile(r"""message(s\[0\])?(\.tools\b|\[['"]tools['"]\])""")

MAX_SECONDS = 20.0  # of one rendering; thousands of messages take one
Message = dict[str, Any]


class ChatTemplate:
    """A tokenizer's chat template, with messages and tools in the form in which it takes them.

    Tools come from `options` or from the first system message. Our own template reads them there;
    most others know only the variable `tools`, and OpenAI's form of tools and calls.

    Attributes:
        without_jinja: whether the shipped template is rendered without Jinja.
    """

    without_jinja = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[Message],
        options: dict[str, Any],
    ):
        first = messages[0] if messages and messages[0]["role"] == "system" else {}
        tools = parse_tool_fields({"tools": options.get("tools")})["tools"] or first.get("tools")
        self.tools: list[dict[str, Any]] = tools or []
        try:
            # a tokenizer may have a template of its own for conversations with tools
            self.text = tokenizer.get_chat_template(tools=self.tools or None)
        except ValueError as error:
            raise UserError(f"cannot be rendered: {error}") from None
        self.tokenizer = tokenizer
        self.has_marks, reads_tools_of_message = features(self.text)
        # Qwen3 and others call the variable of MiniMind's open_thinking so
        self.options = {"enable_thinking": bool(options.get("open_thinking")), **options}
        self.messages = messages
        if not reads_tools_of_message:
            self.options["tools"] = [in_openai_form(tool) for tool in self.tools] or None
            self.messages = list(with_openai_calls(messages))

    def render(
        self, messages: list[Message], add_generation_prompt: bool = False, **options: Any
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of its {% generation %} blocks. UserError if that fails."""
        if self.without_jinja and self.text == shipped_template():
            with suppress(Unusual):
                values = {**self.options, **options}
                return render_shipped(messages, add_generation_prompt, **values)
        try:
            with time_limit(MAX_SECONDS):
                rendered, spans = render_jinja_template(
                    [messages],
                    chat_template=self.text,
                    return_assistant_tokens_mask=self.has_marks,
                    add_generation_prompt=add_generation_prompt,
                    **{**self.tokenizer.special_tokens_map, **self.options, **options},
                )
        except jinja2.TemplateSyntaxError as error:
            place = f"line {error.lineno} of the tokenizer's chat template"
            raise UserError(f"cannot be rendered: {place} is no Jinja: {error.message}") from None
        except Exception as error:  # whatever its code does with this conversation
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"is refused by the tokenizer's chat template: {reason}") from None
        return rendered[0], spans[0] if spans else []


@lru_cache(maxsize=8)
def features(template: str) -> tuple[bool, bool]:
    """Whether it marks what the assistant writes, and reads the tools of the first message."""
    marks, tools = GENERATION.search(template), READS_TOOLS_OF_MESSAGE.search(template)
    return marks is not None, tools is not None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds: a template may have loops without end, or 2**2**40. In
    the main thread alone, where a signal can interrupt it, and not on Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_openai_form(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as {"type": "function", "function": {…}}, in which the "type" may be missing."""
    if "function" in tool:
        return {"type": "function", **tool}
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type"},
    }


def with_openai_calls(messages: list[Message]) -> Iterator[Message]:
    """The messages with calls in OpenAI's form, arguments as an object, and with an id that the
    result repeats, which some templates ask for."""
    number, waiting = 0, []
    for message in messages:
        if calls := message.get("tool_calls"):
            waiting, given = [], calls
            calls = []
            for call in given:
                function = dict(call.get("function") or call)
                arguments = function.get("arguments") or {}
                if isinstance(arguments, str):
                    try:
                        arguments = json.loads(arguments)
                    except (ValueError, RecursionError):
                        pass  # the template writes it as it is
                identity = call.get("id") or f"call{number:05}"  # Mistral: nine characters
                number += 1
                waiting.append(identity)
                function = {"name": function["name"], "arguments": arguments}
                calls.append({"id": identity, "type": "function", "function": function})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and waiting and "tool_call_id" not in message:
            message = {**message, "tool_call_id": waiting.pop(0)}
        yield message


def parse_tool_fields(message: Message) -> Message:
    """The message with "tools" and "tool_calls" as lists; files may have them as JSON in a string,
    so that their columns are uniform. UserError if they are neither."""
    lists = {key: message[key] for key in ("tools", "tool_calls") if message.get(key)}
    for key, value in lists.items():
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except UserError as error:
                raise UserError(f'has "{key}" whose text {error}') from None
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise UserError(f'has "{key}" that are no list of objects')
        lists[key] = value
    for key, name in (("tools", "tool"), ("tool_calls", "tool call")):
        for item in lists.get(key, []):
            function = item.get("function") or item
            if not isinstance(function, dict):
                raise UserError(f'has a {name} whose "function" is no object')
            if key == "tool_calls" and not isinstance(function.get("name"), str):
                raise UserError('has a tool call without a "name"')
    return {**message, **lists}
