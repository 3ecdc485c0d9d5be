"""benchmarks/learning/small_models.py: data, averages and embeddings of variants, equal time."""

import json
import math

import numpy as np
import pytest
import small_models
import torch
from datasets import Dataset
from small_model_training import (
    PIECE,
    Extra,
    Variant,
    embedding_from_counts,
    make_data,
    take,
    train,
)
from torch import nn
from toy import TINY, chat_file, text_file

from dataset.lm_dataset import load_documents
from dataset.packing import document_lengths
from model.weights import load_tokenizer
from trainer import train_pretrain

# short documents, and some of several pieces
TEXTS = ["a word and " * (1 + n % 4) + str(n) for n in range(200)]
TEXTS += ["one two three four " * (60 + n) for n in range(20)]
SEQUENCE = 256


@pytest.fixture
def data_args(tmp_path):
    def make(**changes):
        data = [text_file(tmp_path / "text.jsonl", TEXTS)]
        settings = TINY | dict(data_path=data, max_seq_len=SEQUENCE, seed=1, resume=True)
        return train_pretrain.Args(**(settings | changes))

    return make


@pytest.fixture
def chats(tmp_path) -> str:
    many = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * n}]
        for n in range(1, 80)
    ]
    return chat_file(tmp_path / "chats.jsonl", many)


def test_a_part_of_the_data_has_the_tokens_that_were_asked_for(data_args):
    documents = load_documents(data_args().data_path, "text", load_tokenizer())
    lengths = document_lengths(documents)
    few, many = take(documents, 1000, seed=1), take(documents, 2000, seed=1)
    assert len(set(few) & set(many)) > 0.8 * len(few)
    for indices, tokens in ((few, 1000), (many, 2000)):
        assert tokens - lengths.min() < lengths[indices].sum() <= tokens
    assert set(take(documents, 1000, seed=2)) != set(few)
    assert len(take(documents, 10**9, seed=1)) == len(documents)


def labels_of(data) -> int:
    """The number of predicted tokens."""
    sequences = [data[n] for n in range(len(data))]
    return sum(int(chunk["loss_mask"][1:].sum()) for chunks in sequences for chunk in chunks)


@pytest.mark.parametrize("change", ["cut_first", "short_first", "mix_last"])
def test_every_sequence_comes_once(data_args, chats, change):
    data, order = make_data(Variant("", **{change: 0.4}), data_args(), 8000, chats)
    assert sorted(order) == list(range(len(data)))


def test_pieces_of_documents_come_first(data_args, chats):
    args = data_args()
    data, order = make_data(Variant("", cut_first=0.4), args, 8000, chats)
    longest = np.array([max(len(c["input_ids"]) for c in data[n]) for n in order])
    (first_whole, *_) = np.flatnonzero(longest > PIECE)
    assert (longest[:first_whole] <= PIECE).all()
    cut = data.parts[0]
    assert document_lengths(cut.documents)[cut.indices].sum() == pytest.approx(3200, abs=10)
    # each token but the first of a document is still predicted exactly once
    lengths = document_lengths(data.documents)[np.concatenate([p.indices for p in data.parts])]
    assert labels_of(data) == (lengths - 1).sum()
    # pieces of different documents share a sequence
    bounds = zip(cut.offsets[:-1], cut.offsets[1:], strict=True)
    members = [cut.chunk_order[begin:end] for begin, end in bounds]
    assert np.mean([len(set(cut.chunks.document[each])) for each in members]) > 1.5


def test_sequences_with_more_documents_come_first(data_args, chats):
    data, order = make_data(Variant("", short_first=0.3), data_args(), 8000, chats)
    counts = np.diff(data.offsets)[order]
    first = int(0.3 * len(data))
    assert counts[:first].min() >= np.median(np.diff(data.offsets))


@pytest.mark.parametrize("loss_mask", [False, True])
def test_conversations_are_in_the_last_part_alone(data_args, chats, loss_mask):
    variant = Variant("", mix_last=0.4, mix_loss_mask=loss_mask)
    data, order = make_data(variant, data_args(), 8000, chats)
    text, conversations = data.parts
    is_chat = order >= len(text)
    begin = np.flatnonzero(is_chat)[0]
    assert begin >= int(0.6 * len(data)) and not is_chat[begin:].all()
    assert is_chat.sum() == len(conversations)
    assert conversations.num_tokens == pytest.approx(1600, abs=20)
    masks = [chunk["loss_mask"] for n in np.flatnonzero(is_chat) for chunk in data[int(order[n])]]
    assert all(mask.all() for mask in masks) != loss_mask


