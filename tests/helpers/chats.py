"""Messages, rows and documents that the tests of dataset/ share."""

import json

import numpy as np
from datasets import Dataset

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = [
    f"<{end}{name}>"
    for name in ("think", "answer", "tool_call", "tool_response")
    for end in ("", "/")
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "what time it is · 现在几点",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"name": "clock", "arguments": {"place": "北京"}}
CONVERSATIONS = {
    "english": [user("What is 12 + 7?"), assistant("19")],
    "chinese": [user("你好，你是谁？"), assistant("我是 MiniMind，\n很高兴认识你！😀")],
    "turns": [
        user("a"),
        assistant("b c"),
        user("d\n\ne"),
        assistant("f"),
        user("g"),
        assistant(""),
    ],
    "system": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello.")],
    "system alone counts": [{"role": "system", "content": ""}, user("Hi"), assistant("Hello.")],
    "code": [user("loop?"), assistant("```python\nfor i in range(3):\n    print(i)\n```\n")],
    "reasoning": [user("1+1"), assistant("2", reasoning_content="one and\none"), user("ok")],
    "tags written out": [user("q"), assistant("<think>\nhm\n</think>\n<answer>\n4\n</answer>")],
    "tools, a list": [
        {"role": "system", "content": "You can call.", "tools": [CLOCK, CLOCK]},
        user("时间？"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": '{"time": "08:30"}'},
        assistant("八点半。"),
    ],
    "tools, as text": [
        {"role": "system", "content": "", "tools": json.dumps([CLOCK], ensure_ascii=False)},
        user("time?"),
        assistant("Let me see.", tool_calls=json.dumps([CALL, CALL], ensure_ascii=False)),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        assistant("Two.", reasoning_content="two results"),
    ],
}


def line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def chat(*messages) -> bytes:
    return json.dumps({"conversations": messages}).encode()


def documents_of(lengths, trained=None) -> Dataset:
    """Documents whose tokens are all different: 1, 2, 3, … from the first one on."""
    edges = np.concatenate(([1], 1 + np.cumsum(lengths)))
    ids = [list(range(start, end)) for start, end in zip(edges, edges[1:], strict=False)]
    trained = trained or [[True] * len(document) for document in ids]
    return Dataset.from_dict({"input_ids": ids, "loss_mask": trained}).with_format("numpy")
