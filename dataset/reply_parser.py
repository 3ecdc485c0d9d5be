"""Parse an assistant's reply into reasoning, answer and tool calls: the chat template in reverse.

<think>
…
</think>
the answer
<tool_call>
{"name": "…", "arguments": {…}}
</tool_call>
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["content", "reasoning", "tool_call"]
ENDS = {
    "content": ("<think>", "<tool_call>"),
    # a model whose prompt leaves the thought to it begins with the tag that others find there
    "reasoning": ("</think>", "<think>"),
    "tool_call": ("</tool_call>",),
}
NEXT: dict[str, Kind] = {
    "<think>": "reasoning",
    "</think>": "content",
    "<tool_call>": "tool_call",
    "</tool_call>": "content",
}


@dataclass
class Reply:
    """A complete reply in its parts."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # name, arguments


class ReplyParser:
    """Streaming: the parts of a reply, as its text arrives in deltas.

    Line breaks next to tags belong to the template and not to the text. A tool call is emitted when
    it is complete, {"name": …, "arguments": {…}}; one that is no such JSON stays content.

    Args:
        thinking: the prompt ends with <think> (`ends_in_thought`), so that the reply starts within
            the reasoning.
    """

    def __init__(self, thinking: bool = False):
        self.kind: Kind = "reasoning" if thinking else "content"
        self.buffer = ""  # text that may belong to a tag, or to the line breaks before one
        self.started = False  # some text of this part was emitted

    def feed(self, text: str) -> Iterator[tuple[Kind, Any]]:
        self.buffer += text
        while found := self.first_tag():
            at, tag = found
            part, self.buffer = self.buffer[:at], self.buffer[at + len(tag) :]
            yield from self.emit(part.rstrip("\n"), complete=True)
            self.kind, self.started = NEXT[tag], False
        if self.kind != "tool_call":
            safe = len(self.buffer) - self.pending()
            part, self.buffer = self.buffer[:safe], self.buffer[safe:]
            yield from self.emit(part)

    def end(self) -> Iterator[tuple[Kind, Any]]:
        part, self.buffer = self.buffer, ""
        yield from self.emit(part, complete=self.kind == "tool_call")

    def emit(self, part: str, complete: bool = False) -> Iterator[tuple[Kind, Any]]:
        if self.kind == "tool_call" and complete:
            call = parse_call(part)
            yield ("tool_call", call) if call else ("content", f"<tool_call>{part}\n</tool_call>")
            return
        part = part if self.started else part.lstrip("\n")
        if part:
            self.started = True
            yield self.kind, part

    def first_tag(self) -> tuple[int, str] | None:
        found = [(at, tag) for tag in ENDS[self.kind] if (at := self.buffer.find(tag)) >= 0]
        return min(found, default=None)

    def pending(self) -> int:
        """How many of the last characters may belong to a tag, or to line breaks before one."""
        for n in range(len(self.buffer), 0, -1):
            rest = self.buffer[-n:].lstrip("\n")
            if any(tag.startswith(rest) for tag in ENDS[self.kind]):
                return n
        return 0


REASONING_FORMAT = re.compile(r"<think>\n(.+?)\n</think>\n<answer>\n(.+?)\n</answer>", re.DOTALL)
REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
UNTAGGED_FORMAT = re.compile(r"<think>\n(.+?)\n</think>\n{1,2}(.*\S.*)", re.DOTALL)


def parse_reasoning(text: str, answer_tags: bool = True) -> tuple[str, str] | None:
    """Reasoning and answer of a text in exactly the format of r1_mix_1024.jsonl, each tag once and
    nothing around them; else None.

    Args:
        answer_tags: False for a tokenizer without <answer>, whose answer is what follows </think>.
    """
    found = (REASONING_FORMAT if answer_tags else UNTAGGED_FORMAT).fullmatch(text)
    tags = REASONING_TAGS if answer_tags else REASONING_TAGS[:2]
    once = all(text.count(tag) == 1 for tag in tags)
    return (found[1], found[2]) if found and once else None


def tagged_answer(text: str) -> str | None:
    """The text between <answer> and </answer>, whatever is around them. `final_answer` in
    grading.py reads replies without these tags too."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else None


def parse_call(text: str) -> dict[str, Any] | None:
    """A tool call's name and arguments, or None if this is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None


def parse_reply(text: str, thinking: bool = False) -> Reply:
    parser, reply = ReplyParser(thinking), Reply()
    for kind, part in (*parser.feed(text), *parser.end()):
        if kind == "tool_call":
            reply.tool_calls.append(part)
        else:
            setattr(reply, kind, getattr(reply, kind) + part)
    return reply
