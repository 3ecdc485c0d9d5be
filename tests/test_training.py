"""Training: the verbs of `Run`, and pretraining and SFT from end to end on a tiny model."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from dataset.lm_dataset import CACHE, encode_chat, encode_text, load_documents, token_bytes
from dataset.packing import Rows
from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, SwiGLU
from model.weights import ROOT
from trainer import hardware, train_full_sft, train_pretrain, trainer_utils
from trainer.evaluation import answer, continuation, held_out_loss
from trainer.optimizers import learning_rate_factor, make_optimizer, split_parameters
from trainer.plots import plot_losses
from trainer.trainer_utils import BAD_STEPS, Run, TrainArgs, read_rows, starting_model

LN_V = math.log(6400)
TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    device="cpu",
    num_workers=0,
    max_seq_len=32,
    packing=False,  # so that there are as many rows as documents
    batch_size=2,
    accumulation_steps=1,
    learning_rate=1e-3,
    warmup_steps=2,
    val_share=0.0,
    log_interval=1,
    save_interval=0,
)
TEXTS = ["one two three " * (1 + n % 5) + str(n) for n in range(24)]
CHATS = [
    [{"role": "user", "content": f"{n} + 1 =" + " please" * (n % 3)}]
    + [{"role": "assistant", "content": f"{n + 1}" + " indeed" * (n % 4)}]
    for n in range(12)
]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    """No time is spent on measuring this machine, on drawing, or on waiting for its disk."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(trainer_utils, "plot_losses", lambda runs, path: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def text_file(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def chat_file(path, chats=CHATS):
    path.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    return str(path)


class Trainer:
    """Trainings in a folder each: train("a", seed=1), then saved("a"), log("a")."""

    def __init__(self, folder, stage=train_pretrain):
        self.folder, self.stage = folder, stage
        make = text_file if stage is train_pretrain else chat_file
        self.data = make(folder / "data.jsonl")

    def settings(self, name, **changes):
        places = dict(
            data_path=[self.data],
            save_dir=str(self.folder / name / "out"),
            checkpoint_dir=str(self.folder / name / "checkpoints"),
        )
        return {**TINY, **places, **changes}

    def __call__(self, name="a", **changes):
        return self.stage.main(self.stage.Args(**self.settings(name, **changes)))

    def saved(self, name="a"):
        (path,) = (self.folder / name / "checkpoints").glob("*.checkpoint.pt")
        return torch.load(path, weights_only=True)

    def log(self, name="a", kind="loss"):
        (path,) = (self.folder / name / "out").glob("*.metrics.jsonl")
        records = map(json.loads, path.read_text().splitlines())
        return [record for record in records if kind in record]


@pytest.fixture
def train(tmp_path):
    return Trainer(tmp_path)


@pytest.fixture
def trajectory(monkeypatch):
    """The weights after each update, in memory instead of files; train() empties it first."""
    states = []

    def remember(run, model, optimizer, tokenizer):
        if run.step == 1:
            states.clear()
        state = trainer_utils.unwrapped(model).state_dict()
        states.append({name: tensor.clone() for name, tensor in state.items()})

    monkeypatch.setattr(Run, "save_every", remember)
    return states


