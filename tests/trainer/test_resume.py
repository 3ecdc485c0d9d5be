"""Resuming: a run that stopped between steps or at a signal ends as if nothing had been."""

import math
import re
import signal

import pytest
import torch
from toy import (
    TEXTS,
    Trainer,
    assert_close,
    everything,
    flags,
    output,
    same,
    text_file,
    timeless,
    wait_for_steps,
)

from dataset.lm_dataset import load_documents
from model.errors import UserError
from model.weights import ROOT
from trainer import train_full_sft, trainer_utils
from trainer.common import hardware, loop
from trainer.common.context import Context
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")


# -- stopped between steps -------------------------------------------------------------------------


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
    """7 rows in windows of 2·2 and two epochs: 4 steps, the 2nd and 4th with a rest of rows."""
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


def test_a_run_whose_updates_grow_goes_on_with_the_right_one(train, killed, monkeypatch):
    """24 rows of 13 tokens in steps of 2, 2, 2, 2, 4, 6 and the rest of 6."""
    monkeypatch.setattr(loop, "INITIAL_BATCH_TOKENS", 26)
    common = dict(batch_size=4, accumulation_steps=2, batch_ramp=2, save_interval=1)
    train("whole", **common)
    assert [record["step"] for record in train.log("whole")] == list(range(1, 8))
    for step in (2, 5):
        killed(step, train, str(step), **common)
        train(str(step), resume=True, **common)
        assert same(everything(train, str(step)), everything(train, "whole"))


def test_what_came_after_the_checkpoint_is_done_and_logged_once(train, killed):
    common = dict(max_steps=6, save_interval=2)
    train("whole", **common)
    killed(5, train, "a", **common)
    assert [record["step"] for record in train.log("a")] == [1, 2, 3, 4, 5]
    train("a", resume=True, **common)
    assert [record["step"] for record in train.log("a")] == [1, 2, 3, 4, 5, 6]
    assert same(everything(train, "a"), everything(train, "whole"))


