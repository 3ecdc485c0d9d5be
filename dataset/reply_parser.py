"""What an assistant wrote → thoughts, answer and tool calls: the chat template read backwards.

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
ENDS = {"content": ("<think>", "<tool_call>"), "reasoning": ("</think>",), "tool_call": ("</tool_call>",)}  # fmt: skip # noqa: E501
NEXT: dict[str, Kind] = {
    "<think>": "reasoning",
    "</think>": "content",
    "<tool_call>": "tool_call",
    "</tool_call>": "content",
}


@dataclass
class Reply:
    """A whole reply in its parts."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # name, arguments


class ReplyParser:
    """The parts of a reply as its text comes, piece by piece.

    The line breaks next to tags are the template's and not the text's. A tool call comes as a
    whole, {"name": …, "arguments": {…}}; one that is no such JSON stays content, as it was written.

    Args:
        thinking: the prompt ended with <think> already.
    """

    def __init__(self, thinking: bool = False):
        self.kind: Kind = "reasoning" if thinking else "content"
        self.held = ""  # what may belong to a tag, or to the line breaks before one
        self.begun = False  # anything of this part was told

    def feed(self, text: str) -> Iterator[tuple[Kind, Any]]:
        self.held += text
        while found := self.first_tag():
            at, tag = found
            part, self.held = self.held[:at], self.held[at + len(tag) :]
            yield from self.tell(part.rstrip("\n"), whole=True)
            self.kind, self.begun = NEXT[tag], False
        if self.kind != "tool_call":
            sure = len(self.held) - self.unsure()
            part, self.held = self.held[:sure], self.held[sure:]
            yield from self.tell(part)

    def end(self) -> Iterator[tuple[Kind, Any]]:
        part, self.held = self.held, ""
        yield from self.tell(part, whole=self.kind == "tool_call")

    def tell(self, part: str, whole: bool = False) -> Iterator[tuple[Kind, Any]]:
        if self.kind == "tool_call" and whole:
            call = parsed_call(part)
            yield ("tool_call", call) if call else ("content", f"<tool_call>{part}\n</tool_call>")
            return
        part = part if self.begun else part.lstrip("\n")
        if part:
            self.begun = True
            yield self.kind, part

    def first_tag(self) -> tuple[int, str] | None:
        found = [(at, tag) for tag in ENDS[self.kind] if (at := self.held.find(tag)) >= 0]
        return min(found, default=None)

    def unsure(self) -> int:
        """How many of the last characters may be a tag's beginning, or line breaks before it."""
        for n in range(len(self.held), 0, -1):
            rest = self.held[-n:].lstrip("\n")
            if any(tag.startswith(rest) for tag in ENDS[self.kind]):
                return n
        return 0


FORM = re.compile(r"<think>\n(.+?)\n</think>\n<answer>\n(.+?)\n</answer>", re.DOTALL)
REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def parse_reasoning(text: str) -> tuple[str, str] | None:
    """Thought and answer of a text in exactly the form of r1_mix_1024.jsonl, each tag once and
    nothing around it; else None."""
    found = FORM.fullmatch(text)
    once = all(text.count(tag) == 1 for tag in REASONING_TAGS)
    return (found[1], found[2]) if found and once else None


def tagged_answer(text: str) -> str | None:
    """What stands between <answer> and </answer>, whatever is around them."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else None


def parsed_call(text: str) -> dict[str, Any] | None:
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
