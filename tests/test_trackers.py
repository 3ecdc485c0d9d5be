"""wandb and SwanLab, the real ones, offline: what they are told, and under which id."""

import importlib
import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import Trainer, logged

pytestmark = [pytest.mark.usefixtures("in_a_hurry"), pytest.mark.slow]


def stored(path: Path) -> Iterator[bytes]:
    """The records of a .wandb or .swanlab file: LevelDB's log format, after a head of 7 bytes. In
    blocks of 32 kB, each record in pieces of: checksum, length, kind (1 whole, 2 first, 3 middle,
    4 last)."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_losses(folder: Path) -> tuple[list[str], list[tuple[int, float]]]:
    """The ids of the offline runs in the order of their time, and what they logged as "loss"."""
    from wandb.proto import wandb_internal_pb2 as wandb

    ids, losses = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for content in stored(path):
            record = wandb.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            for item in record.history.item:
                if "loss" in (item.key, *item.nested_key):
                    losses.append((record.history.step.num, json.loads(item.value_json)))
    return ids, losses


def swanlab_losses(folder: Path) -> tuple[list[str], list[tuple[int, float]]]:
    from swanlab.proto.swanlab.record.v1 import record_pb2 as swanlab

    ids, losses = [], []
    for path in sorted(folder.glob("swanlog/run-*/run-*.swanlab")):
        for content in stored(path):
            record = swanlab.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "start":
                ids.append(record.start.id)
            if record.scalar.key == "loss":
                losses.append((record.scalar.step, record.scalar.value.number))
    return ids, losses


@pytest.mark.parametrize(
    ("tracker", "read"), [("wandb", wandb_losses), ("swanlab", swanlab_losses)]
)
def test_a_run_that_goes_on_logs_under_the_same_id(
    any_stage: Trainer, killed, monkeypatch, tmp_path, tracker, read
):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    importlib.import_module("wandb").teardown()  # it remembers the settings of its first run
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    common = dict(use_wandb=True, tracker=tracker, max_steps=5, save_interval=1)

    killed(3, any_stage, **common)
    importlib.import_module(tracker).finish()  # what the end of that process would have done
    records = logged(any_stage(resume=True, **common))

    (first, second), losses = read(tmp_path / "a" / "out")
    assert first == second == any_stage.saved()["progress"]["tracker_id"]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in records]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
