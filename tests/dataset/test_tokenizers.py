"""Tokenizers of all kinds: without BOS, EOS or padding, and the bytes of their tokens."""

import json
import shutil

import pytest
from chats import assistant, user
from foreign_templates import LLAMA3, foreign_tokenizer

from dataset.chat import stop_tokens
from dataset.encoding import encode_text
from dataset.tools.loop import tokens_of_results
from model.errors import UserError
from model.weights import TOKENIZER, load_tokenizer
from trainer.common.setup import special_ids


def our_tokenizer_with(folder, **changes):
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return load_tokenizer(folder)


def test_without_bos_a_document_ends_with_eos(tmp_path):
    tokenizer = our_tokenizer_with(tmp_path, bos_token=None)
    encoded = encode_text(tokenizer, "one two")
    assert encoded.ids == [*tokenizer("one two").input_ids, 2]
    assert all(encoded.loss_mask)
    assert special_ids(tokenizer)["bos_token_id"] is None


def test_without_eos_a_document_is_refused(tmp_path):
    tokenizer = our_tokenizer_with(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="has no eos_token"):
        encode_text(tokenizer, "one two")


def test_without_padding_eos_fills_a_batch(tmp_path):
    assert our_tokenizer_with(tmp_path, pad_token=None).pad_token_id == 2


def test_a_model_stops_at_eos_and_at_the_end_of_a_turn(tmp_path, tokenizer):
    assert stop_tokens(tokenizer) == [2]
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert special_ids(tokenizer) == expected
    # as Qwen's: a text ends with <|endoftext|>, a turn with <|im_end|>
    qwen = our_tokenizer_with(tmp_path, eos_token="<|endoftext|>", bos_token=None)
    assert stop_tokens(qwen) == [0, 2]
    expected = {"bos_token_id": None, "eos_token_id": [0, 2], "pad_token_id": 0}
    assert special_ids(qwen) == expected


def test_results_of_tools_follow_the_end_of_the_turn_whatever_token_that_is(tokenizer):
    class Result:
        text = "12:00"

    llama = foreign_tokenizer(LLAMA3)
    assert llama.decode(tokens_of_results(llama, [Result])) == (
        "<|start_header_id|>tool<|end_header_id|>\n\n12:00<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    messages = [user("…"), assistant("…"), {"role": "tool", "content": "12:00"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ours = tokenizer.decode(tokens_of_results(tokenizer, [Result]))
    assert rendered.endswith("…<|im_end|>" + ours)
