"""Several processes train as one, and end as one."""

import errno
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta

import numpy as np
import psutil
import pytest
from torch.nn.parallel import DistributedDataParallel
from toy import Trainer, assert_close, ended, flags, fork, output, run_stage, wait_for_steps

from model.formats import minimind_format
from trainer import train_full_sft, train_pretrain
from trainer.common import context, loop
from trainer.trainer_utils import Run

pytestmark = [pytest.mark.usefixtures("in_a_hurry"), pytest.mark.slow]

# 7 or more rows in windows of 4: the last window of an epoch has too few rows for every rank
WINDOWS = dict(epochs=2, eval_interval=2, save_interval=1)


def start_ranks(train: Trainer, ranks: int, **settings) -> list[int]:
    """The trainer's command line in so many processes, as torchrun would start them; returns
    their ids. What rank r says is in the file log{r}."""
    port = str(free_port())

    def start(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        sys.argv = ["train", *flags(train.settings(**settings))]
        run_stage(train.stage)

    logs = [train.folder / f"log{rank}" for rank in range(ranks)]
    return [fork(lambda rank=rank: start(rank), log) for rank, log in enumerate(logs)]


def free_port() -> int:
    """A port that nobody listens on. Below those that the system hands out (from 32768 on, on
    Linux): one of them might be another test's by the time the ranks meet there."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port


def together(train: Trainer, ranks: int, **settings) -> None:
    """Run the trainer in so many processes to its end."""
    for rank, process in enumerate(start_ranks(train, ranks, **settings)):
        assert ended(process) == 0, (train.folder / f"log{rank}").read_text()


def errors(train: Trainer, rank: int) -> list[str]:
    """What a rank complained of; a traceback is one complaint more."""
    log = train.folder / f"log{rank}"
    said = log.read_text() if log.exists() else ""  # it may have been ended before it said a word
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def metrics_of(train: Trainer, name: str) -> list[tuple]:
    return [
        tuple(
            record.get(key, 0.0) for key in ("step", "num_tokens", "loss", "grad_norm", "eval_bpb")
        )
        for record in train.log(name, "step")
    ]


@pytest.fixture
def windows(any_stage) -> dict:
    """Settings, with a file to evaluate on."""
    any_stage.data = any_stage.write_data(any_stage.folder / "data.jsonl", any_stage.examples[:7])
    held_out = any_stage.write_data(any_stage.folder / "val.jsonl", any_stage.examples[7:10])
    return {**WINDOWS, "val_path": [held_out]}


@pytest.mark.parametrize(
    ("ranks", "batch_size", "accumulation_steps", "batch_ramp"),
    [(1, 1, 4, 0), (2, 1, 2, 0), (2, 2, 1, 0), (3, 1, 2, 0), (2, 2, 1, 2)],
)
def test_however_a_window_is_shared_out_the_training_is_the_same(
    any_stage, windows, monkeypatch, ranks, batch_size, accumulation_steps, batch_ramp
):
    train, window = any_stage, ranks * batch_size * accumulation_steps
    monkeypatch.setattr(loop, "INITIAL_BATCH_TOKENS", 2)  # tokens, so a row
    windows["batch_ramp"] = batch_ramp
    train("one", batch_size=window, **windows)
    shape = dict(batch_size=batch_size, accumulation_steps=accumulation_steps)
    together(train, ranks, **windows, **shape)
    assert_close(train.saved()["model"], train.saved("one")["model"])
    np.testing.assert_allclose(metrics_of(train, "a"), metrics_of(train, "one"), atol=2e-4)
    assert len(train.saved()["rng_states"]) == ranks


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_packed_rows_too(tmp_path, stage):
    """What users train with: packed rows, Muon, steps that grow."""
    train = Trainer(tmp_path, stage)
    settings = dict(packing=True, max_seq_len=24, batch_ramp=4, epochs=2, save_interval=1)
    train("one", batch_size=4, **settings)
    together(train, 2, batch_size=2, **settings)
    assert len(metrics_of(train, "a")) > 2
    assert_close(train.saved()["model"], train.saved("one")["model"])
    np.testing.assert_allclose(metrics_of(train, "a"), metrics_of(train, "one"), atol=2e-4)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    any_stage, windows, monkeypatch, first, then
):
    """The window is 6 rows throughout, so that the whole run is that of one process."""
    train = any_stage
    shape = {n: dict(batch_size=1, accumulation_steps=6 // n) for n in (1, 2, 3)}
    train("one", **shape[1], **windows)
    update = Run.update
    with monkeypatch.context() as patch:
        patch.setattr(
            Run,
            "update",
            lambda run, *a: os.kill(os.getpid(), 9) if run.step == 2 else update(run, *a),
        )
        for process in start_ranks(train, first, **shape[first], **windows):
            assert ended(process) != 0
    assert train.saved()["progress"]["step"] == 1
    together(train, then, **shape[then], **windows, resume=True)
    assert_close(train.saved()["model"], train.saved("one")["model"])
    np.testing.assert_allclose(metrics_of(train, "a"), metrics_of(train, "one"), atol=2e-4)
    assert (
        train.saved()["progress"]["samples_seen"] == train.saved("one")["progress"]["samples_seen"]
    )


def test_gradients_travel_once_an_update(any_stage, windows, monkeypatch):
    """With the last micro-batch of a window; the others stay on their rank."""
    forward, finish, travel = DistributedDataParallel.forward, Run.finish, []

    def watched(model, *args, **more):
        travel.append(model.require_backward_grad_sync)
        return forward(model, *args, **more)

    def tell(run):
        (any_stage.folder / f"travel{run.ctx.rank}").write_text(json.dumps(travel))
        return finish(run)

    monkeypatch.setattr(DistributedDataParallel, "forward", watched)
    monkeypatch.setattr(Run, "finish", tell)
    together(any_stage, 2, batch_size=1, accumulation_steps=3, epochs=1)
    for rank in (0, 1):  # 7 rows are a window of 6 and one of 1
        seen = json.loads((any_stage.folder / f"travel{rank}").read_text())
        assert seen == [False, False, True, True]


DEATHS = ("update", "backward", "log", "log_evaluation", "save_every")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("death", DEATHS)
def test_a_rank_that_dies_ends_the_others_with_one_clear_error(
    any_stage, windows, monkeypatch, death, rank
):
    train, method = any_stage, getattr(Run, death)

    def deadly(run, *args, **more):
        if run.ctx.rank == rank and run.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(run, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Run, death, deadly)
        started = time.monotonic()
        processes = start_ranks(train, 2, **{**windows, "eval_interval": 1})
        codes = [ended(process) for process in processes]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 2
    assert time.monotonic() - started < 60
    (said,) = errors(train, 1 - rank)
    assert "another process of this training has died" in said and "--resume goes on" in said
    together(train, 2, **{**windows, "eval_interval": 1}, resume=True)
    train("one", batch_size=4, **{**windows, "eval_interval": 1})
    assert_close(train.saved()["model"], train.saved("one")["model"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bug", [ValueError, KeyboardInterrupt])
def test_a_bug_in_one_rank_does_not_hang_the_others(any_stage, windows, monkeypatch, rank, bug):
    update = Run.update

    def faulty(run, *args):
        if run.ctx.rank == rank and run.step == 2:
            raise bug("a bug")
        update(run, *args)

    monkeypatch.setattr(Run, "update", faulty)
    started = time.monotonic()
    codes = [ended(process) for process in start_ranks(any_stage, 2, **windows)]
    assert time.monotonic() - started < 60
    assert codes[rank] == {ValueError: 1, KeyboardInterrupt: 130}[bug] and codes[1 - rank] == 2
    assert len(errors(any_stage, 1 - rank)) == 1


def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(
    any_stage, windows, monkeypatch
):
    backward = Run.backward

    def poisoned(run, loss, *more):
        backward(run, loss * float("nan") if run.ctx.rank == 1 and run.step == 2 else loss, *more)

    monkeypatch.setattr(Run, "backward", poisoned)
    together(any_stage, 2, **windows)
    saved = any_stage.saved()
    assert saved["progress"]["skipped"] == 1 and saved["progress"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize("with_address", [False, True])
def test_processes_that_cannot_meet_are_told_to_use_torchrun(
    any_stage, monkeypatch, closed_port, with_address
):
    monkeypatch.setattr(context, "timedelta", lambda minutes: timedelta(seconds=1))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(closed_port)}
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(variable, value)
    if not with_address:
        for variable in address:
            monkeypatch.delenv(variable)
    monkeypatch.setattr(sys, "argv", ["train", *flags(any_stage.settings())])
    log = any_stage.folder / "log0"
    assert (
        ended(
            fork(
                lambda: run_stage(any_stage.stage),
                log,
            )
        )
        == 2
    )
    assert "the 2 processes cannot find each other" in errors(any_stage, 0)[0]


def test_a_rank_that_cannot_save_says_so_and_takes_the_others_along(
    any_stage, windows, monkeypatch
):
    def no_room(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(minimind_format, "atomic_write", no_room)
    codes = [ended(process) for process in start_ranks(any_stage, 2, **windows)]
    assert codes == [2, 2]
    assert "the disk is full" in errors(any_stage, 0)[0]
    assert len(errors(any_stage, 1)) == 1


def test_a_mistake_that_all_ranks_see_is_told_once(any_stage, windows):
    started = start_ranks(any_stage, 2, **{**windows, "data_path": ["nowhere.jsonl"]})
    assert ended(started[0]) == 2
    os.kill(started[1], signal.SIGTERM)  # as torchrun does, once one of them has failed
    ended(started[1])
    assert len(errors(any_stage, 0)) == 1 and errors(any_stage, 1) == []


# -- started by torchrun ---------------------------------------------------------------------------


TORCHRUN = (
    "-m torch.distributed.run --standalone --nproc_per_node 2 trainer/train_pretrain.py".split()
)


def test_all_ranks_end_together_when_one_is_told_to(train, shell):
    settings = train.settings("a", epochs=5000)
    process = shell(*TORCHRUN, *flags(settings))
    wait_for_steps(process, settings)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped at step (\d+); --resume", output(process))[1])
    assert train.saved("a")["progress"]["step"] == step == train.log("a")[-1]["step"]


def test_torchrun_does_not_hang_when_a_rank_dies(train, shell):
    settings = train.settings("a", epochs=5000)
    process = shell(*TORCHRUN, *flags(settings))
    wait_for_steps(process, settings)
    psutil.Process(process.pid).children()[1].kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert printed.count("error: another process of this training has died") == 1
