"""Bits per byte of a text: the sum over its tokens by hand, the parts, and mistakes."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from peers import peer_with_weights

from dataset.lm_dataset import encode_text
from model.errors import UserError
from scripts import eval_ppl

TEXTS = ["What is attention?", "你好，世界。今天天气很好", "12 + 34 = 46", "one two three " * 60]


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return path


@pytest.mark.parametrize("fields", [{}, {"use_moe": True}], ids=["dense", "moe"])
def test_bits_are_those_of_each_document_alone(make_model, tokenizer, data, fields):
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512, **fields)
    peer = peer_with_weights(model).eval()
    texts = eval_ppl.read_texts(data)
    assert texts == [text[:500] for text in TEXTS]
    documents = eval_ppl.encode(tokenizer, texts)
    assert documents == [encode_text(tokenizer, text).ids[:-1] for text in texts]
    by_hand = []
    for ids in documents:
        with torch.inference_mode():
            log_probs = peer(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats = -sum(log_probs[at, token].item() for at, token in enumerate(ids[1:]))
        by_hand.append(nats / math.log(2))
    for batch_size in (1, 3):
        assert eval_ppl.document_bits(model, documents, batch_size) == pytest.approx(by_hand, 1e-4)
    expected = sum(by_hand) / sum(len(text.encode()) for text in texts)
    assert eval_ppl.bits_per_byte(model, tokenizer, texts) == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("longest", [7, 8])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 12, 13, 40])
def test_each_token_of_a_long_document_counts_once_and_in_context(size, longest):
    ids, counted = list(range(size)), []
    for window in eval_ppl.sliding_windows(ids, 0, longest):
        assert len(window.ids) <= longest
        counted += window.ids[window.start :]
        assert window.start == 1 or window.start >= longest // 2
    assert counted == ids[1:]


def test_parts_add_up(data, save, tmp_path):
    path = save(hidden_size=32)
    args = dict(weight=str(path), data=str(data), device="cpu", json=str(tmp_path / "a.json"))
    eval_ppl.main(eval_ppl.Args(**args))
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["bytes"] == sum(len(text[:500].encode()) for text in TEXTS)
    assert {name: part["documents"] for name, part in report["languages"].items()} == {
        "en": 2,
        "zh": 1,
        "none": 1,
    }
    assert [*report["lengths"]] == ["8-15", "16-31", "256-511"]
    for kind in ("languages", "lengths"):
        parts = report[kind].values()
        bits = sum(part["bits_per_byte"] * part["bytes"] for part in parts)
        assert bits / report["bytes"] == pytest.approx(report["bits_per_byte"], abs=2e-4)
    bits_of_a_token = report["bits_per_byte"] * report["bytes_per_token"]
    assert 2**bits_of_a_token == pytest.approx(report["perplexity"], rel=1e-2)


def test_the_standard_error_is_the_spread_of_resampled_texts():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 400, (80,), generator=generator)
    bits = sizes * (2 + 0.5 * torch.randn(80, generator=generator))
    picks = torch.randint(0, 80, (4000, 80), generator=generator)
    spread = (bits[picks].sum(1) / sizes[picks].sum(1)).std().item()
    error = eval_ppl.summarize(["x" * n for n in sizes.tolist()], bits.tolist())["standard_error"]
    assert error == pytest.approx(spread, rel=0.1)


def test_other_files(tmp_path):
    chat = {
        "conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    }
    (tmp_path / "c.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps({"text": ""}) + "\n")
    assert eval_ppl.read_texts(tmp_path / "c.jsonl") == ["a\nb"]
    (tmp_path / "t.txt").write_text("123456789")
    assert eval_ppl.read_texts(tmp_path / "t.txt", characters=4) == ["1234", "5678", "9"]
    assert eval_ppl.read_texts(tmp_path / "t.txt", 1, 4) == ["1234"]
    assert eval_ppl.read_texts(tmp_path / "t.txt", characters=0) == ["123456789"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"words": 1}\n', "line 2 of .*a.jsonl is no .*text"),
        ("a.jsonl", b"[1]\n", "value 1 of .*a.jsonl is no JSON object"),
        ("a.txt", b"\xff\xff", "a.txt is not UTF-8"),
        ("a.txt", b"", "contains no text"),
        ("a.jsonl.gz", b"no gzip", "no gzip file"),
        ("none/a.txt", None, "there is no file"),
    ],
)
def test_mistakes_are_told(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        eval_ppl.main(eval_ppl.Args(data=str(tmp_path / name)))