def test_averages_of_known_weights():
    model = nn.Linear(1, 1, bias=False)
    extra, values = Extra(averages=True), [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0]
    moving = 0.0
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        extra.update(model, fraction_done=step / 10)
        moving += (value - moving) * max(1 / (step + 1), 0.05)
        if step == 4:  # a resumed run goes on
            state, extra = extra.state_dict(), Extra(averages=True)
            extra.load_state_dict(state)
    got = {name: average[0].item() for name, average in extra.averages.items()}
    assert got["last 0.2"] == pytest.approx((5 + 3) / 2) and got["last 0.1"] == 3
    assert got["ema 0.95"] == pytest.approx(moving) == pytest.approx(sum(values) / 10)
    assert got["ema 0.95"] == got["ema 0.98"]  # a plain mean, until there are 1 / (1 − decay)


def test_an_embedding_made_of_counts():
    """Against counting by hand and numpy; a rotation leaves products as they are."""
    torch.manual_seed(0)
    rng, size, width = np.random.default_rng(0), 12, 5
    rows = [rng.choice(size, 30, p=rng.dirichlet(np.ones(size))).tolist() for _ in range(6)]
    documents = Dataset.from_dict({"input_ids": rows}).with_format("numpy")
    embedding = embedding_from_counts(documents, size, width, std=0.02)

    joint = np.zeros((size, size))
    for row in rows:
        for at, token in enumerate(row):
            for distance in (1, 2, 3, 4):
                if at + distance < len(row):
                    joint[token, row[at + distance]] += 1 / distance
                    joint[row[at + distance], token] += 1 / distance
    of_token = joint.sum(0)
    context = of_token**0.75
    pmi = np.zeros((size, size))
    for a in range(size):
        for b in range(size):
            expected = of_token[a] * context[b] / context.sum()
            if joint[a, b] > expected:
                pmi[a, b] = math.log(joint[a, b] / expected)
    left, values, _ = np.linalg.svd(pmi)
    factors = left[:, :width] * np.sqrt(values[:width])
    products = torch.from_numpy(factors @ factors.T).float()
    got = embedding @ embedding.T
    assert torch.allclose(got / got.norm(), products / products.norm(), atol=1e-3)
    assert embedding.std().item() == pytest.approx(0.02)


def test_a_slower_variant_trains_fewer_tokens(tmp_path):
    """1,000,000 tokens take 300 s. At 1.25 times the seconds a token and after 30 s of preparation
    270 s are left, for 720,000."""
    args = small_models.Args(results=str(tmp_path / "results.jsonl"))
    results = small_models.Results(args)
    speed = dict(default_seconds_per_token=3e-4, slower=1.25, seconds_before=30.0)
    results.add("speed", variant="qk_norm", **speed)
    assert small_models.tokens_in_equal_time(args, results, "qk_norm") == (720_000, 1.25)
    assert small_models.tokens_in_equal_time(args, results, "default") == (1_000_000, 1.0)
    # lines of other settings are not these
    other = small_models.Results(small_models.Args(results=args.results, tokens=50_000))
    assert other.speed("qk_norm") is None and results.speed("qk_norm") is not None


def test_an_interrupted_training_ends_as_another(data_args, chats, tmp_path, monkeypatch):
    variant = Variant("", cut_first=0.4, averages=True, last_momentum=0.95)

    def run(name, **changes):
        folder = dict(save_dir=str(tmp_path / name), checkpoint_dir=str(tmp_path / name))
        _, extra, model, _ = train(variant, data_args(**folder, **changes), 4000, chats)
        return [*model.parameters(), *(each for many in extra.averages.values() for each in many)]

    class PowerCut(Exception):
        pass

    def update(extra, model, fraction_done):
        if fraction_done > 0.85:
            raise PowerCut
        whole_update(extra, model, fraction_done)

    whole, whole_update = run("whole"), Extra.update
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Extra, "update", update)
        run("stopped", save_interval=2)
    resumed = run("stopped", save_interval=2)
    assert len(resumed) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_a_table_of_what_there_is(tmp_path, capsys):
    args = small_models.Args(results=str(tmp_path / "results.jsonl"), table=True)
    results = small_models.Results(args)
    for seed, loss in ((42, 2.0), (43, 2.1)):
        run = dict(slower=1.0, trained_tokens=7, languages={"zh": 1.0, "en": 3.0}, long=2.5)
        averages = {"ema 0.95": 2.25, "last 0.2": 2.125}
        sft = {"loss": 4.5, "bits_per_byte": 2.75}
        default = dict(variant="default", bits_per_byte=loss, averages=averages, sft=sft)
        results.add("run", seed=seed, **default, **run)
        results.add("run", variant="qk_norm", seed=seed, bits_per_byte=loss - 0.0625, **run)
    small_models.main(args)
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    assert "2.0500" in lines["default"] and "2.1250 last 0.2" in lines["default"]
    assert "1.9875" in lines["qk_norm"] and "-0.0625" in lines["qk_norm"]
    left = printed.split("not run yet: ")[1].split(", ")
    assert "kv_heads_4" in left and not {"default", "qk_norm"} & set(left)
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["seed"] == 42
