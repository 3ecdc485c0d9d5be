"""Conversations with tools, for tests."""

import json

from dataset.demo.files import demo_rows
from dataset.tools.builtin import TOOLS

ROWS = demo_rows("tools", held_out=True)
SUM = {"name": "calculator", "arguments": {"expression": "6 * 7"}}
TIME = {"name": "clock", "arguments": {}}


def tool_row(
    question="What is 6 × 7?", calls=(SUM,), results=("42",), answer="It is 42.", tools=TOOLS
):
    """A row of a data file: a conversation with tools."""
    chat = [
        {"role": "system", "content": "", "tools": [TOOLS[name].schema for name in tools]},
        {"role": "user", "content": question},
    ]
    if calls:
        chat.append({"role": "assistant", "content": "", "tool_calls": list(calls)})
        chat += [{"role": "tool", "content": result} for result in results]
    return {"conversations": [*chat, {"role": "assistant", "content": answer}]}


def call_text(*calls) -> str:
    """Tool calls as the chat template writes them."""
    each = (call if isinstance(call, str) else json.dumps(call) for call in calls)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in each)


HALF = '{"name": "dictionary", "arguments": {"word": "\\ud800"}}'
