"""Example prompts, and prompts from the terminal or a pipe."""

import sys
from collections.abc import Iterator
from typing import Literal

CHAT_EXAMPLES = [
    "Who are you?",
    "你是谁？",
    "What is 23 + 45?",
    "把 3、1、4、2 从小到大排序。",
    "What is attention in a Transformer?",
    "什么是学习率？",
    "Tell me something nice.",
    "明天会下雨吗？",
]
TEXT_EXAMPLES = ["The Transformer is", "人工智能是", "The weather today", "学习的方法是"]


def read_prompts(
    source: Literal["ask", "auto", "type"] = "type", examples: list[str] | None = None
) -> Iterator[str]:
    """The examples, or each non-empty line of standard input until it ends.

    Args:
        source: auto: the examples; type: standard input; ask: let the user choose, or standard
            input where it is a pipe.
    """
    interactive = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # a pipe may not be valid UTF-8
    if source == "ask" and interactive:
        try:
            choice = input("[0] examples  [1] type your own: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        source = "auto" if choice == "0" else "type"
    if source == "auto":
        for example in examples or []:
            print(f"> {example}")
            yield example
        return
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            if not interactive:
                print(f"> {line}")
            yield line


def last_exchanges(history: list[dict], historys: int) -> list[dict]:
    """The newest message and `historys` before it, rounded down to whole exchanges of two."""
    return history[-1 - historys // 2 * 2 :]
