"""Held-out loss and bits per byte by hand, samples, and what is held out."""

import math

import pytest
import torch
from toy import (
    CHATS,
    TEXTS,
    Trainer,
    chat_file,
    logged,
    same,
    text_file,
    timeless,
)

from dataset.lm_dataset import encode_chat, encode_text, load_documents, token_bytes
from dataset.packing import PackedDataset
from model.errors import UserError
from trainer import train_full_sft, train_pretrain
from trainer.common.arguments import TrainArgs
from trainer.common.context import Context
from trainer.common.evaluation import evaluate_loss, sample_answer, sample_continuation
from trainer.common.setup import load_packed

pytestmark = pytest.mark.usefixtures("in_a_hurry")


# -- evaluation ------------------------------------------------------------------------------------


def by_hand(model, tokenizer, documents):
    """Loss and bits per byte, document by document and token by token."""
    sizes, nats, text_nats, size, count = token_bytes(tokenizer), 0.0, 0.0, 0, 0
    for document in documents:
        log_p = model(torch.tensor([document.ids])).logits[0].log_softmax(-1)
        for place in range(1, len(document.ids)):
            if not document.loss_mask[place]:
                continue
            token = document.ids[place]
            loss = -log_p[place - 1, token].item()
            nats, count = nats + loss, count + 1
            if token > 2:  # the control tokens are 0, 1 and 2
                text_nats, size = text_nats + loss, size + int(sizes[token])
    return {"eval_loss": nats / count, "eval_bpb": text_nats / math.log(2) / size}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_held_out_loss_by_hand(tmp_path, tokenizer, make_model, kind, packing):
    if kind == "text":
        path, documents = text_file(tmp_path / "t"), [encode_text(tokenizer, t) for t in TEXTS]
    else:
        path, documents = chat_file(tmp_path / "c"), [encode_chat(tokenizer, c) for c in CHATS]
    model = make_model(vocab_size=6400, dropout=0.5).train()
    ctx = Context.create(TrainArgs(batch_size=3, device="cpu"))
    rows = PackedDataset(load_documents(path, kind, tokenizer), 40, packing=packing)
    metrics = evaluate_loss(ctx, model, tokenizer, rows)
    assert model.training
    assert metrics == pytest.approx(by_hand(model.eval(), tokenizer, documents), rel=1e-4)


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path, tokenizer, make_model):
    """A model that knows nothing spends log2(V) bits a token."""
    model = make_model(vocab_size=6400, initializer_range=1e-6)
    ctx = Context.create(TrainArgs(device="cpu"))
    rows = PackedDataset(load_documents(text_file(tmp_path / "t"), "text", tokenizer), 40)
    tokens = sum(len(encode_text(tokenizer, text).ids) - 2 for text in TEXTS)
    expected = tokens * math.log2(6400) / len("".join(TEXTS).encode())
    assert evaluate_loss(ctx, model, tokenizer, rows)["eval_bpb"] == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_evaluating_does_not_change_what_is_trained(tmp_path, trajectory, stage):
    train = Trainer(tmp_path, stage)
    common = dict(val_path=[train.data], dropout=0.2, max_steps=4)
    often = logged(train(eval_interval=1, **common))
    weights = trajectory[-1]
    seldom = logged(train(eval_interval=0, **common))
    assert sum("eval_bpb" in record for record in often) == 4
    assert sum("eval_bpb" in record for record in seldom) == 1
    assert same(weights, trajectory[-1])
    assert timeless(often)[-2:] == timeless(seldom)[-2:]  # the last evaluation, the last loss


def test_samples_are_texts_of_the_model(tmp_path, tokenizer, make_model):
    model = make_model(vocab_size=6400, dropout=0.9).train()
    ctx = Context.create(TrainArgs(device="cpu"))
    rows = PackedDataset(load_documents(text_file(tmp_path / "t"), "text", tokenizer), 40)
    first = sample_continuation(ctx, model, tokenizer, rows, length=5)
    assert first == sample_continuation(ctx, model, tokenizer, rows, length=5)
    begun, continued = first.split(" ▸")
    assert begun and any(text.startswith(begun) for text in TEXTS) and continued
    assert sample_answer(ctx, model, tokenizer, "Who?", length=5).startswith("Who? ▸ ")
    assert model.training


def rows_of(train, tokenizer, **changes):
    args = train_pretrain.Args(**train.settings("a", **changes))
    return load_packed(Context.create(args), tokenizer, "text")


def test_what_is_held_out_is_not_trained_and_always_the_same(train, tokenizer):
    rows, held_out = rows_of(train, tokenizer, val_share=0.2)
    assert len(held_out.indices) == math.ceil(24 * 0.2)
    assert sorted([*rows.indices, *held_out.indices]) == list(range(24))
    again, still_out = rows_of(train, tokenizer, val_share=0.2, seed=7, packing=True)
    assert still_out.indices.tolist() == held_out.indices.tolist()
    _, fewer = rows_of(train, tokenizer, val_share=0.2, val_documents=2)
    assert len(fewer.indices) == 2 and set(fewer.indices) < set(held_out.indices)


def test_a_separate_file_leaves_all_data_to_training(train, tokenizer):
    other = text_file(train.folder / "val.jsonl", TEXTS[:3])
    rows, held_out = rows_of(train, tokenizer, val_path=[other])
    assert (len(rows.indices), len(held_out.indices)) == (24, 3)
    assert rows_of(train, tokenizer, val_share=0.0)[1] is None


@pytest.mark.parametrize(
    ("texts", "share", "complaint"),
    [(["one two"], 0.5, "holds out all documents"), ([], 0.0, "holds no documents")],
)
def test_too_little_data_is_said_to_be_so(train, tokenizer, texts, share, complaint):
    train.data = text_file(train.folder / "little.jsonl", texts)
    with pytest.raises(UserError, match=complaint):
        rows_of(train, tokenizer, val_share=share)
