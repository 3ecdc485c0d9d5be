"""Training: the verbs of `Run`, and pretraining and SFT from end to end on a tiny model."""

import json
import math
import re

import numpy as np
import pytest
import torch
from toy import (
    CHATS,
    TEXTS,
    Trainer,
    assert_close,
    chat_file,
    flags,
    logged,
    output,
    same,
    text_file,
)

from dataset import released
from dataset.lm_dataset import encode_text
from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, SwiGLU
from model.weights import ROOT
from trainer import train_full_sft, train_pretrain, trainer_utils
from trainer.common import hardware, loop
from trainer.common.checkpoint import MAX_SKIPPED_IN_A_ROW
from trainer.common.optimizers import (
    learning_rate_factor,
)
from trainer.common.setup import init_model
from trainer.report.plots import plot_losses
from trainer.trainer_utils import Run

LN_V = math.log(6400)
pytestmark = pytest.mark.usefixtures("in_a_hurry")


# -- one step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_how_a_window_is_cut_into_batches_changes_nothing(tmp_path, trajectory, stage):
    train = Trainer(tmp_path, stage)
    seen = []
    for batch_size, steps in ((8, 1), (1, 8), (4, 2)):
        window = dict(batch_size=batch_size, accumulation_steps=steps, max_steps=3, epochs=3)
        records = logged(train(**window))
        metrics = [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]
        seen.append((np.array(metrics), trajectory[-1]))
    (metrics, weights), *others = seen
    assert len(metrics) == 3
    for their_metrics, their_weights in others:
        np.testing.assert_allclose(their_metrics, metrics, atol=2e-4)
        assert_close(their_weights, weights)


def test_the_loss_of_an_update_is_the_mean_over_its_tokens(train, tokenizer):
    """Not over rows or micro-batches, which hold different numbers of them."""
    args = train_pretrain.Args(**train.settings("a", batch_size=1, accumulation_steps=24))
    model = init_model(args, tokenizer)
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([encode_text(tokenizer, text).ids])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
        total -= log_p.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    (record,) = logged(train_pretrain.main(args))
    assert record["loss"] == pytest.approx(total / count, abs=2e-4)
    assert record["num_tokens"] == count + len(TEXTS)


def test_gradient_checkpointing_computes_twice_and_changes_nothing(train, trajectory, monkeypatch):
    calls, forward = [], SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda *args: calls.append(1) or forward(*args))
    train(max_steps=2)
    expected, once = trajectory[-1], len(calls)
    train(max_steps=2, gradient_checkpointing=True)
    assert_close(trajectory[-1], expected, 1e-7)
    assert len(calls) - once == 2 * once