def test_from_resume_is_resume(train, killed):
    killed(3, train, save_interval=1)
    assert train(from_resume=True, max_steps=0)["step"] == len(TEXTS) / 2
    assert [record["step"] for record in train.log()] == list(range(1, len(TEXTS) // 2 + 1))


def test_a_new_run_overwrites_no_unfinished_one(train, killed, capsys):
    killed(5, train, save_interval=2)
    log = (train.folder / "a/out/pretrain_32.metrics.jsonl").read_text()
    files = {path: path.read_bytes() for path in train.folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="unfinished run, at step 4: --resume goes on.*--force 1"):
        train()
    assert files == {path: path.read_bytes() for path in train.folder.rglob("*") if path.is_file()}
    train(force=True)
    kept = train.folder / "a/out/pretrain_32.metrics.before.jsonl"
    assert kept.read_text() == log and str(kept) in capsys.readouterr().out
    train()  # a finished one may be repeated
    assert "beginning anew over a finished run" in capsys.readouterr().out
    assert [record["step"] for record in train.log()] == list(range(1, len(TEXTS) // 2 + 1))


def test_a_checkpoint_without_its_number_of_steps_is_compared_with_this_run(train, killed):
    """As they were until 2026-11."""
    killed(5, train, save_interval=2)
    path = train.folder / "a/checkpoints/pretrain_32.checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["total_steps"]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="unfinished run, at step 4"):
        train()
    train(max_steps=4)


@pytest.mark.parametrize("change", [dict(epochs=3), dict(learning_rate=1e-5), dict(max_steps=99)])
def test_another_schedule_is_another_run(train, change):
    train()
    told = "begin a new run.*: --from_weight pretrain --save_weight pretrain_2 without --resume"
    with pytest.raises(UserError, match=told):
        train(resume=True, **change)
    train(from_weight="pretrain", save_weight="pretrain_2", **change)


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
    assert (progress["samples_seen"], progress["step"]) == (len(TEXTS), step)


def test_a_run_that_goes_on_with_another_window_does_not_call_itself_finished(
    train, killed, capsys
):
    killed(8, train, batch_size=2, save_interval=8)
    capsys.readouterr()
    train(resume=True, batch_size=4)
    printed = capsys.readouterr().out
    assert "at step 8 of 10: going on" in printed
    assert "warning: a full step has 4 samples now, and had 2" in printed


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
        (dict(optimizer="adamw"), "'muon'", "'adamw'"),
        (dict(packing=True), "False", "True"),
        (dict(batch_ramp=9), "0", "9"),
        (dict(lr_schedule="cosine"), "'linear'", "'cosine'"),
        (dict(num_hidden_layers=1), "2", "1"),
        (dict(dropout=0.5), "0.0", "0.5"),
    ],
    ids=str,
)
def test_another_run_is_not_resumed(stopped, change, then, now):
    before = stopped.log()
    (name,) = change
    sentence = (
        f"was made with {name} {then}, and this run has {now}; give the same, or begin a new run"
    )
    with pytest.raises(UserError, match=re.escape(sentence)):
        stopped(resume=True, **{"max_steps": 2, **change})
    assert stopped.log() == before


def test_another_held_out_share_is_not_resumed(any_stage):
    """It leaves other documents to training."""
    any_stage(max_steps=2, val_share=0.3)
    held_out = any_stage.write_data(any_stage.folder / "val.jsonl", any_stage.examples[:2])
    with pytest.raises(UserError, match="was made with val_share 0.3, and this run has 0.0"):
        any_stage(max_steps=2, val_path=[held_out], resume=True)


def test_a_run_from_other_weights_is_not_resumed(tmp_path):
    (tmp_path / "texts").mkdir()
    start, sft = Trainer(tmp_path / "texts"), Trainer(tmp_path, train_full_sft)
    start("start", max_steps=1)
    first = str(start.folder / "start" / "out" / "pretrain_32.pth")
    sft(max_steps=2, from_weight=first)
    start("start", max_steps=2)
    with pytest.raises(UserError, match="was made with first weights '[0-9a-f]{16}'"):
        sft(max_steps=2, from_weight=first, resume=True)


def test_float16_with_its_scaler_resumes_as_well(any_stage, killed, monkeypatch):
    """On a CPU, which can do it, if slowly; the first scales overflow, and those steps skip."""
    monkeypatch.setattr(hardware, "resolve_dtype", lambda name, device: torch.float16)
    scaler = torch.amp.GradScaler
    high = dict(init_scale=2.0**20)  # too large for these gradients, by a few halvings
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, **high))
    common = dict(epochs=3, max_steps=12, save_interval=1, dropout=0.1)
    any_stage("whole", **common)
    saved = any_stage.saved("whole")
    assert 0 < saved["progress"]["skipped"] < 12 and saved["scaler"]["scale"] < 2.0**20
    killed(2, any_stage, **common)
    any_stage(resume=True, **common)
    assert same(everything(any_stage), everything(any_stage, "whole"))
    assert any_stage.saved()["scaler"] == saved["scaler"]


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_with_the_names_of_before_goes_on_bit_by_bit(train, killed, optimizer):
    """As it was written until 2026-11; benchmarks/same_numbers.py tries real ones."""
    settings = dict(optimizer=optimizer, save_interval=2, val_share=0.2, eval_interval=1)
    train("whole", max_steps=4, **settings)
    killed(2, train, "a", max_steps=4, **settings)
    new = train.saved()
    names = {"samples_seen": "rows_seen", "changed_fraction": "changed"}
    log_names = {"learning_rate": "lr", "num_tokens": "tokens", "eval_bpb": "val_bpb"}
    metrics = new.pop("metrics")
    old = {
        **{name: new[name] for name in ("model", "scaler")},
        "random": new["rng_states"],
        "records": [{log_names.get(k, k): v for k, v in r.items()} for r in new["history"]],
        "identity": new["fingerprint"],
        "rows_per_update": new["global_batch_size"],
        "beside": None,
        "progress": {names.get(name, name): value for name, value in new["progress"].items()},
        "pending": dict(steps=0, tokens=0, seconds=0.0, loss=0.0, figures={}, expert_load=None),
        "optimizer": new["optimizer"],
    }
    assert metrics["steps"] == 0
    for each in old["optimizer"]:
        for state in each["state"].values():
            if "momentum_buffer" in state:
                state["average"] = state.pop("momentum_buffer")
    torch.save(old, train.checkpoint())
    train("a", max_steps=4, resume=True, **settings)
    assert same(train.saved()["model"], train.saved("whole")["model"])
    assert timeless(train.log("a")) == timeless(train.log("whole"))


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

    def interrupted(ctx, *numbers):
        calls.append(numbers)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return list(numbers)

    monkeypatch.setattr(Context, "all_reduce_sum", interrupted)
    assert train(max_steps=5)["step"] < 5


@pytest.mark.slow
def test_a_program_that_is_told_to_end_saves_and_can_go_on(train, shell, killed, tokenizer):
    settings = train.settings("a", epochs=5000, num_workers=1)
    words = ["train_pretrain.py", *flags(settings)]
    process = shell(*words, cwd=ROOT / "trainer")
    wait_for_steps(process, settings)
    process.send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped at step (\d+); --resume", output(process))[1])
    assert train.saved("a")["progress"]["step"] == step == train.log("a")[-1]["step"]
    going_on = dict(epochs=5000, save_interval=step + 2)
    killed(step + 2, train, "a", resume=True, **going_on)
    killed(step + 2, train, "whole", **going_on)
    assert same(train.saved("a")["model"], train.saved("whole")["model"])
    assert [record["step"] for record in train.log("a")] == list(range(1, step + 3))
