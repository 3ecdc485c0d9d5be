"""A machine in trouble (memory, disk, workers, Ctrl-C): one plain sentence, or a bug's trace."""

import errno
import importlib
import os
import re
import sys

import psutil
import pytest
import torch
from test_mistakes import complaint
from toy import Trainer, ended, flags, fork, no_file_grows_beyond, run_stage

from model.model_minimind import MiniMindForCausalLM, MiniMindModel
from trainer.common import hardware
from trainer.common.metrics import MetricLog
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")


# -- what needs a machine in trouble ---------------------------------------------------------------


def run(train: Trainer, command, **changes) -> str:
    """The sentence that a run ends with."""
    code, printed = command(train.stage, *flags(train.settings(**changes)))
    assert code == 2
    return complaint(printed)


def test_a_batch_that_cannot_fit_is_refused_with_one_that_would(any_stage, command, monkeypatch):
    monkeypatch.setattr(hardware, "memory_available", lambda device: 6e6)
    monkeypatch.setattr(hardware, "total_memory", lambda device: 6e6)
    said = run(any_stage, command, batch_size=12, max_seq_len=64)
    smaller, steps = re.search(r"--batch_size (\d+) with --accum\w+ (\d+) should", said).groups()
    assert re.search(
        r"--batch_size 12 with (sequences of 64|pairs of \d\d) tokens needs about", said
    )
    assert 1 <= int(smaller) <= 6 and int(smaller) * int(steps) >= 12


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_of_memory_names_a_smaller_batch(any_stage, command, monkeypatch, error):
    def forward(*args, **more):
        raise error

    monkeypatch.setattr(MiniMindModel, "forward", forward)
    said = run(any_stage, command, batch_size=8)
    assert "out of memory with --batch_size 8; --batch_size 4 with --accumulation_steps 2" in said


@pytest.mark.parametrize("place", [(Run, "update"), (Run, "resume")], ids=["update", "model"])
def test_running_out_of_memory_elsewhere_is_told_too(any_stage, command, monkeypatch, place):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(*place, full)
    assert "out of memory; try a smaller --batch_size" in run(any_stage, command)


def test_data_that_may_not_be_read_is_named(any_stage, command, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "data.jsonl may not be read by this user" in run(any_stage, command)


@pytest.mark.parametrize("method", ["resume", "forward"])
def test_ctrl_c_is_no_traceback(any_stage, command, monkeypatch, method):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, method, interrupted)
    code, printed = command(any_stage.stage, *flags(any_stage.settings()))
    assert code == 130 and "Traceback" not in printed.err


def test_a_real_allocation_that_fails_is_recognised(train, command, monkeypatch):
    monkeypatch.setattr(MiniMindForCausalLM, "forward", lambda *args, **more: torch.empty(2**55))
    assert "out of memory with --batch_size 2" in run(train, command)


def test_a_bug_keeps_its_trace(train, command, monkeypatch):
    def forward(*args, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr(MiniMindForCausalLM, "forward", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        command(train.stage, *flags(train.settings()))


def test_a_worker_that_is_killed_is_named(any_stage, monkeypatch):
    """In a process of its own, for PyTorch goes on complaining of the worker's death."""
    train, forward = any_stage, MiniMindModel.forward

    def without_worker(*args, **more):
        for child in psutil.Process().children():
            child.kill()
        return forward(*args, **more)

    monkeypatch.setattr(MiniMindModel, "forward", without_worker)
    monkeypatch.setattr(sys, "argv", ["", *flags(train.settings(num_workers=1, epochs=200))])
    log = train.folder / "log"
    assert ended(fork(lambda: run_stage(train.stage), log)) == 2
    assert "error: a process that prepares data was killed" in log.read_text()
    assert "--num_workers 0" in log.read_text()


def test_a_full_disk_is_told_whatever_was_written(any_stage, monkeypatch):
    """A line of the log is written without atomic_write. In a process of its own, whose files grow
    no more."""
    train, write = any_stage, MetricLog.write

    def without_room(log, record):
        os.truncate(log.path, 2**20)  # larger than what this process says, which has to have room
        no_file_grows_beyond(2**20)
        write(log, record)

    monkeypatch.setattr(MetricLog, "write", without_room)
    monkeypatch.setattr(sys, "argv", ["", *flags(train.settings())])
    log = train.folder / "log"
    assert ended(fork(lambda: run_stage(train.stage), log)) == 2
    assert re.search("^error: the disk is full .*; make room, and --resume", log.read_text(), re.M)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_whatever_the_system_calls_it(train, command, monkeypatch, number):
    def full(*args, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(MetricLog, "write", full)
    assert "the disk is full" in run(train, command)


def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert hardware.resolve_dtype("bfloat16", torch.device("cuda")) == torch.float16
    assert hardware.resolve_dtype("float32", torch.device("cuda")) == torch.float32


def test_a_tracker_that_is_not_installed_is_named(any_stage, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    said = run(any_stage, command, use_wandb=True, tracker="swanlab")
    assert "--tracker swanlab is not installed" in said and "`pip install swanlab`" in said


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_a_tracker_without_login_is_told(any_stage, command, monkeypatch, tmp_path, tracker):
    importlib.import_module("wandb").teardown()  # it remembers the settings of its first run
    for variable in list(os.environ):
        if variable.startswith(("WANDB", "SWANLAB")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    said = run(any_stage, command, use_wandb=True, tracker=tracker)
    assert f"--tracker {tracker} does not start: " in said
    assert f"log in with `{tracker} login`, or set {tracker.upper()}_MODE=offline" in said
