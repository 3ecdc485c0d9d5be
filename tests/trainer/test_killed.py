"""Killed at any moment, or robbed of its disk: a run that goes on ends as if nothing had been."""

import io
import itertools
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from toy import (
    KINDS,
    Trainer,
    alive,
    ended,
    everything,
    flags,
    fork,
    no_file_grows_beyond,
    run_stage,
    same,
)

from dataset import lm_dataset
from dataset.lm_dataset import encode_chunk, load_documents
from model.weights import load_tokenizer
from trainer import trainer_utils
from trainer.common.loop import begin_worker
from trainer.common.metrics import MetricLog
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")


# -- killed ----------------------------------------------------------------------------------------

# A little of everything that could go wrong when a run goes on: 5 to 8 rows in windows of 2·2 make
# two steps an epoch, a whole global batch and a rest.
HARD = dict(
    accumulation_steps=2,
    epochs=2,
    packing=True,
    max_seq_len=48,
    dropout=0.2,
    optimizer="muon",
    num_workers=2,
    eval_interval=2,
    save_interval=1,
    log_interval=2,
)


def hard_settings(train: Trainer) -> dict:
    train.write_data(train.folder / "data.jsonl", train.examples[3:])
    held_out = train.write_data(train.folder / "val.jsonl", train.examples[:3])
    return {**HARD, "val_path": [held_out]}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(number: int, function):
    """The function, but instead of its call of that number the process is killed."""
    calls = itertools.count(1)
    return lambda *args, **more: die() if next(calls) == number else function(*args, **more)


def halfway(number: int):
    """torch.save, but at its call of that number the process is killed with half the file out."""
    save, calls = torch.save, itertools.count(1)

    def save_half(content, file):
        if next(calls) < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    return save_half


def before_evaluation(number: int, stage):
    (name,) = {"evaluate_loss", "evaluate_pairs"} & vars(stage).keys()
    return stage, name, before_call(number, getattr(stage, name))


# (object, attribute, what takes its place); each step saves weights (.pth), then a checkpoint
MOMENTS = {
    "in the first step": lambda stage: (Run, "update", before_call(1, Run.update)),
    "in the third step, a new epoch": lambda stage: (Run, "update", before_call(3, Run.update)),
    "in the last step": lambda stage: (Run, "update", before_call(4, Run.update)),
    "in a forward pass": lambda stage: (Run, "forward", before_call(4, Run.forward)),
    "in evaluation": lambda stage: before_evaluation(1, stage),
    "in the last evaluation": lambda stage: before_evaluation(2, stage),
    "writing the log": lambda stage: (MetricLog, "write", before_call(3, MetricLog.write)),
    "half of the weights written": lambda stage: (torch, "save", halfway(3)),
    "half of the first checkpoint written": lambda stage: (torch, "save", halfway(2)),
    "half of a checkpoint written": lambda stage: (torch, "save", halfway(4)),
    "half of the last checkpoint written": lambda stage: (torch, "save", halfway(8)),
    **{  # of log, .json, .pth, checkpoint, .json, .pth, checkpoint …
        f"before file {number} gets its name": lambda stage, number=number: (
            *(os, "replace"),
            before_call(number, os.replace),
        )
        for number in range(1, 14)
    },
    "drawing the curves": lambda stage: (
        *(trainer_utils, "plot_losses"),
        before_call(1, trainer_utils.plot_losses),
    ),
}


@pytest.fixture
def whole(any_stage):
    """A trainer, its settings and what an undisturbed run of it leaves."""
    settings = hard_settings(any_stage)
    any_stage("whole", **settings)
    result = everything(any_stage, "whole")
    assert any_stage.saved("whole")["progress"]["step"] == 4
    return any_stage, settings, result


def assert_all_is_well(train: Trainer, result: list) -> None:
    assert same(everything(train), result)
    made, expected = (
        {path.name for path in (train.folder / name).rglob("*")} for name in ("a", "whole")
    )
    assert made == expected  # no half of a file lies about


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(whole, monkeypatch, moment):
    train, settings, result = whole
    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment](train.stage))
        assert ended(fork(lambda: train(**settings))) == -signal.SIGKILL
    train(resume=True, **settings)
    assert_all_is_well(train, result)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_at_any_time_gets_there(whole):
    train, settings, result = whole
    for attempt in range(100):
        process = fork(lambda: train(resume=True, **settings), train.folder / "log")
        time.sleep(random.uniform(0.02, 0.5 + 0.1 * attempt))
        os.kill(process, signal.SIGKILL)  # a process that has ended stays to be asked how
        if ended(process) == 0:
            break
    assert attempt > 0
    assert_all_is_well(train, result)


