"""The shipped template without Jinja: the same text and spans as by Jinja."""

import itertools
import random

import numpy as np
import pytest
from toy import CHATS, chat_file

from dataset import lm_dataset, shipped_template
from dataset.chat_template import ChatTemplate
from dataset.lm_dataset import load_documents
from dataset.shipped_template import Unusual, render_shipped

TOOL = {"type": "function", "function": {"name": "天气", "parameters": {"type": "object"}}}
CALL = {"name": "a", "arguments": {"城市": "巴黎 \n\"'<b>", "n": [1, 2.5, None]}}
SYSTEMS = [
    [],
    [{"role": "system", "content": "Be brief."}],
    [{"role": "system", "content": ""}],
    [{"role": "system", "content": "Be brief.", "tools": [TOOL, "as text"]}],
    [{"role": "system", "content": "", "tools": [TOOL]}],
]
ANSWERS = [
    {"content": "Hi\n"},
    {"content": ""},
    {"content": None},
    {},
    {"content": "Hi", "empty_think": True},
    {"content": "Hi", "reasoning_content": "\n\nhm\n hm\n\n", "empty_think": True},
    {"content": "", "reasoning_content": "hm"},
    {"content": "", "tool_calls": [CALL]},
    {"content": "Let me see.", "tool_calls": [CALL, {"function": CALL, "type": "function"}]},
    {"content": "", "reasoning_content": "hm", "tool_calls": [{"name": "a", "arguments": "{}"}]},
    {"content": "", "tool_calls": [{"name": "a"}], "empty_think": True},
    {"content": "x", "tool_calls": []},
]
OTHERS = [
    {"role": "user", "content": "你好 <|im_end|> {{ 1 }}"},
    {"role": "tool", "content": '{"result": 1}'},
    {"role": "system", "content": "later"},
]
OPTIONS = [
    {},
    {"tools": [TOOL]},
    {"tools": []},
    {"open_thinking": True},
    {"empty_think": True},
    {"open_thinking": True, "empty_think": True, "enable_thinking": True, "unknown": 1},
]


def conversations():
    """Each answer after each system message, and long random ones."""
    user = OTHERS[0]
    for system, answer in itertools.product(SYSTEMS, ANSWERS):
        yield [*system, user, {"role": "assistant", **answer}]
    rng = random.Random(0)
    turns = [{"role": "assistant", **answer} for answer in ANSWERS] + 4 * OTHERS
    for _ in range(200):
        yield [*rng.choice(SYSTEMS), *rng.choices(turns, k=rng.randrange(8))]


def by_jinja(monkeypatch, tokenizer, messages, prompt=False, **options):
    monkeypatch.setattr(ChatTemplate, "without_jinja", False)
    return ChatTemplate(tokenizer, messages, options).render(messages, prompt)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_renders_what_jinja_renders(monkeypatch, tokenizer, options, prompt):
    for messages in conversations():
        expected = by_jinja(monkeypatch, tokenizer, messages, prompt, **options)
        assert render_shipped(messages, prompt, **options) == expected, messages


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {}),
        ({"role": "user", "content": 1}, {}),
        ({"role": "system", "content": "Hi", "tools": '[{"name": "a"}]'}, {}),
        ({"role": "assistant", "content": "", "tool_calls": '[{"name": "a"}]'}, {}),
        ({"role": "assistant", "content": "", "tool_calls": ["{}"]}, {}),
    ],
)
def test_what_is_unusual_is_left_to_jinja(monkeypatch, tokenizer, message, options):
    with pytest.raises(Unusual):
        render_shipped([message], **options)
    template = ChatTemplate(tokenizer, [message], dict(options))
    rendered = template.render([message])
    assert rendered == by_jinja(monkeypatch, tokenizer, [message], **options)


def test_another_template_is_left_to_jinja(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}!")
    (message,) = messages = [{"role": "user", "content": "Hi"}]
    assert ChatTemplate(tokenizer, messages, {}).render([message])[0] == "Hi!"


@pytest.mark.parametrize("workers", [1, 2])
def test_where_the_first_rows_differ_jinja_renders_all(tmp_path, tokenizer, monkeypatch, workers):
    monkeypatch.setattr(lm_dataset, "MIN_BYTES_FOR_WORKERS", 0)
    monkeypatch.setattr(ChatTemplate, "without_jinja", True)
    with_tools = [*SYSTEMS[4], OTHERS[0], {"role": "assistant", "content": "Hi"}]
    data = [
        chat_file(tmp_path / "a.jsonl", CHATS),
        chat_file(tmp_path / "b.jsonl", [with_tools]),
    ]
    said: list[str] = []

    def tokens(folder):
        settings = dict(cache=tmp_path / folder, workers=workers, report=said.append)
        return load_documents(data, "conversations", tokenizer, **settings)

    right = tokens("right")
    assert not said and ChatTemplate.without_jinja
    monkeypatch.setattr(shipped_template, "CALL_FORM", "another")  # of the second file alone
    again = tokens("again")
    assert said == ["the chat template is rendered by Jinja: without it, rows differ"]
    for one, other in zip(right, again, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
        np.testing.assert_array_equal(one["loss_mask"], other["loss_mask"])
