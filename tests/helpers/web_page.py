"""The web page under Streamlit's AppTest and in a browser, and what its toy model was trained to
say."""

import time

from streamlit.testing.v1 import AppTest

from model.weights import ROOT

PAGE = str(ROOT / "scripts" / "web_demo.py")
ANSWER = "Hello! I count: " + ", ".join(map(str, range(1, 31))) + "."
CALL = {"name": "calculator", "arguments": {"expression": "6 * 7"}}
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "two and two"}
MEMORISED = [
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ANSWER}], []),
    ([{"role": "user", "content": "2 + 2?"}, THOUGHT], []),
    (
        [
            {"role": "user", "content": "6 * 7?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"result": 42}'},
            {"role": "assistant", "content": "It is 42."},
        ],
        ["calculator"],
    ),
]


def say(page: AppTest, text: str) -> AppTest:
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def texts(block) -> list[str]:
    return [each.value for each in block.markdown]


def open_when_served(page, address: str) -> None:
    """Go to an address at which something is just starting to listen."""
    page.set_default_timeout(120_000)
    for _ in range(100):
        try:
            page.goto(address)
            return
        except Exception:
            time.sleep(0.2)
