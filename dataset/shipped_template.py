"""The chat template that MiniMind ships, written out in Python.

Jinja takes half of the time that it takes to tokenise conversations. This renders the same text as
the template in model/tokenizer_config.json, whose comments explain it, in a tenth of Jinja's time.
Before a file is tokenised, `agrees_with_jinja` compares the two on its first rows; what is unusual
(contents that are no text, tools as JSON in a string) is left to Jinja.
"""

import json
from functools import lru_cache
from typing import Any

from model.paths import ROOT

Span = tuple[int, int]  # of a text: the first character, and the one after the last

ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>"
EMPTY_THINK = "<think>\n\n</think>\n\n"
CALL_FORM = (
    "Write a call like this, with JSON arguments:\n"
    '<tool_call>\n{"name": <tool>, "arguments": <arguments>}\n</tool_call>'
)


class Unusual(Exception):
    """A conversation that is left to Jinja."""


@lru_cache(maxsize=1)
def shipped_template() -> str:
    config = json.loads((ROOT / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    return config["chat_template"]


def render_shipped(
    messages: list[dict[str, Any]],
    add_generation_prompt: bool = False,
    tools: Any = None,
    open_thinking: Any = False,
    empty_think: Any = False,
    **others: Any,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans that the assistant writes.

    Args:
        others: variables that the template does not read.

    Raises:
        Unusual: Jinja is to render it.
    """
    parts: list[str] = []
    spans: list[Span] = []
    length = 0

    def write(*texts: str) -> None:
        nonlocal length
        parts.extend(texts)
        length += sum(map(len, texts))

    has_system = bool(messages) and messages[0]["role"] == "system"
    system = text_of(messages[0]) if has_system else ""
    if offered := tools or (has_system and messages[0].get("tools")):
        separator = "\n\n" if system else ""
        lines = list_tools(offered)
        system += f"{separator}You can call these tools:\n<tools>\n{lines}</tools>\n{CALL_FORM}"
    if system:
        write("<|im_start|>system\n", system, END, "\n")

    before = ""  # the role of the message before
    turns = messages[has_system:]
    for number, message in enumerate(turns):
        role = message["role"]
        if role == "assistant":
            write(ASSISTANT)
            if message.get("empty_think") and not message.get("reasoning_content"):
                spans.append((length, length + len(EMPTY_THINK)))
                write(EMPTY_THINK)
            start = length
            write(*assistant_texts(message), END)
            spans.append((start, length))
            write("\n")
        elif role == "tool":  # results that follow one another share one user turn
            after = turns[number + 1]["role"] if number + 1 < len(turns) else ""
            first = "<|im_start|>user" if before != "tool" else ""
            last = f"{END}\n" if after != "tool" else ""
            write(first, "\n<tool_response>\n", text_of(message), "\n</tool_response>", last)
        else:
            write("<|im_start|>", role, "\n", text_of(message), END, "\n")
        before = role
    if add_generation_prompt:
        write(ASSISTANT, "<think>\n" if open_thinking else EMPTY_THINK if empty_think else "")
    return "".join(parts), spans


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise Unusual
    return content or ""


def assistant_texts(message: dict[str, Any]) -> list[str]:
    """The thought, the answer and the calls."""
    content = text_of(message)
    calls = list_calls(message.get("tool_calls") or [])
    thought = message.get("reasoning_content")
    if not thought:
        return [content, calls if content else calls[1:]]
    if not isinstance(thought, str):
        raise Unusual
    line_break = "\n" if content or not calls else ""
    return ["<think>\n", thought.strip("\n"), "\n</think>", line_break, content, calls]


def list_tools(tools: Any) -> str:
    if not isinstance(tools, list):
        raise Unusual
    return "".join(f"{tool if isinstance(tool, str) else to_json(tool)}\n" for tool in tools)


def list_calls(calls: Any) -> str:
    """Each call between its tags, in the flat form, whether it comes so or in OpenAI's."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unusual
    texts = []
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or "name" not in function:
            raise Unusual
        arguments = function.get("arguments") or {}
        arguments = arguments if isinstance(arguments, str) else to_json(arguments)
        texts.append(f'\n<tool_call>\n{{"name": {to_json(function["name"])}, "arguments": ')
        texts.append(f"{arguments}}}\n</tool_call>")
    return "".join(texts)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