def same(a, b) -> bool:
    """Whether nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -- one update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_how_a_window_is_cut_into_batches_changes_nothing(tmp_path, trajectory, stage):
    train = Trainer(tmp_path, stage)
    seen = []
    for batch_size, steps in ((8, 1), (1, 8), (4, 2)):
        window = dict(batch_size=batch_size, accumulation_steps=steps, max_steps=3, epochs=3)
        records = train(from_weight="none", **window)["records"]
        figures = [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]
        seen.append((np.array(figures), trajectory[-1]))
    (figures, weights), *others = seen
    assert len(figures) == 3
    for their_figures, their_weights in others:
        np.testing.assert_allclose(their_figures, figures, atol=2e-4)
        assert_close(their_weights, weights)


def test_the_loss_of_an_update_is_the_mean_over_its_tokens(train, tokenizer):
    """Not over rows or micro-batches, which hold different numbers of them."""
    args = train_pretrain.Args(**train.settings("a", batch_size=1, accumulation_steps=24))
    model = starting_model(args, tokenizer)
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([encode_text(tokenizer, text).ids])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
        total -= log_p.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    (record,) = train_pretrain.main(args)["records"]
    assert record["loss"] == pytest.approx(total / count, abs=2e-4)
    assert record["tokens"] == count + len(TEXTS)


def test_gradient_checkpointing_computes_twice_and_changes_nothing(train, trajectory, monkeypatch):
    calls, forward = [], SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda *args: calls.append(1) or forward(*args))
    train(max_steps=2)
    expected, once = trajectory[-1], len(calls)
    train(max_steps=2, gradient_checkpointing=True)
    assert_close(trajectory[-1], expected, 1e-7)
    assert len(calls) - once == 2 * once


def test_an_untrained_model_guesses(train):
    assert train(max_steps=1)["records"][0]["loss"] == pytest.approx(LN_V, abs=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(train, optimizer):
    records = train(optimizer=optimizer, epochs=8, learning_rate=1e-2, packing=True, batch_size=4)[
        "records"
    ]
    assert records[0]["loss"] > 8 and records[-1]["loss"] < 3


@pytest.mark.parametrize(("limit", "clipped"), [(0.05, True), (0.0, False), (1e6, False)])
def test_the_gradient_is_no_longer_than_grad_clip(train, monkeypatch, limit, clipped):
    norms, step = [], torch.optim.AdamW.step

    def measured(self):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    records = train(grad_clip=limit, max_steps=3)["records"]
    logged = [record["grad_norm"] for record in records]
    assert min(logged) > 0.05
    assert norms == pytest.approx([limit] * 3 if clipped else logged, abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_group_follows_the_schedule(train, monkeypatch, optimizer):
    rates, update = [], Run.update

    def watched(self, model, optimizer):
        update(self, model, optimizer)
        rates.append({group["lr"] for group in optimizer.param_groups})

    monkeypatch.setattr(Run, "update", watched)
    records = train(optimizer=optimizer, max_steps=6, lr_schedule="cosine")["records"]
    expected = [1e-3 * learning_rate_factor("cosine", step, 6, 2) for step in range(6)]
    assert [rate for (rate,) in rates] == pytest.approx(expected)
    assert [record["lr"] for record in records] == pytest.approx(expected)


BY_HAND = {  # (schedule, steps, warmup): the factor of each step
    ("constant", 4, 0): [1, 1, 1, 1],
    ("constant", 4, 3): [1 / 4, 2 / 4, 3 / 4, 1],
    ("trapezoid", 8, 0): [1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    ("trapezoid", 8, 1): [1 / 2, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    ("trapezoid", 4, 9): [1 / 10, 2 / 10, 3 / 10, 4 / 10],
    ("cosine", 4, 0): [1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)],
    ("cosine", 2, 1): [1 / 2, 0.55],
}


@pytest.mark.parametrize(("case", "factors"), BY_HAND.items())
def test_the_schedules_by_hand(case, factors):
    schedule, steps, warmup = case
    ours = [learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]
    assert ours == pytest.approx(factors)


# -- optimizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"tie_word_embeddings": False}])
def test_every_parameter_is_in_one_group(make_model, fields):
    model = make_model(**fields)
    groups = split_parameters(model)
    ids = [id(parameter) for group in groups.values() for parameter in group]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert len(groups["matrices"]) == 7 * 2
    assert all(parameter.dim() == 1 for parameter in groups["vectors"])
    assert {parameter.shape for parameter in groups["embedding"]} == {(128, 64)}


def test_what_is_frozen_is_not_trained(make_model):
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    groups = split_parameters(model)
    assert len(groups["matrices"]) == 7 and len(groups["vectors"]) == 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_only(make_model, name):
    model = make_model()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = make_optimizer(model, name, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if "_proj" in key else 1
        assert_close(parameter.detach(), before[key] * factor)


def test_muon_moves_a_matrix_as_far_as_adamw(make_model):
    """The root mean square of an update is about 0.2 · learning rate."""
    model = make_model()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = make_optimizer(model, "muon", learning_rate=0.1, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = (model.model.layers[0].mlp.up_proj.weight - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.02, rel=0.25)


# -- not finite ------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """The gradient of these steps is not a number."""

    def at(*steps):
        backward = Run.backward
        monkeypatch.setattr(
            Run,
            "backward",
            lambda run, loss: backward(run, loss * math.nan if run.step in steps else loss),
        )

    return at


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_that_is_not_finite_changes_nothing(train, trajectory, poison, capsys, optimizer):
    poison(3)
    records = train(optimizer=optimizer, max_steps=5)["records"]
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1]
    assert "step 3: the gradient is not finite" in capsys.readouterr().out
    assert same(trajectory[2], trajectory[1]) and not same(trajectory[3], trajectory[2])
    assert all(tensor.isfinite().all() for tensor in trajectory[-1].values())


def test_several_in_a_row_end_the_run(train, trajectory, poison):
    poison(*range(3, 99))
    with pytest.raises(
        UserError, match=f"{BAD_STEPS} updates .* step {BAD_STEPS + 2}; try a lower"
    ):
        train()
    assert same(trajectory[-1], trajectory[1])


def test_several_that_are_not_in_a_row_do_not(train, poison):
    poison(1, 2, 3, 4, 6, 7, 8, 9)
    assert train(max_steps=10)["records"][-1]["skipped"] == 8


def test_a_broken_weight_ends_the_run(train, monkeypatch):
    def broken(*args):
        model = starting_model(*args)
        model.model.norm.weight.data[3] = math.inf
        return model

    monkeypatch.setattr(train_pretrain, "starting_model", broken)
    with pytest.raises(UserError, match="were not finite"):
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
    train.data = chat_file(tmp_path / "long.jsonl", [[question, CHATS[0][1]]])
    records = train(from_weight="none", batch_size=1, max_seq_len=16)["records"]
    assert records[-1]["skipped"] == 0
    assert all(math.isfinite(record["loss"]) for record in records)


# -- resuming --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Run something until `step` is done (and saved, where that is due), and no further."""

    def until(step, call, *args, **settings):
        with monkeypatch.context() as patch:
            save_every = Run.save_every

            def die(run, *everything):
                save_every(run, *everything)
                if run.step == step:
                    raise Killed

            patch.setattr(Run, "save_every", die)
            try:
                call(*args, **settings)
            except Killed:
                return
        pytest.fail(f"there was no step {step}")

    return until


