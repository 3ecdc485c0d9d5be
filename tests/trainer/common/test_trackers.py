"""wandb, SwanLab and trackio, the real ones, offline: what they are told, and under which id."""

import importlib
import json
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import Trainer

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


Logged = dict[tuple[int, str], float]  # (step, name) → value


def wandb_log(folder: Path) -> tuple[list[str], Logged]:
    """The ids of the offline runs in the order of their time, and what they logged."""
    from wandb.proto import wandb_internal_pb2 as wandb

    ids, values = [], {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for content in stored(path):
            record = wandb.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            for item in record.history.item:
                name = item.key or item.nested_key[0]
                if not name.startswith("_"):  # its own time and step
                    values[record.history.step.num, name] = json.loads(item.value_json)
    return ids, values


def swanlab_log(folder: Path) -> tuple[list[str], Logged]:
    from swanlab.proto.swanlab.record.v1 import record_pb2 as swanlab

    ids, values = [], {}
    for path in sorted(folder.glob("swanlog/run-*/run-*.swanlab")):
        for content in stored(path):
            record = swanlab.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "start":
                ids.append(record.start.id)
            name = record.scalar.key
            if name and not name.startswith("__"):  # its own metrics of the machine
                values[record.scalar.step, name] = record.scalar.value.number
    return ids, values


def trackio_log(folder: Path) -> tuple[list[str], Logged]:
    """By trackio's own API. It logs twice at the step of an evaluation."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("MiniMind"))
    logs = SQLiteStorage.get_logs("MiniMind", run_id=runs[0].id)
    assert (folder / "trackio" / "MiniMind.db").exists()
    values = {
        (record["step"], name): value
        for record in logs
        for name, value in record.items()
        if name not in ("step", "timestamp")
    }
    return [run.id for run in runs], values


def import_anew(tracker: str, monkeypatch) -> None:
    """trackio takes its folder from the environment when it is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)


@pytest.mark.parametrize(
    ("tracker", "read"),
    [("wandb", wandb_log), ("swanlab", swanlab_log), ("trackio", trackio_log)],
)
def test_a_run_that_goes_on_logs_under_the_same_id(
    any_stage: Trainer, killed, monkeypatch, tmp_path, tracker, read
):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    importlib.import_module("wandb").teardown()  # it remembers the settings of its first run
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    import_anew(tracker, monkeypatch)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    common = dict(use_wandb=True, tracker=tracker, max_steps=5, save_interval=1)
    common |= dict(val_share=0.2, eval_interval=2)

    killed(3, any_stage, **common)
    importlib.import_module(tracker).finish()  # what the end of that process would have done
    time.sleep(1.1)  # wandb names a folder by id and second
    records = any_stage(resume=True, **common)["history"]

    expected = {
        (record["step"], name): value
        for record in records
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }
    for _ in range(50):  # wandb's own process may still be writing
        ids, values = read(tmp_path / "a" / "out")
        if values.keys() == expected.keys():
            break
        time.sleep(0.2)
    assert set(ids) == {any_stage.saved()["progress"]["tracker_id"]}
    assert values == pytest.approx(expected)
    names = "loss learning_rate grad_norm tokens_per_second memory_gb mfu changed_fraction".split()
    logged = {name for _, name in values}
    assert (
        set(names) <= logged and {"eval_bpb", "eval_accuracy", "eval_rewards/accuracies"} & logged
    )
    steps = [step for step, name in sorted(values) if name == "loss"]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_trackio_is_local_and_says_how_to_look_at_it(train: Trainer, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trackio", reason="trackio is not installed")
    import_anew("trackio", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_who_is_logged_in")
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: asked.append(given))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    train(use_wandb=True, tracker="trackio", max_steps=2)
    assert not asked
    folder = tmp_path / "a" / "out" / "trackio"
    assert f"TRACKIO_DIR={folder} trackio show --project MiniMind" in capsys.readouterr().out
    train(use_wandb=True, tracker="trackio", max_steps=2)  # a new run of the same name
    first, second = trackio_log(tmp_path / "a" / "out")[0]
    assert first != second