def test_an_untrained_model_guesses(train):
    assert logged(train(max_steps=1))[0]["loss"] == pytest.approx(LN_V, abs=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(train, optimizer):
    records = logged(
        train(optimizer=optimizer, epochs=8, learning_rate=1e-2, packing=True, batch_size=4)
    )
    assert records[0]["loss"] > 8 and records[-1]["loss"] < 3


def test_the_defaults_learn(train, monkeypatch, capsys):
    """A released file, packed rows, steps that grow, Muon, a linear schedule: nothing set but
    sizes and places."""
    monkeypatch.setattr(released, "DATASET", train.folder)
    text_file(train.folder / "pretrain_t2t_mini.jsonl", TEXTS * 40)
    sizes = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads device save_dir"
    settings = train.settings()
    given = {name: settings[name] for name in [*sizes.split(), "checkpoint_dir"]}
    args = train_pretrain.Args(epochs=4, log_interval=1, **given)
    records = [r for r in logged(train_pretrain.main(args)) if "loss" in r]
    assert "\ndata: pretrain_t2t_mini.jsonl: " in capsys.readouterr().out
    assert 1000 < records[0]["num_tokens"] < 1050
    assert records[0]["loss"] == pytest.approx(LN_V, abs=0.1)
    assert records[-1]["loss"] < 4 and records[-1]["step"] > 40


@pytest.mark.parametrize(("limit", "clipped"), [(0.05, True), (0.0, False), (1e6, False)])
def test_the_gradient_is_no_longer_than_grad_clip(train, monkeypatch, limit, clipped):
    norms, step = [], torch.optim.AdamW.step

    def measured(self):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    records = logged(train(grad_clip=limit, max_steps=3, optimizer="adamw"))
    whole = [record["grad_norm"] for record in records]
    assert min(whole) > 0.05
    assert norms == pytest.approx([limit] * 3 if clipped else whole, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_group_follows_the_schedule(train, monkeypatch, optimizer):
    rates, update = [], Run.update

    def watched(self, model, optimizer):
        update(self, model, optimizer)
        rates.append({group["lr"] / group["peak_lr"] for group in optimizer.param_groups})

    monkeypatch.setattr(Run, "update", watched)
    records = logged(train(optimizer=optimizer, max_steps=6, lr_schedule="cosine"))
    expected = [learning_rate_factor("cosine", step, step / 6, 2) for step in range(6)]
    for factors, factor in zip(rates, expected, strict=True):
        assert list(factors) == pytest.approx([factor] * len(factors))
    assert [record["learning_rate"] for record in records] == pytest.approx(
        [1e-3 * f for f in expected]
    )


def test_the_schedule_follows_the_rows_and_not_the_updates(train, monkeypatch):
    """24 rows of 13 tokens in steps of 2, 2, 2, 2, 4, 6 and the rest of 6."""
    monkeypatch.setattr(loop, "INITIAL_BATCH_TOKENS", 26)
    common = dict(batch_size=4, accumulation_steps=2, batch_ramp=2, warmup_steps=0)
    rates = [record["learning_rate"] for record in logged(train(**common))]
    assert rates == pytest.approx([1e-3 * (1 - n / 24) for n in (0, 2, 4, 6, 8, 12, 18)])
    rates = [record["learning_rate"] for record in logged(train(**common, max_steps=5))]
    assert rates == pytest.approx([1e-3 * (1 - n / 12) for n in (0, 2, 4, 6, 8)])


BY_HAND = {  # (schedule, steps, warmup): the factor of each step
    ("constant", 4, 0): [1, 1, 1, 1],
    ("constant", 4, 3): [1 / 4, 2 / 4, 3 / 4, 1],
    ("trapezoid", 8, 0): [1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    ("trapezoid", 8, 1): [1 / 2, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    ("trapezoid", 4, 9): [1 / 10, 2 / 10, 3 / 10, 4 / 10],
    ("cosine", 4, 0): [1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)],
    ("cosine", 2, 1): [1 / 2, 0.55],
    ("linear", 4, 0): [1, 3 / 4, 2 / 4, 1 / 4],
    ("linear", 4, 1): [1 / 2, 3 / 4, 2 / 4, 1 / 4],
}


@pytest.mark.parametrize(("case", "factors"), BY_HAND.items())
def test_the_schedules_by_hand(case, factors):
    schedule, steps, warmup = case
    ours = [learning_rate_factor(schedule, s, s / steps, warmup) for s in range(steps)]
    assert ours == pytest.approx(factors)


# -- not finite ------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """The gradient of these steps is not a number."""

    def at(*steps):
        backward = Run.backward
        factor = lambda run: math.nan if run.step in steps else 1.0  # noqa: E731
        monkeypatch.setattr(
            Run, "backward", lambda run, loss, *more: backward(run, loss * factor(run), *more)
        )

    return at


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(train, trajectory, poison, capsys, optimizer):
    poison(3)
    records = logged(train(optimizer=optimizer, max_steps=5))
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1]
    assert "step 3 is skipped: its gradient is not finite" in capsys.readouterr().out
    assert same(trajectory[2], trajectory[1]) and not same(trajectory[3], trajectory[2])
    assert all(tensor.isfinite().all() for tensor in trajectory[-1].values())


def test_several_in_a_row_end_the_run(train, trajectory, poison):
    poison(*range(3, 99))
    with pytest.raises(
        UserError,
        match=f"{MAX_SKIPPED_IN_A_ROW} steps .* step {MAX_SKIPPED_IN_A_ROW + 2}; try a lower",
    ):
        train()
    assert same(trajectory[-1], trajectory[1])


def test_several_that_are_not_in_a_row_do_not(train, poison):
    poison(1, 2, 3, 4, 6, 7, 8, 9)
    assert logged(train(max_steps=10))[-1]["skipped"] == 8


def test_a_broken_weight_ends_the_run(train, monkeypatch):
    def broken(*args):
        model = init_model(*args)
        model.model.norm.weight.data[3] = math.inf
        return model

    monkeypatch.setattr(train_pretrain, "init_model", broken)
    with pytest.raises(UserError, match="had no finite gradient"):
        train()


def test_the_log_is_json_even_then(train, poison):
    poison(2)
    train(max_steps=3)
    (path,) = train.folder.glob("a/out/*.metrics.jsonl")
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_window_without_anything_trained_is_no_accident(tmp_path):
    train = Trainer(tmp_path, train_full_sft)
    question = {"role": "user", "content": "why " * 50}
    train.data = chat_file(tmp_path / "long.jsonl", [[question, CHATS[0][1]], CHATS[0]])
    records = logged(train(batch_size=1, max_seq_len=24))
    assert records[-1]["skipped"] == 0
    assert all(math.isfinite(record["loss"]) for record in records)


# -- what a run leaves behind ----------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "warned"), [(1e-2, False), (1e-7, True)])
def test_what_rounding_leaves_of_a_training_is_told(tmp_path, capsys, rate, warned):
    """An SFT whose steps are smaller than what float16 can tell apart is warned of."""
    Trainer(tmp_path)("before", max_steps=2)
    start = tmp_path / "before" / "out" / "pretrain_32.pth"
    sft, out = Trainer(tmp_path, train_full_sft), tmp_path / "a" / "out"
    sft(from_weight=str(start), max_steps=3, learning_rate=rate)
    before, after = (
        torch.load(path, weights_only=True) for path in (start, out / "full_sft_32.pth")
    )
    del before["lm_head.weight"]  # the embedding once more
    changed = sum((after[name] != old).sum().item() for name, old in before.items())
    share = changed / sum(old.numel() for old in before.values())
    assert (share < 0.5) == warned and 0 < share
    (record,) = [r for r in sft.log(kind="changed_fraction") if r["step"] == 3]
    assert record["changed_fraction"] == pytest.approx(share, abs=1e-4)
    info = json.loads((out / "full_sft_32.json").read_text())
    assert info["origin"]["changed_fraction"] == record["changed_fraction"]
    printed = capsys.readouterr().out
    assert f"{share:.1%} of the values stored in float16 differ from the start's" in printed
    assert ("warning: most weights changed too little" in printed) == warned


@pytest.mark.parametrize(
    ("rate", "steps", "warned"), [(1e-9, 24, True), (1e-3, 24, False), (1e-9, 20, False)]
)
def test_steps_too_small_for_float16_are_warned_of_early(tmp_path, capsys, rate, steps, warned):
    """After 20 steps already; a run that ends there is told at its end."""
    Trainer(tmp_path)("before", max_steps=2)
    start = tmp_path / "before" / "out" / "pretrain_32.pth"
    sft = Trainer(tmp_path, train_full_sft)
    capsys.readouterr()
    settings = dict(from_weight=str(start), learning_rate=rate, lr_schedule="constant", epochs=9)
    sft(**settings, max_steps=steps, warmup_steps=0)
    printed = " ".join(capsys.readouterr().out.split())
    early = re.search(
        r"warning: after 20 steps ([\d.]+)% .* and ([\d.]+)% to ([\d.]+)% will after 24", printed
    )
    assert bool(early) == warned
    if early:
        now, least, most = map(float, early.groups())
        # constant steps in random directions add up as the root of their number
        assert 0 < now < 50 and least == pytest.approx(now * (24 / 20) ** 0.5, abs=0.11)
        assert most == pytest.approx(now * 24 / 20, abs=0.11)


def test_fill_and_waste_of_the_rows_are_told(train, capsys):
    train(max_steps=1)
    told = re.search(
        r"(\d+) tokens in 24 sequences of 32 \((.*)% full, (.*)% padding", capsys.readouterr().out
    )
    tokens, full, wasted = map(float, told.groups())
    assert full == pytest.approx(100 * tokens / (24 * 32), abs=0.06)
    assert full + wasted == pytest.approx(100)
    (info,) = train.folder.glob("a/out/*_32.json")
    origin = json.loads(info.read_text())["origin"]
    assert origin["packing_efficiency"] == pytest.approx(full / 100, abs=1e-3)


def test_a_run_leaves_weights_log_and_curves(train, monkeypatch, capsys):
    monkeypatch.setattr(trainer_utils, "plot_losses", plot_losses)
    train(max_steps=4, val_share=0.2, eval_interval=2)
    out = train.folder / "a" / "out"
    assert {path.name for path in out.iterdir()} == {
        *("pretrain_32.pth", "pretrain_32.json"),
        *("pretrain_32.metrics.jsonl", "pretrain_32.loss.png", "pretrain_32.state.json"),
    }
    picture = (out / "pretrain_32.loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000
    info = json.loads((out / "pretrain_32.json").read_text())
    assert info["stage"] == "pretrain" and info["config"]["hidden_size"] == 32
    assert info["origin"]["steps"] == 4 and info["origin"]["args"]["batch_size"] == 2
    assert info["origin"]["eval_bpb"] == train.log(kind="eval_bpb")[-1]["eval_bpb"]
    (state, full) = torch.load(out / "pretrain_32.pth", weights_only=True), train.saved()["model"]
    assert all(state[name].dtype == torch.float16 for name in full)
    assert all(torch.equal(state[name], tensor.half()) for name, tensor in full.items())
    assert [record["step"] for record in train.log(kind="eval_bpb")] == [2, 4]
    assert [record["step"] for record in train.log()] == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    for expected in (
        "0.24M parameters",
        "4 steps of 2 sequences",
        "ln 6400 = 8.76",
        "memory: about",
    ):
        assert expected in printed


def test_intervals_decide_when_something_is_logged(train):
    train(max_steps=7, log_interval=3)
    records = train.log()
    assert [record["step"] for record in records] == [1, 3, 6, 7]
    every = logged(train("b", max_steps=7))
    losses = [record["loss"] for record in every]
    means = [losses[0], np.mean(losses[1:3]), np.mean(losses[3:6]), losses[6]]
    assert [record["loss"] for record in records] == pytest.approx(means, abs=2e-4)
    assert records[-1]["num_tokens"] == every[-1]["num_tokens"]


def test_sft_begins_with_the_weights_of_pretraining(tmp_path, tokenizer):
    Trainer(tmp_path)(max_steps=2)
    sft = Trainer(tmp_path, train_full_sft)
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    args = train_full_sft.Args(**sft.settings(from_weight="pretrain", **sizes, dropout=0.1))
    model = init_model(args, tokenizer)
    theirs = torch.load(tmp_path / "a" / "out" / "pretrain_32.pth", weights_only=True)
    assert same({k: v.half() for k, v in model.state_dict().items()}, theirs)
    assert model.training and model.config.dropout == 0.1
    assert model.config.num_hidden_layers == 2
    train_full_sft.main(args)
    info = json.loads((tmp_path / "a" / "out" / "full_sft_32.json").read_text())
    assert (info["stage"], info["origin"]["from_weight"]) == ("full_sft", "pretrain")
    by_path = train_full_sft.Args(
        **sft.settings("b", from_weight=str(tmp_path / "a" / "out" / "pretrain_32.pth"))
    )
    assert same(init_model(by_path, tokenizer).state_dict(), model.state_dict())


# -- the machine -----------------------------------------------------------------------------------


def test_operations_of_a_token_by_hand():
    """Six for each number of a matrix (the tied one counts as the head), and attention's."""
    config = MiniMindConfig()
    model = MiniMindForCausalLM(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert hardware.flops_per_token(config, 0) == 6 * matrices
    # scores and values: 2 products of 512 numbers with half of 100 positions, 3 times, 8 layers
    assert hardware.flops_per_token(config, 100) - 6 * matrices == 2 * 2 * 512 * 50 * 3 * 8


@pytest.mark.parametrize(
    ("asked", "gain", "dtype"),
    [
        ("auto", 4.0, torch.bfloat16),
        ("auto", 0.3, torch.float32),
        ("bfloat16", 0.3, torch.bfloat16),
        ("float32", 4.0, torch.float32),
        ("float16", 4.0, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_is_faster_or_asked_for(
    train, monkeypatch, capsys, asked, gain, dtype
):
    monkeypatch.setattr(hardware, "bfloat16_gain", lambda: gain)
    assert hardware.resolve_dtype(asked, torch.device("cpu")) == dtype
    train(dtype=asked, max_steps=1)
    told = {
        "auto": f"--dtype auto: bfloat16 products are {gain:.1f} times as fast as float32's",
        "float16": "cpu does not train in float16: computing in float32",
    }
    printed = capsys.readouterr().out
    assert told.get(asked, "") in printed and str(dtype).removeprefix("torch.") in printed


def test_bfloat16_learns_as_float32_does(train):
    """It is not the same, but the losses of a short training differ by its rounding only."""
    losses = {
        dtype: [each["loss"] for each in train(dtype, dtype=dtype, epochs=3)["history"][:-1]]
        for dtype in ("float32", "bfloat16")
    }
    single, half = map(np.array, losses.values())
    assert (single != half).any() and single[-1] < single[0]
    assert np.abs(single - half).max() < 0.02 * single[0]


@pytest.mark.slow
def test_sft_runs_from_the_folder_of_its_script(tmp_path, shell):
    Trainer(tmp_path)(max_steps=1)
    sft = Trainer(tmp_path, train_full_sft)
    settings = sft.settings(from_weight="pretrain", epochs=1, val_share=0.2)
    del settings["device"], settings["num_workers"], settings["num_hidden_layers"]
    words = ["train_full_sft.py", *flags(settings)]
    printed = output(shell(*words, cwd=ROOT / "trainer"))
    assert "eval_bpb" in printed and "Who are you? ▸" in printed
    assert (tmp_path / "a" / "out" / "full_sft_32.pth").exists()