# -- no room, no permission ------------------------------------------------------------------------


def full_disk(run: Run) -> None:
    no_file_grows_beyond(2**13)


def no_permission(run: Run) -> None:
    for top in (run.ctx.args.save_dir, run.ctx.args.checkpoint_dir):
        for folder in folders(Path(top)):
            folder.chmod(0o555)
    if os.geteuid() == 0:  # may write all the same
        with suppress(OSError):  # some containers have no other user, but no such right either
            os.seteuid(65534)


def folders(top: Path) -> list[Path]:
    """With those below, as LoRA has one; in a list, for their modes are to be changed."""
    return [top, *(path for path in top.rglob("*") if path.is_dir())]


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [(full_disk, "File too large"), (no_permission, "Permission denied")],
)
def test_where_nothing_can_be_saved_the_checkpoint_before_stays(
    whole, monkeypatch, trouble, complaint
):
    train, settings, result = whole
    update = Run.update

    def troubled(run, *args):
        if run.step == 3:
            trouble(run)
        update(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", troubled)
        patch.setattr(sys, "argv", ["train", *flags(train.settings(**settings))])
        log = train.folder / "log"
        process = fork(lambda: run_stage(train.stage), log)
        assert ended(process) == 2
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "cannot write" in said[0] and complaint in said[0]
    for folder in folders(train.folder / "a"):
        folder.chmod(0o755)
    assert train.saved()["progress"]["step"] == 2
    train(resume=True, **settings)
    assert_all_is_well(train, result)


@pytest.mark.parametrize(
    ("parent_lives", "start_method", "code"),
    [(True, "fork", 0), (False, "fork", 1), (False, "forkserver", 0)],
)
def test_a_data_worker_whose_run_was_killed_while_it_started_ends(
    monkeypatch, parent_lives, start_method, code
):
    """The parent of a worker of a fork server, Python 3.14's default, is never the run."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: start_method)
    parent = os.getpid() if parent_lives else -1
    assert ended(fork(lambda: begin_worker(parent, worker=0))) == code


def test_a_log_that_can_no_longer_be_written_ends_the_run_with_a_sentence(any_stage, monkeypatch):
    write = MetricLog.write

    def no_log(log, record):
        log.path.unlink()
        log.path.mkdir()
        write(log, record)

    monkeypatch.setattr(MetricLog, "write", no_log)
    monkeypatch.setattr(sys, "argv", ["train", *flags(any_stage.settings())])
    log = any_stage.folder / "log"
    assert ended(fork(lambda: run_stage(any_stage.stage), log)) == 2
    assert re.search(r"^error: .*metrics.jsonl: Is a directory", log.read_text(), re.M)


def test_a_file_has_its_name_only_once_it_is_on_the_disk(train, monkeypatch):
    """Flushed with fsync, which the other tests leave out."""
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("name") or replace(*paths))
    train(max_steps=1)
    # the tokens with their .json, the log, .json, .pth, checkpoint; the run's state, renewed every
    # two seconds and worth nothing after a power failure, is not flushed
    state = ["name"]
    saved = ["fsync", "name"] * 3
    assert events == ["fsync", "fsync", "name", "name", "fsync", "name", *state, *saved, *state]


def encode_slowly(*args):
    """Of the module, so that it can be handed to other processes by its name."""
    time.sleep(0.1)
    return encode_chunk(*args)


def test_tokenising_that_is_killed_leaves_no_process_and_is_done_anew(any_stage, monkeypatch):
    monkeypatch.setattr(lm_dataset, "LINES_PER_CHUNK", 1)
    monkeypatch.setattr(lm_dataset, "encode_chunk", encode_slowly)
    kind = KINDS[any_stage.write_data]
    load = partial(
        load_documents,
        any_stage.data,
        kind,
        load_tokenizer(),
        cache=any_stage.folder / "cache",
    )
    monkeypatch.setattr(lm_dataset, "MIN_BYTES_FOR_WORKERS", 0)  # use processes even for this
    process = fork(lambda: load(workers=2))
    workers = []
    while len(workers) < 2:
        assert alive(process)
        time.sleep(0.05)
        workers = psutil.Process(process).children()
    time.sleep(0.1)
    assert alive(process)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    gone, left = psutil.wait_procs(workers, timeout=10)
    assert not left
    monkeypatch.undo()
    assert len(load()) == len(any_stage.examples) * (2 if kind == "preferences" else 1)
