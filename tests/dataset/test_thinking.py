"""Thoughts: in prompts, in rows of data, and how a model is told not to think."""

import json

import numpy as np
import pytest
from chats import CALL, assistant, user
from foreign_templates import MINIMIND3, QWEN3, foreign_tokenizer

from dataset.encoding import encode_chat, ends_in_thought
from dataset.forms.messages import THOUGHTS
from dataset.lm_dataset import has_thoughts, load_documents
from dataset.reply_parser import ReplyParser, parse_reply
from model.inference.thinking import can_close_thoughts, close_thoughts, closes_thoughts
from model.weights import load_tokenizer

EMPTY = "<think>\n\n</think>\n\n"
PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(tokenizer, **options):
    encoded = encode_chat(tokenizer, [user("q")], add_generation_prompt=True, **options)
    return tokenizer.decode(encoded.ids)


def write_rows(path, count=400, thoughts=0):
    rows = [[user(f"q {n}"), assistant(f"a {n}")] for n in range(count)]
    for row in rows[:thoughts]:
        row[1]["reasoning_content"] = "hm"
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return path


def test_a_prompt_closes_a_thought_only_for_a_model_that_learnt_so():
    tokenizer = load_tokenizer()
    assert can_close_thoughts(tokenizer) and not closes_thoughts(tokenizer)
    assert prompt_of(tokenizer) == prompt_of(tokenizer, open_thinking=False) == PROMPT
    close_thoughts(tokenizer)
    close_thoughts(tokenizer)
    assert closes_thoughts(tokenizer)
    assert prompt_of(tokenizer) == PROMPT + EMPTY
    assert prompt_of(tokenizer, open_thinking=True) == PROMPT + "<think>\n"
    theirs = tokenizer.apply_chat_template(
        [user("q")], add_generation_prompt=True, tokenize=False, open_thinking=False
    )
    assert theirs == PROMPT + EMPTY


def test_templates_of_others_decide_by_their_own_variable():
    for template in (QWEN3, MINIMIND3):
        tokenizer = foreign_tokenizer(template)
        close_thoughts(tokenizer)
        assert not closes_thoughts(tokenizer)
        assert prompt_of(tokenizer, open_thinking=False) == PROMPT + EMPTY
    tokenizer = foreign_tokenizer(QWEN3)
    assert prompt_of(tokenizer, open_thinking=True) == PROMPT


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_a_share_of_the_rows_without_thoughts_gets_empty_ones(ratio, tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", thoughts=50)
    documents = load_documents(
        path, "conversations", tokenizer, empty_think_ratio=ratio, cache=tmp_path
    )
    replies = [tokenizer.decode(each["input_ids"][each["loss_mask"]]) for each in documents]
    plain = [f"a {n}<|im_end|>" for n in range(400)]
    assert replies[:50] == [f"<think>\nhm\n</think>\n{reply}" for reply in plain[:50]]
    empty = np.array([reply == EMPTY + end for reply, end in zip(replies, plain, strict=True)])
    at_once = np.array([reply == end for reply, end in zip(replies, plain, strict=True)])
    assert (empty | at_once)[50:].all() and not (empty | at_once)[:50].any()
    assert abs(empty[50:].mean() - ratio) < 0.06 * (0 < ratio < 1) + 1e-9


def test_a_closed_thought_is_the_beginning_of_a_trained_answer(tmp_path):
    """The tokens of the prompt, and of what follows it, are those of training."""
    tokenizer = load_tokenizer()
    close_thoughts(tokenizer)
    for answer in ("a", "\n\n a", " b\n"):
        path = tmp_path / "row.jsonl"
        path.write_text(json.dumps({"conversations": [user("q"), assistant(answer)]}))
        (row,) = load_documents(
            path, "conversations", tokenizer, empty_think_ratio=1.0, cache=tmp_path
        )
        prompt = encode_chat(tokenizer, [user("q")], add_generation_prompt=True).ids
        assert row["input_ids"][: len(prompt)].tolist() == prompt
        assert tokenizer.decode(row["input_ids"][len(prompt) :]) == f"{answer}<|im_end|>\n"


def test_both_sides_of_a_pair_have_an_empty_thought_or_neither(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    sides = [[user(f"q {n}"), assistant(text)] for n in range(100) for text in ("yes", "no")]
    rows = [dict(chosen=a, rejected=b) for a, b in zip(sides[::2], sides[1::2], strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = load_documents(
        path, "preferences", tokenizer, empty_think_ratio=0.5, cache=tmp_path
    )
    empty = [EMPTY in tokenizer.decode(document["input_ids"]) for document in documents]
    assert empty[::2] == empty[1::2]
    assert 30 < sum(empty[::2]) < 70


def test_an_empty_thought_before_a_call(tmp_path, tokenizer):
    call = assistant("", tool_calls=[CALL], empty_think=True)
    ids = encode_chat(tokenizer, [user("q"), call]).ids
    assert f"assistant\n{EMPTY}<tool_call>\n" in tokenizer.decode(ids)


def test_thoughts_are_found_in_the_data(tmp_path):
    assert not has_thoughts([write_rows(tmp_path / "plain.jsonl")])
    assert has_thoughts([write_rows(tmp_path / "some.jsonl", thoughts=1)])
    path = tmp_path / "content.jsonl"
    path.write_text(json.dumps({"conversations": [assistant("<think>\nhm\n</think>\n4")]}))
    assert has_thoughts([tmp_path / "plain.jsonl", path])
    for nothing in ('""', "null", '"null"'):
        message = f'{{"role": "assistant", "reasoning_content": {nothing}}}'
        path.write_text(f'{{"conversations": [{message}]}}\n')
        assert not has_thoughts([path])
    for name in THOUGHTS:
        path.write_text(json.dumps({"question": "2+2?", name: "hm", "answer": "4"}))
        assert has_thoughts([path])


def test_a_reply_that_opens_its_thought_itself_where_the_prompt_did_not():
    """Qwen3's prompt leaves <think> to the model, and minimind-3's begins with it."""
    text = "<think>\nhm\n</think>\n\nyes"
    for thinking in (False, True):
        reply = parse_reply(text, thinking=thinking)
        assert (reply.reasoning, reply.content) == ("hm", "yes")
        parser = ReplyParser(thinking)
        parts = [part for character in text for part in parser.feed(character)]
        assert "".join(part for kind, part in parts if kind == "reasoning") == "hm"
    for template, opened in ((QWEN3, False), (MINIMIND3, True)):
        tokenizer = foreign_tokenizer(template)
        for thinks in (False, True):
            ids = encode_chat(
                tokenizer, [user("q")], add_generation_prompt=True, open_thinking=thinks
            ).ids
            assert ends_in_thought(tokenizer, ids) == (opened and thinks)