TIMES = ("seconds", "tokens_per_second", "mfu", "memory_gb")


def timeless(records):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def everything(train, name):
    """All that must be the same after a run that was interrupted and one that was not."""
    saved = train.saved(name)
    return [
        *(saved[key] for key in ("model", "optimizer")),
        *(saved["progress"][key] for key in ("step", "rows_seen", "tokens", "evaluation")),
        timeless(saved["records"]),
        timeless(train.log(name)),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        dict(optimizer="adamw"),
        dict(optimizer="muon"),
        dict(optimizer="adamw", num_workers=2),
        dict(optimizer="adamw", dropout=0.2),
        dict(optimizer="muon", dropout=0.2),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(train, killed, settings):
    """7 rows in windows of 2·2 and two epochs: 4 updates, the 2nd and 4th with a rest of rows."""
    train.data = text_file(train.folder / "few.jsonl", TEXTS[:7])
    held_out = text_file(train.folder / "val.jsonl", TEXTS[7:10])
    common = dict(accumulation_steps=2, epochs=2, lr_schedule="cosine", eval_interval=2)
    common |= dict(val_path=[held_out], save_interval=1, log_interval=2, **settings)
    train("whole", **common)
    whole = everything(train, "whole")
    assert train.saved("whole")["progress"]["step"] == 4
    for step in (1, 2, 3):
        killed(step, train, str(step), **common)
        assert train.saved(str(step))["progress"]["step"] == step
        train(str(step), resume=True, **common)
        assert same(everything(train, str(step)), whole)


def test_what_came_after_the_checkpoint_is_done_and_logged_once(train, killed):
    common = dict(max_steps=6, save_interval=2)
    train("whole", **common)
    killed(5, train, "a", **common)
    assert [record["step"] for record in train.log("a")] == [1, 2, 3, 4, 5]
    train("a", resume=True, **common)
    assert [record["step"] for record in train.log("a")] == [1, 2, 3, 4, 5, 6]
    assert same(everything(train, "a"), everything(train, "whole"))


def test_sft_resumes_as_well(tmp_path, killed):
    train = Trainer(tmp_path, train_full_sft)
    common = dict(from_weight="none", epochs=2, packing=True, save_interval=1)
    train("whole", **common)
    killed(3, train, "a", **common)
    train("a", from_resume=True, **common)
    assert same(everything(train, "a"), everything(train, "whole"))


def test_a_run_may_go_on_with_other_batches_of_the_same_window(train, killed):
    common = dict(max_steps=4, save_interval=1)
    train("whole", batch_size=4, **common)
    killed(2, train, "a", batch_size=4, **common)
    train("a", resume=True, batch_size=1, accumulation_steps=4, num_workers=1, **common)
    assert_close(train.saved("a")["model"], train.saved("whole")["model"])


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_run_that_goes_on_with_another_window_trains_every_row(train, killed, batch_size):
    killed(8, train, batch_size=2, save_interval=8)
    step = train(resume=True, batch_size=batch_size)["step"]
    assert step == 8 + math.ceil((len(TEXTS) - 16) / batch_size)
    progress = train.saved()["progress"]
    assert (progress["rows_seen"], progress["step"]) == (len(TEXTS), step)


def test_a_run_that_goes_on_with_another_window_does_not_call_itself_finished(
    train, killed, capsys
):
    killed(8, train, batch_size=2, save_interval=8)
    capsys.readouterr()
    train(resume=True, batch_size=4)
    assert "at step 8 of 10: going on" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A finished run, for attempts to resume it."""
    train = Trainer(tmp_path_factory.mktemp("stopped"))
    cache = train.folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(load_documents.__kwdefaults__, "cache", cache)
        train(max_steps=2)
    return train


@pytest.mark.parametrize(
    ("change", "then", "now"),
    [
        (dict(learning_rate=0.5), "0.001", "0.5"),
        (dict(seed=7), "42", "7"),
        (dict(max_steps=3), "2", "3"),
        (dict(epochs=9), "1", "9"),
        (dict(optimizer="muon"), "'adamw'", "'muon'"),
        (dict(packing=True), "False", "True"),
        (dict(num_hidden_layers=1), "2", "1"),
        (dict(dropout=0.5), "0.0", "0.5"),
    ],
    ids=str,
)
def test_another_run_is_not_resumed(stopped, change, then, now):
    before = stopped.log()
    (name,) = change
    sentence = f"was made with {name} {then}, and this run has {now}; give the same, or start anew"
    with pytest.raises(UserError, match=re.escape(sentence)):
        stopped(resume=True, **{"max_steps": 2, **change})
    assert stopped.log() == before


def test_other_data_is_not_resumed(train):
    train(max_steps=2)
    text_file(train.folder / "data.jsonl", TEXTS[1:])
    with pytest.raises(UserError, match="was made with data '[0-9a-f]{16}', and this run has"):
        train(max_steps=2, resume=True)


def test_a_finished_run_stays_as_it_is(train, capsys):
    train(max_steps=2, dropout=0.1)
    before = everything(train, "a")
    files = {path: path.read_bytes() for path in (train.folder / "a").rglob("*.pth")}
    capsys.readouterr()
    metrics = train(max_steps=2, dropout=0.1, resume=True)
    assert "at step 2 of 2: the run is finished already" in capsys.readouterr().out
    assert metrics["step"] == 2 and len(files) == 1
    assert same(everything(train, "a"), before)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_without_a_checkpoint_it_starts_from_the_beginning_and_says_so(train, capsys):
    assert train(max_steps=1, resume=True)["step"] == 1
    assert "to resume: starting from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut off", "empty", "something else"])
def test_a_damaged_checkpoint_is_named(train, damage):
    train(max_steps=2)
    (path,) = (train.folder / "a" / "checkpoints").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"")
    if damage == "something else":
        torch.save({"model": {}}, path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        train(max_steps=2, resume=True)


def test_a_new_run_begins_a_new_log(train):
    train(max_steps=3)
    train(max_steps=2)
    assert [record["step"] for record in train.log()] == [1, 2]


def test_a_run_that_died_between_its_last_two_files_gets_both(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer_utils, "save_weights", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(max_steps=1)
    train(max_steps=1, resume=True)
    assert list((train.folder / "a" / "out").glob("*.pth"))


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_update_saves_it_and_leaves(train, monkeypatch, capsys, number):
    update = Run.update

    def interrupted(run, *args):
        if run.step == 2:
            signal.raise_signal(number)
        update(run, *args)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train("whole", max_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", interrupted)
        step = train(max_steps=5)["step"]
    assert step in (2, 3)  # at once, or with the next one
    assert f"stopped at step {step}; --resume goes on from there" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert train.saved()["progress"]["step"] == step
    train(max_steps=5, resume=True)
    assert same(everything(train, "a"), everything(train, "whole"))


def test_a_signal_between_updates_saves_too(train, monkeypatch):
    save_every = Run.save_every

    def interrupted(run, *args):
        save_every(run, *args)
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "save_every", interrupted)
    step = train(max_steps=5)["step"]
    assert train.saved()["progress"]["step"] == step < 5


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_signal_while_the_ranks_agree_is_not_lost(train, monkeypatch, call):
    """They add up numbers in every window, and may wait for each other then."""
    calls = []

    def interrupted(run, *numbers):
        calls.append(numbers)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return list(numbers)

    monkeypatch.setattr(Run, "sum_over_ranks", interrupted)
    assert train(max_steps=5)["step"] < 5


# -- evaluation ------------------------------------------------------------------------------------


def by_hand(model, tokenizer, documents):
    """Loss and bits per byte, document by document and token by token."""
    sizes, nats, text_nats, size, count = token_bytes(tokenizer), 0.0, 0.0, 0, 0
    for document in documents:
        log_p = model(torch.tensor([document.ids])).logits[0].log_softmax(-1)
        for place in range(1, len(document.ids)):
            if not document.trained[place]:
                continue
            token = document.ids[place]
            loss = -log_p[place - 1, token].item()
            nats, count = nats + loss, count + 1
            if token > 2:  # the control tokens are 0, 1 and 2
                text_nats, size = text_nats + loss, size + int(sizes[token])
    return {"val_loss": nats / count, "val_bpb": text_nats / math.log(2) / size}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_held_out_loss_by_hand(tmp_path, tokenizer, make_model, kind, packing):
    if kind == "text":
        path, documents = text_file(tmp_path / "t"), [encode_text(tokenizer, t) for t in TEXTS]
    else:
        path, documents = chat_file(tmp_path / "c"), [encode_chat(tokenizer, c) for c in CHATS]
    model = make_model(vocab_size=6400, dropout=0.5).train()
    run = Run(TrainArgs(batch_size=3, device="cpu"), "test", model.config)
    rows = Rows(load_documents(path, kind, tokenizer), 40, packing=packing)
    figures = held_out_loss(run, model, rows, tokenizer)
    assert model.training
    assert figures == pytest.approx(by_hand(model.eval(), tokenizer, documents), rel=1e-4)


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path, tokenizer, make_model):
    """A model that knows nothing spends log2(V) bits a token."""
    model = make_model(vocab_size=6400, initializer_range=1e-6)
    run = Run(TrainArgs(device="cpu"), "test", model.config)
    rows = Rows(load_documents(text_file(tmp_path / "t"), "text", tokenizer), 40)
    tokens = sum(len(encode_text(tokenizer, text).ids) - 2 for text in TEXTS)
    expected = tokens * math.log2(6400) / len("".join(TEXTS).encode())
    assert held_out_loss(run, model, rows, tokenizer)["val_bpb"] == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_evaluating_does_not_change_what_is_trained(tmp_path, trajectory, stage):
    train = Trainer(tmp_path, stage)
    common = dict(from_weight="none", val_path=[train.data], dropout=0.2, max_steps=4)
    often = train(eval_interval=1, **common)["records"]
    weights = trajectory[-1]
    seldom = train(eval_interval=0, **common)["records"]
    assert sum("val_bpb" in record for record in often) == 4
    assert sum("val_bpb" in record for record in seldom) == 1
    assert same(weights, trajectory[-1])
    assert timeless(often)[-2:] == timeless(seldom)[-2:]  # the last evaluation, the last loss


def test_samples_are_texts_of_the_model(tmp_path, tokenizer, make_model):
    model = make_model(vocab_size=6400, dropout=0.9).train()
    run = Run(TrainArgs(device="cpu"), "test", model.config)
    rows = Rows(load_documents(text_file(tmp_path / "t"), "text", tokenizer), 40)
    first = continuation(run, model, tokenizer, rows, length=5)
    assert first == continuation(run, model, tokenizer, rows, length=5)
    begun, continued = first.split(" ▸")
    assert begun and any(text.startswith(begun) for text in TEXTS) and continued
    assert answer(run, model, tokenizer, "Who?", length=5).startswith("Who? ▸ ")
    assert model.training


def rows_of(train, tokenizer, **changes):
    args = train_pretrain.Args(**train.settings("a", **changes))
    return read_rows(Run(args, "test", MiniMindConfig()), "text", tokenizer)


def test_what_is_held_out_is_not_trained_and_always_the_same(train, tokenizer):
    rows, held_out = rows_of(train, tokenizer, val_share=0.2)
    assert len(held_out.chosen) == math.ceil(24 * 0.2)
    assert sorted([*rows.chosen, *held_out.chosen]) == list(range(24))
    again, still_out = rows_of(train, tokenizer, val_share=0.2, seed=7, packing=True)
    assert still_out.chosen.tolist() == held_out.chosen.tolist()
    _, fewer = rows_of(train, tokenizer, val_share=0.2, val_documents=2)
    assert len(fewer.chosen) == 2 and set(fewer.chosen) < set(held_out.chosen)


def test_a_separate_file_leaves_all_data_to_training(train, tokenizer):
    other = text_file(train.folder / "val.jsonl", TEXTS[:3])
    rows, held_out = rows_of(train, tokenizer, val_share=0.2, val_path=[other])
    assert (len(rows.chosen), len(held_out.chosen)) == (24, 3)
    assert rows_of(train, tokenizer, val_share=0.0)[1] is None


@pytest.mark.parametrize(
    ("texts", "share", "complaint"),
    [(["one two"], 0.5, "one document only"), ([], 0.0, "holds no documents")],
)
def test_too_little_data_is_said_to_be_so(train, tokenizer, texts, share, complaint):
    train.data = text_file(train.folder / "little.jsonl", texts)
    with pytest.raises(UserError, match=complaint):
        rows_of(train, tokenizer, val_share=share)


# -- what a run leaves behind ----------------------------------------------------------------------


def test_a_run_leaves_weights_log_and_curves(train, monkeypatch, capsys):
    monkeypatch.setattr(trainer_utils, "plot_losses", plot_losses)
    train(max_steps=4, val_share=0.2, eval_interval=2)
    out = train.folder / "a" / "out"
    assert {path.name for path in out.iterdir()} == {
        *("pretrain_32.pth", "pretrain_32.json"),
        *("pretrain_32.metrics.jsonl", "pretrain_32.loss.png"),
    }
    picture = (out / "pretrain_32.loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000
    info = json.loads((out / "pretrain_32.json").read_text())
    assert info["stage"] == "pretrain" and info["config"]["hidden_size"] == 32
    assert info["origin"]["steps"] == 4 and info["origin"]["args"]["batch_size"] == 2
    assert info["origin"]["val_bpb"] == train.log(kind="val_bpb")[-1]["val_bpb"]
    (state, full) = torch.load(out / "pretrain_32.pth", weights_only=True), train.saved()["model"]
    assert all(state[name].dtype == torch.float16 for name in full)
    assert all(torch.equal(state[name], tensor.half()) for name, tensor in full.items())
    assert [record["step"] for record in train.log(kind="val_bpb")] == [2, 4]
    assert [record["step"] for record in train.log()] == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    for expected in ("0.24M parameters", "4 steps of 2 rows", "ln 6400 = 8.76", "memory: about"):
        assert expected in printed


def test_intervals_decide_when_something_is_logged(train):
    train(max_steps=7, log_interval=3)
    records = train.log()
    assert [record["step"] for record in records] == [1, 3, 6, 7]
    every = train("b", max_steps=7)["records"]
    losses = [record["loss"] for record in every]
    means = [losses[0], np.mean(losses[1:3]), np.mean(losses[3:6]), losses[6]]
    assert [record["loss"] for record in records] == pytest.approx(means, abs=2e-4)
    assert records[-1]["tokens"] == every[-1]["tokens"]


def test_sft_begins_with_the_weights_of_pretraining(tmp_path, tokenizer):
    Trainer(tmp_path)(max_steps=2)
    sft = Trainer(tmp_path, train_full_sft)
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    args = train_full_sft.Args(**sft.settings("a", **sizes, dropout=0.1))
    model = starting_model(args, tokenizer)
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
    assert same(starting_model(by_path, tokenizer).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(), "there are no weights .*pretrain_32.pth; train that stage first"),
        (dict(from_weight="dpo", hidden_size=None), r"there are no weights .*dpo_\*.pth"),
        (dict(from_weight="none", hidden_size=30), "do not make a model: hidden_size 30"),
        (dict(from_weight="none", num_key_value_heads=3), "do not make a model: num_attention"),
        (dict(from_weight="none", device="gpu"), "--device gpu is unknown"),
        (dict(from_weight="none", device="cuda:99"), "CUDA|no GPU 99"),
        (dict(from_weight="none", device="meta"), "--device meta is not supported"),
        (dict(from_weight="none", data_path=["nowhere.jsonl"]), "nowhere.jsonl does not exist"),
        (dict(from_weight="none", tokenizer_path="nowhere"), "no tokenizer.json in nowhere"),
        (dict(from_weight="none", num_attention_heads=0), "do not make a model: num_attention_h"),
        (dict(from_weight="none", num_key_value_heads=0), "do not make a model: num_key_value_h"),
        (dict(from_weight="none", num_hidden_layers=0), "do not make a model: num_hidden_layers"),
        (dict(from_weight="none", hidden_size=-32), "do not make a model: hidden_size"),
        (dict(from_weight="none", seed=-1), "--seed must not be negative"),
    ],
    ids=str,
)
def test_a_run_that_cannot_begin_says_why(tmp_path, changes, complaint):
    train = Trainer(tmp_path, train_full_sft)
    with pytest.raises(UserError, match=complaint):
        train(max_steps=1, **changes)
    assert not (tmp_path / "a").exists()  # nothing half-written


BAD_VALUES = [
    *[(name, value) for name in ("epochs", "batch_size", "log_interval") for value in (0, -1)],
    *[("accumulation_steps", 0), ("learning_rate", 0.0), ("learning_rate", -1e-4)],
    *[("max_seq_len", 0), ("max_seq_len", 1)],
    *[(name, -1) for name in ("max_steps", "warmup_steps", "eval_interval", "save_interval")],
    *[("weight_decay", -0.1), ("grad_clip", -1.0), ("num_workers", -1), ("val_documents", -1)],
    *[("val_share", -0.1), ("val_share", 1.0), ("dropout", -0.1), ("dropout", 1.0)],
    ("use_moe", True),
    ("learning_rate", math.nan),
    ("learning_rate", math.inf),
    ("grad_clip", math.nan),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"--{name} "):
        TrainArgs(**{name: value})


def test_a_tracker_that_is_not_installed_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError, match="swanlab is not installed; `pip install swanlab`"):
        train(use_wandb=True, tracker="swanlab")


def test_a_tracker_gets_every_line_and_the_same_run_after_a_stop(train, killed, monkeypatch):
    calls, lines = [], []

    def init(**settings):
        calls.append(settings)
        return SimpleNamespace(id="run-1")

    def log(numbers, step):
        lines.append((step, numbers["loss"]))

    fake = SimpleNamespace(init=init, log=log, finish=lambda: lines.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    common = dict(use_wandb=True, max_steps=3, save_interval=1)
    killed(2, train, **common)
    records = train(resume=True, **common)["records"]
    assert [call["id"] for call in calls] == [None, "run-1"]
    assert calls[0]["project"] == "MiniMind" and calls[0]["config"]["batch_size"] == 2
    assert lines == [(record["step"], record["loss"]) for record in records] + ["finish"]


# -- the machine -----------------------------------------------------------------------------------


def test_operations_of_a_token_by_hand():
    """Six for each number of a matrix (the tied one counts as the head), and attention's."""
    config = MiniMindConfig()
    model = MiniMindForCausalLM(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert hardware.flops_per_token(config, 0) == 6 * matrices
    # scores and values: 2 products of 512 numbers with half of 100 positions, 3 times, 8 layers
    assert hardware.flops_per_token(config, 100) - 6 * matrices == 2 * 2 * 512 * 50 * 3 * 8


def test_half_precision_is_for_cuda():
    assert hardware.resolve_dtype("bfloat16", torch.device("cpu")) == torch.float32
    assert hardware.resolve_device("cpu").type == "cpu"


# -- command lines ---------------------------------------------------------------------------------

SCRIPTS = [train_pretrain, train_full_sft]


@pytest.fixture
def command(monkeypatch, capsys):
    """A trainer's script, run in this process: (exit code, what it prints)."""

    def call(stage, *arguments):
        monkeypatch.setattr(sys, "argv", [stage.__file__, *arguments])
        try:
            runpy.run_path(stage.__file__, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return call


def flags(settings) -> list[str]:
    words = []
    for name, value in settings.items():
        words.append(f"--{name}")
        words += [str(each) for each in (value if isinstance(value, list) else [value])]
    return words


@pytest.mark.parametrize("stage", SCRIPTS)
def test_help_lists_every_flag_with_a_line(command, stage):
    code, printed = command(stage, "--help")
    assert code == 0
    assert stage.__doc__.splitlines()[0] in printed.out
    for name, each in stage.Args.__dataclass_fields__.items():
        assert f"--{name}" in printed.out
        assert len(each.metadata["help"]) > 5


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--bogus 1", "unknown argument --bogus"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--optimizer sgd", "argument --optimizer: invalid choice"),
        ("--batch_size 0", "--batch_size must be more than 0, not 0"),
        ("--data_path nowhere.jsonl --from_weight none", "nowhere.jsonl does not exist"),
        ("--from_weight nothing", "there are no weights .*nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, stage, arguments, complaint):
    folders = [
        "--save_dir",
        str(tmp_path / "out"),
        "--checkpoint_dir",
        str(tmp_path / "checkpoints"),
    ]
    code, printed = command(stage, *arguments.split(), *folders, "--device", "cpu")
    assert code == 2
    assert re.fullmatch(f"error: .*{complaint}.*\n", printed.err)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shell(tokenizer):
    """Start a program as a person does. What it put into the project's cache is removed."""
    started, used = [], []

    def start(*words, reads, kind="text", cwd=ROOT) -> subprocess.Popen:
        used.extend((path, kind) for path in reads)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, **pipe))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # and torchrun's workers with it
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
            process.wait()
    for path, kind in set(used):
        for file in load_documents(path, kind, tokenizer, cache=CACHE).cache_files:
            Path(file["filename"]).unlink()
            Path(file["filename"]).with_suffix(".sha256").unlink()


def output(process) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


TORCHRUN = (
    "-m torch.distributed.run --standalone --nproc_per_node 2 trainer/train_pretrain.py".split()
)


@pytest.mark.slow
def test_two_ranks_train_like_one_process(train, shell, killed):
    """Windows of 4 and 3 rows, so that the second rank gets a filler; from nothing, and on from
    a checkpoint of one process."""
    train.data = text_file(train.folder / "seven.jsonl", TEXTS[:7])
    held_out = text_file(train.folder / "val.jsonl", TEXTS[7:10])
    common = dict(batch_size=1, epochs=2, val_path=[held_out], eval_interval=2)
    train("one", accumulation_steps=4, **common)
    killed(2, train, "on", accumulation_steps=4, **common, save_interval=2)
    two = dict(accumulation_steps=2, **common)
    for name, more in (("two", []), ("on", ["--resume"])):
        words = [*TORCHRUN, *flags(train.settings(name, **two)), *more]
        printed = output(shell(*words, reads=[train.data, held_out]))
        assert "2 processes" in printed
        assert_close(train.saved(name)["model"], train.saved("one")["model"])
        assert len(train.saved(name)["random"]) == 2
        for kind, names in (("loss", ["loss", "grad_norm", "tokens"]), ("val_bpb", ["val_bpb"])):
            logs = [
                [[record[key] for key in ("step", *names)] for record in train.log(which, kind)]
                for which in (name, "one")
            ]
            np.testing.assert_allclose(*logs, atol=2e-4)


def wait_for_steps(process, settings):
    log = Path(settings["save_dir"]) / "pretrain_32.metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, output(process)
        time.sleep(0.05)


@pytest.mark.slow
def test_all_ranks_end_together_when_one_is_told_to(train, shell):
    settings = train.settings("a", epochs=5000)
    process = shell(*TORCHRUN, *flags(settings), reads=[train.data])
    wait_for_steps(process, settings)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped at step (\d+); --resume", output(process))[1])
    assert train.saved("a")["progress"]["step"] == step == train.log("a")[-1]["step"]


@pytest.mark.slow
def test_a_program_that_is_told_to_end_saves_and_can_go_on(train, shell, killed, tokenizer):
    settings = train.settings("a", epochs=5000, num_workers=1)
    words = ["train_pretrain.py", *flags(settings)]
    process = shell(*words, cwd=ROOT / "trainer", reads=[train.data])
    wait_for_steps(process, settings)
    process.send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped at step (\d+); --resume", output(process))[1])
    assert train.saved("a")["progress"]["step"] == step == train.log("a")[-1]["step"]
    going_on = dict(epochs=5000, save_interval=step + 2)
    killed(step + 2, train, "a", resume=True, **going_on)
    killed(step + 2, train, "whole", **going_on)
    assert same(train.saved("a")["model"], train.saved("whole")["model"])
    assert [record["step"] for record in train.log("a")] == list(range(1, step + 3))


@pytest.mark.slow
def test_sft_runs_from_the_folder_of_its_script(tmp_path, shell):
    Trainer(tmp_path)(max_steps=1)
    sft = Trainer(tmp_path, train_full_sft)
    settings = sft.settings("a", epochs=1, val_share=0.2)
    del settings["device"], settings["num_workers"], settings["num_hidden_layers"]
    words = ["train_full_sft.py", *flags(settings)]
    printed = output(shell(*words, cwd=ROOT / "trainer", reads=[sft.data], kind="conversations"))
    assert "val_bpb" in printed and "Who are you? ▸" in printed
    assert (tmp_path / "a" / "out" / "full_sft_32.pth").exists()
