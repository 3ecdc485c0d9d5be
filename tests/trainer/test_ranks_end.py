"""Several processes end as one, whatever happens to one of them."""

import errno
import os
import re
import signal
import sys
import time
from datetime import timedelta

import psutil
import pytest
from ranks import errors, start_ranks, together
from toy import assert_close, ended, flags, fork, output, run_stage, wait_for_steps

from model.formats import minimind_format
from trainer.common import context
from trainer.trainer_utils import Run

pytestmark = [pytest.mark.usefixtures("in_a_hurry"), pytest.mark.slow]

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
    assert ended(fork(lambda: run_stage(any_stage.stage), log)) == 2
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
