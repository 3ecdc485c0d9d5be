"""DPO: against trl, by hand, its invariances, its pairs and batches."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peers import peer_with_weights
from toy import PAIRS, Trainer, logged, pair_file

from dataset.lm_dataset import encode_chat, load_documents
from dataset.packing import IGNORE_INDEX
from dataset.pairs import PreferenceDataset, collate_pairs
from model.errors import UserError
from model.weights import load_tokenizer
from trainer import train_dpo
from trainer.common import evaluation
from trainer.common.evaluation import completion_log_probs
from trainer.train_dpo import dpo_loss

pytestmark = pytest.mark.usefixtures("in_a_hurry")
TURNS = [("user", "two?"), ("assistant", "2"), ("user", "three?")]


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(tmp_path):
    return Trainer(tmp_path, train_dpo)


@pytest.fixture
def pairs(tmp_path, tokenizer):
    documents = load_documents(pair_file(tmp_path / "pairs.jsonl"), "preferences", tokenizer)
    return PreferenceDataset(documents, 64)


def batch_of(pairs: PreferenceDataset, **settings):
    return collate_pairs([pairs[n] for n in range(len(pairs))], **settings)


# -- pairs -----------------------------------------------------------------------------------------


def test_only_what_comes_after_the_shared_prompt_is_trained(tmp_path, tokenizer):
    prompt = chat(*TURNS)
    more = chat(("assistant", "3!"), ("user", "four?"), ("assistant", "4"))
    row = {"chosen": prompt + more, "rejected": prompt + chat(("assistant", "9"))}
    path = write(tmp_path / "pairs.jsonl", row)
    chosen, rejected = load_documents(path, "preferences", tokenizer)
    shared = encode_chat(tokenizer, prompt, add_generation_prompt=True).ids
    end = tokenizer.eos_token_id
    for side, messages, trained in (
        (chosen, prompt + more, ["3!<|im_end|>", "4<|im_end|>"]),
        (rejected, prompt + chat(("assistant", "9")), ["9<|im_end|>"]),
    ):
        ids = side["input_ids"].tolist()
        line_break = encode_chat(tokenizer, messages).ids
        assert ids == line_break[:-1] and ids[-1] == end
        assert ids[: len(shared)] == shared
        chosen_ids = side["input_ids"][side["loss_mask"]]
        assert tokenizer.decode(chosen_ids) == "".join(trained)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_holds_each_side_once_and_says_where_it_ends(pairs, packing):
    batch = batch_of(pairs, packing=packing)
    sides = [side for pair in range(len(pairs)) for side in pairs[pair]["input_ids"]]
    assert batch.num_samples == 10 and batch.num_tokens == sum(map(len, sides))
    assert (batch.input_ids.shape[0] == 20) == (not packing)
    if packing:
        assert batch.input_ids.numel() < 1.1 * batch.num_tokens
    else:
        assert batch.input_ids.shape[1] == max(map(len, sides))
    ends, ids = batch.last_index.flatten(), batch.input_ids.flatten()
    for number, side in enumerate(sides):
        place = slice(ends[number] - len(side) + 1, ends[number] + 1)
        assert ids[place].tolist() == side.tolist()
        assert batch.position_ids.flatten()[place].tolist() == list(range(len(side)))
        assert set(batch.document_ids.flatten()[place].tolist()) == {number}
    of_each = batch.document_ids[batch.labels != IGNORE_INDEX].bincount(minlength=20).view(-1, 2)
    assert torch.equal(of_each.float(), batch.completion_lengths)
    assert batch.num_label_tokens == batch.completion_lengths.sum()


@torch.no_grad()
def test_sides_in_one_row_do_not_see_each_other(pairs, make_model):
    """Packed, padded and each alone: the same log-probabilities."""
    model = make_model(vocab_size=6400)
    packed = completion_log_probs(model, batch_of(pairs))
    padded = completion_log_probs(model, batch_of(pairs, packing=False))
    torch.testing.assert_close(packed, padded, atol=1e-3, rtol=1e-5)
    for number in range(2):
        for side in range(2):
            ids = torch.tensor(pairs[number]["input_ids"][side].tolist())
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            each = logs.gather(1, ids[1:, None]).squeeze(1)
            alone = each[torch.tensor(pairs[number]["loss_mask"][side])[1:]].sum()
            torch.testing.assert_close(packed[number, side], alone, atol=1e-3, rtol=1e-5)


def test_pairs_that_are_too_long_are_left_out_and_counted(pairs):
    few = PreferenceDataset(pairs.documents, int(np.median(pairs.longer_side)))
    assert 0 < len(few) < len(pairs) and few.lengths.max() <= few.seq_len
    assert f"{len(pairs) - len(few)} pairs with a longer one are left out" in few.summary
    assert "left out" not in pairs.summary


# -- the loss --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """A function that makes trl's trainer of a model of ours."""
    trl = pytest.importorskip("trl")

    def make(model, **settings):
        folder = str(tmp_path_factory.mktemp("trl"))
        config = dict(output_dir=folder, report_to=[], use_cpu=True, precompute_ref_log_probs=True)
        row = {"prompt": "a", "chosen": " b", "rejected": " c"}
        return trl.DPOTrainer(
            model=peer_with_weights(model).train(),
            args=trl.DPOConfig(**config, **settings),
            train_dataset=Dataset.from_list([row]),
            processing_class=load_tokenizer(),
        )

    return make


