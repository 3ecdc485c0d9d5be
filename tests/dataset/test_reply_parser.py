"""Replies taken apart: the template's inverse, whole and piece by piece."""

import pytest

from dataset.reply_parser import ReplyParser, parse_reply

CALL = {"name": "clock", "arguments": {"city": "北京"}}
MESSAGES = {
    "answer": {"content": "It is 12:00.\n\nBye."},
    "thoughts": {"reasoning_content": "one\n\ntwo", "content": "It is 12:00."},
    "call": {"content": "", "tool_calls": [CALL]},
    "all": {"reasoning_content": "A clock!", "content": "Let me see.", "tool_calls": [CALL] * 2},
    "angles": {"content": "1 < 2, <thin>, <tool_> and </think are no tags\n"},
}  # fmt: skip


def written(tokenizer, message) -> str:
    """As the chat template writes it."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", **message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_what_the_template_wrote_is_read_back(tokenizer, message):
    reply = parse_reply(written(tokenizer, message))
    assert reply.content == message["content"]
    assert reply.reasoning == message.get("reasoning_content", "")
    assert reply.tool_calls == message.get("tool_calls", [])


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_pieces_say_the_same_as_the_whole(tokenizer, message, size):
    text = written(tokenizer, message)
    whole, parser = parse_reply(text), ReplyParser()
    parts = []
    for start in range(0, len(text), size):
        parts += parser.feed(text[start : start + size])
    parts += parser.end()
    for kind in ("content", "reasoning"):
        assert "".join(part for k, part in parts if k == kind) == getattr(whole, kind)
    assert [part for kind, part in parts if kind == "tool_call"] == whole.tool_calls


def test_a_thought_that_the_prompt_began():
    reply = parse_reply("hm\n</think>\nyes", thinking=True)
    assert (reply.reasoning, reply.content) == ("hm", "yes")
    assert parse_reply("hm, hm", thinking=True).reasoning == "hm, hm"  # cut short


@pytest.mark.parametrize(
    "inner", ["{", "[]", '{"name": 5}', '{"name": "f", "arguments": [1]}', "f(x)"]
)
def test_what_is_no_call_stays_as_it_was_written(inner):
    text = f"<tool_call>\n{inner}\n</tool_call>"
    assert parse_reply(text).content == text
    assert parse_reply(text).tool_calls == []


def test_an_answer_comes_at_once_unless_it_may_be_a_tag():
    parser = ReplyParser()
    assert list(parser.feed("Hel")) == [("content", "Hel")]
    assert list(parser.feed("lo <thi")) == [("content", "lo ")]
    assert list(parser.feed("s>")) == [("content", "<this>")]
    assert list(parser.feed("\n")) == []
    assert list(parser.feed("x")) == [("content", "\nx")]
