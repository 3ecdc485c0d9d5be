"""Detokenization piece by piece against decode, and stop strings."""

import pytest
import torch

from model.inference.streaming import StreamingDetokenizer, stream_text

TEXTS = [
    "你好，世界！",
    "A family: 👩\u200d👩\u200d👧\u200d👦, flags: 🇨🇳🇩🇪, 𠮷野家 😀",
    "plain ASCII, don't you think?\n\n  indented",
    "<think>\n想一想\n</think>",
]


def plain_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_make_up_the_text(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 1


def test_a_character_comes_with_its_last_token(tokenizer):
    ids = plain_ids(tokenizer, "a😀b")
    assert len(ids) > 3  # the emoji takes several tokens
    fed = []

    def feed():
        for token in ids:
            fed.append(token)
            yield token

    arrived = {piece: len(fed) for piece in stream_text(tokenizer, feed())}
    assert arrived == {"a": 1, "😀": len(ids) - 1, "b": len(ids)}


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_cut_anywhere_is_what_decode_says(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    for end in range(len(ids)):
        streamed = "".join(stream_text(tokenizer, ids[:end]))
        assert streamed == tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_a_stream_of_any_tokens_is_what_decode_says(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # among them bytes that are no UTF-8
        ids = torch.randint(len(tokenizer), (40,), generator=generator).tolist()
        streamed = "".join(stream_text(tokenizer, ids))
        assert streamed == tokenizer.decode(ids, skip_special_tokens=True)


def test_control_tokens_are_not_shown_but_tags_are(tokenizer):
    end = tokenizer.eos_token_id
    ids = [*plain_ids(tokenizer, "<think>好</think>"), end]
    assert "".join(stream_text(tokenizer, ids)) == "<think>好</think>"


STOPS = [
    ("世",),
    ("好，", "界！"),
    ("。。", "\n\n"),
    ("族", "👩\u200d👧"),
    ("不在",),
    ("ASCII, do", "n't"),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    stream, shown = StreamingDetokenizer(tokenizer, stop), ""
    found = [at for each in stop if (at := text.find(each)) >= 0]
    expected = text[: min(found)] if found else text
    for token in plain_ids(tokenizer, text):
        stream.feed(token)
        shown += stream.read()
        assert expected.startswith(shown)  # nothing is ever taken back
        if stream.stopped:
            break
    stream.end()
    assert shown + stream.read() == expected
    assert stream.stopped == bool(found)