@pytest.mark.parametrize(
    ("settings", "theirs", "count"),
    [
        (dict(beta=0.1), "sigmoid", 10),
        (dict(beta=0.3, loss_type="ipo"), "ipo", 10),
        (dict(beta=0.7, label_smoothing=0.2), "aot", 1),  # for a single pair the same as cDPO
    ],
    ids=str,
)
def test_the_loss_and_its_gradient_equal_trl(
    trl_trainer, make_model, pairs, settings, theirs, count
):
    """Theirs on sides padded to the longest, ours on rows that hold several."""
    model = make_model(vocab_size=6400, initializer_range=0.05).train()
    pairs = PreferenceDataset(pairs.documents, 64, np.arange(count))
    pairs.ref_log_probs = (
        np.random.default_rng(0).normal(-40, 5, (len(pairs), 2)).astype(np.float32)
    )
    trainer = trl_trainer(model, **{**settings, "loss_type": theirs})
    padded = batch_of(pairs, packing=False)
    sides = torch.arange(2 * count).view(-1, 2).T.flatten()  # chosen, then rejected
    theirs = trainer._compute_loss(
        trainer.model,
        {
            "input_ids": padded.input_ids[sides],
            "attention_mask": (padded.document_ids < 2 * count)[sides].long(),
            "completion_mask": (padded.labels != IGNORE_INDEX)[sides].long(),
            "ref_chosen_logps": padded.ref_log_probs[:, 0],
            "ref_rejected_logps": padded.ref_log_probs[:, 1],
        },
        return_outputs=False,
    )
    batch = batch_of(pairs)
    policy = completion_log_probs(model, batch)
    ours = dpo_loss(policy, batch.ref_log_probs, batch.completion_lengths, **settings).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.backward()
    theirs.backward()
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        gradients = [m.get_parameter(name).grad for m in (model, trainer.model)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_losses_by_hand():
    policy = torch.tensor([[-10.0, -20.0], [-8.0, -4.0]])
    known = torch.tensor([[-12.0, -18.0], [-8.0, -5.0]])
    lengths = torch.tensor([[5.0, 4.0], [2.0, 1.0]])
    # log-ratios (2, -2) and (0, 1): h = 4 and -1, times beta 0.5
    usual = [math.log1p(math.exp(-2)), math.log1p(math.exp(0.5))]
    torch.testing.assert_close(dpo_loss(policy, known, lengths, beta=0.5), torch.tensor(usual))
    # a share of 0.1 the other way round: −log σ(−x) = x − log σ(x)
    smoothed = [usual[0] + 0.1 * 2, usual[1] + 0.1 * -0.5]
    torch.testing.assert_close(
        dpo_loss(policy, known, lengths, beta=0.5, label_smoothing=0.1), torch.tensor(smoothed)
    )
    # means: 2/5 + 2/4 and 0 − 1; 1/(2·0.5) = 1
    torch.testing.assert_close(
        dpo_loss(policy, known, lengths, beta=0.5, loss_type="ipo"),
        torch.tensor([(0.9 - 1) ** 2, (-1 - 1) ** 2]),
    )
    # the chosen answers' losses a token: 10/5 and 8/2
    torch.testing.assert_close(
        dpo_loss(policy, known, lengths, beta=0.5, sft_weight=0.3),
        torch.tensor([usual[0] + 0.3 * 2, usual[1] + 0.3 * 4]),
    )


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(packing=True),
        dict(use_moe=True),
        dict(use_lora=True, lora_r=4),
        dict(dropout=0.3, from_weight="none"),
        dict(label_smoothing=0.2),
    ],
    ids=str,
)
def test_it_begins_with_ln_2(train, changes):
    """All of it, held-out pairs too, at a step that changes nothing."""
    metrics = train(val_share=0.3, max_steps=1, learning_rate=1e-12, **changes)
    first = metrics["history"][1]
    if not changes.get("dropout"):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        (dict(packing=True), 0.3),
        (dict(use_moe=True), 0.3),
        (dict(use_lora=True, learning_rate=1e-2), 0.6),
        (dict(loss_type="ipo", beta=1.0), 0.05),
    ],
    ids=str,
)
def test_it_learns_what_is_preferred(train, changes, target):
    metrics = train(val_share=0.3, epochs=10, **changes)
    assert metrics["eval_rewards/accuracies"] == 1 and metrics["eval_loss"] < target
    last = logged(metrics)[-1]
    assert last["rewards/chosen"] - last["rewards/rejected"] == pytest.approx(
        last["rewards/margins"], abs=2e-4
    )


def test_the_chosen_answer_becomes_likelier_with_an_sft_term(train):
    """Without it both sides may lose probability, as long as the rejected one loses more."""
    settings = dict(epochs=6, max_steps=30, val_share=0.0)
    without = logged(train("without", **settings))[-1]
    with_it = logged(train("with", sft_weight=1.0, **settings))[-1]
    assert with_it["rewards/chosen"] > without["rewards/chosen"]


def test_the_reference_of_an_addition_is_the_model_without_it(train, monkeypatch):
    """Its log-probabilities are those of a run that trains everything, found in the same file."""
    train("whole", max_steps=1, from_weight="none")
    monkeypatch.setattr(evaluation, "map_pairs", None)  # not to be computed again
    metrics = train("addition", max_steps=1, from_weight="none", use_lora=True)
    assert metrics["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    saved = torch.load(train.folder / "addition" / "out" / "lora" / "dpo_32.pth")
    assert all(".lora_" in name for name in saved)


def reference_files(train) -> list[Path]:
    return sorted((train.folder / "cache").glob("*.reference.npy"))


def test_log_probs_of_the_reference_are_computed_once(train, monkeypatch):
    calls, map_pairs = [], evaluation.map_pairs
    monkeypatch.setattr(
        evaluation, "map_pairs", lambda *a, **k: calls.append(1) or map_pairs(*a, **k)
    )
    train("a", max_steps=2)
    (file,) = reference_files(train)
    train("b", max_steps=2, beta=0.7, batch_size=3)
    assert len(calls) == 1
    file.write_bytes(file.read_bytes()[:100])  # damaged
    train("c", max_steps=2)
    assert len(calls) == 2 and len(reference_files(train)) == 1
    train("d", max_steps=2, seed=7)  # another model
    train("e", max_steps=2, max_seq_len=22)  # other pairs
    assert len(calls) == 4 and len(reference_files(train)) == 3


def test_a_side_of_a_pair_that_is_equal_moves_nothing(train):
    """Swapping chosen and rejected turns the gradient round: what is learnt is the difference."""
    swapped = [(question, bad, good) for question, good, bad in PAIRS]
    train.data = pair_file(train.folder / "swapped.jsonl", swapped)
    accuracy = train(epochs=10)["history"][-2]["rewards/accuracies"]
    assert accuracy == 1


# -- mistakes --------------------------------------------------------------------------------------

GOOD = {"chosen": chat(("user", "a"), ("assistant", "b"))} | {
    "rejected": chat(("user", "a"), ("assistant", "c"))
}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"chosen": GOOD["chosen"]}, 'has no "rejected"'),
        ({"rejected": GOOD["chosen"]}, 'has no "chosen"'),
        ({}, 'has no "chosen" and "rejected"'),
        ({**GOOD, "chosen": []}, 'has no "chosen"'),
        ({**GOOD, "chosen": "b"}, 'has "chosen" as text, and no "prompt" that it answers'),
        ({**GOOD, "rejected": GOOD["chosen"]}, "the same messages as chosen and as rejected"),
        ({**GOOD, "chosen": chat(("user", "a"))}, 'no assistant turn in "chosen"'),
        ({**GOOD, "rejected": chat(("user", "a"))}, 'no assistant turn in "rejected"'),
        (
            {**GOOD, "rejected": chat(("user", "x"), ("assistant", "c"))},
            "a user message where the two sides begin to differ",
        ),
    ],
    ids=str,
)
def test_rows_that_are_no_preferences_are_named(tmp_path, tokenizer, row, complaint):
    path = write(tmp_path / "bad.jsonl", GOOD, row)
    with pytest.raises(UserError, match=f"line 2 of .*bad.jsonl .*{complaint}"):
        load_documents(path, "preferences", tokenizer)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(beta=0.0), "--beta must be more than 0"),
        (dict(label_smoothing=0.5), "--label_smoothing must be at least 0 and less than 0.5"),
        (dict(label_smoothing=0.1, loss_type="ipo"), "has no effect without --loss_type sigmoid"),
        (dict(sft_weight=-1.0), "--sft_weight must not be negative"),
        (dict(max_seq_len=8), r"every pair has a side longer than --max_seq_len 8 .* 1\d tokens"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(train, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        train(**changes)
