"""Downloads, against a stand-in for the hub: resumed, checked, and mistakes."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from prepare_samples import CHAT, sentences
from stand_in.hub import Hub, serving
from toy import ended, fork

from dataset.prepare import hub as hub_module
from dataset.released import OLDER, REVISION, SETS, SIZES, STAGE_FILES
from model.errors import UserError
from scripts.prepare_data import main

DATA = "datasets/jingyaogong/minimind_dataset"
PRETRAIN = b"".join(json.dumps({"text": sentences(n)}).encode() + b"\n" for n in range(2000))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    row = json.dumps({"conversations": CHAT}).encode() + b"\n"
    files = {"pretrain_t2t_mini.jsonl": PRETRAIN, "README.md": b"# data\n"}
    files |= {name: row for name in SETS["mini"][1:]}
    model = {"config.json": b"{}", "model.safetensors": b"weights" * 999, ".gitattributes": b""}
    stand_in = Hub({DATA: files, "models/jingyaogong/MiniMind2": model})
    stand_in.small = {"README.md", "config.json", ".gitattributes"}
    stand_in.commit = REVISION
    with serving(stand_in) as address:
        stand_in.address = address
        yield stand_in


def fetch(hub, folder, *words):
    return main(["download", "--endpoint", hub.address, "--output", str(folder), *words])


def test_download_a_set(tmp_path, hub):
    found = fetch(hub, tmp_path, "--set", "mini")
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == PRETRAIN
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"download.manifest.json", *SETS["mini"]} and len(names) == 10
    about = json.loads((tmp_path / "download.manifest.json").read_text())
    assert about["revision"] == REVISION
    assert about["files"][0]["sha256"] == hashlib.sha256(PRETRAIN).hexdigest()
    assert about["files"][0]["checked_by"] == "sha256"
    assert found["jingyaogong/minimind_dataset"]["files"] == about["files"]
    hub.gets.clear()
    fetch(hub, tmp_path, "--set", "mini")  # what is there and whole is left
    assert hub.gets == []
    (tmp_path / "pretrain_t2t_mini.jsonl").write_bytes(PRETRAIN[:-1] + b" ")  # of the same size
    fetch(hub, tmp_path, "--set", "mini")
    assert hub.gets == [("pretrain_t2t_mini.jsonl", None)]
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == PRETRAIN


def test_sets_and_stages_name_released_files():
    """Each file that a set or a stage names exists, and each of today's is in a set."""
    today = [name for name, files in SETS.items() if name != "2025" for name in files]
    assert set(today) == SIZES.keys() and not SIZES.keys() & set(OLDER)
    assert set(SETS["2025"]) <= set(OLDER)
    defaults = {name for files in STAGE_FILES.values() for name in files}
    assert defaults - SIZES.keys() - set(OLDER) == {"tools.jsonl"}
    with_mini = [files for files in SETS.values() if "sft_t2t_mini.jsonl" in files]
    assert sum(SIZES[name] for name in with_mini[0]) == 3_216_738_391


def test_newer_files_of_the_hub_are_not_mixed_in(tmp_path, hub):
    """The files of 2026 are taken at the commit that is known, not at the newest one."""
    hub.older[DATA] = {REVISION: hub.repos[DATA]}
    hub.repos[DATA], hub.commit = {"dpo.jsonl": b"{}\n"}, "9" * 40
    fetch(hub, tmp_path, "--file", "dpo.jsonl")
    assert (tmp_path / "dpo.jsonl").read_bytes() == hub.older[DATA][REVISION]["dpo.jsonl"]
    fetch(hub, tmp_path, "--file", "dpo.jsonl", "--revision", "main")
    assert (tmp_path / "dpo.jsonl").read_bytes() == b"{}\n"
    del hub.older[DATA]  # as on a mirror without the history
    fetch(hub, tmp_path, "--file", "dpo.jsonl")
    assert (tmp_path / "dpo.jsonl").read_bytes() == b"{}\n"


def test_files_of_2025_come_from_the_history(tmp_path, hub):
    older = {name: name.encode() for name in SETS["2025"]}
    hub.older[DATA] = {"7" * 40: {"README.md": b""}, "6" * 40: older, "5" * 40: older | {"a": b""}}
    fetch(hub, tmp_path, "--set", "2025")
    assert (tmp_path / "r1_mix_1024.jsonl").read_bytes() == b"r1_mix_1024.jsonl"
    about = json.loads((tmp_path / "download.manifest.json").read_text())
    assert about["revision"] == "6" * 40  # the newest that has them
    told = "has no sft_512.jsonl; it has .*--revision may name"
    with pytest.raises(UserError, match=told):
        fetch(hub, tmp_path, "--file", "sft_512.jsonl")
    hub.has_history = False
    with pytest.raises(UserError, match=told):
        fetch(hub, tmp_path, "--file", "sft_512.jsonl")


def test_the_disk_is_asked_before_anything_is_downloaded(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda place: SimpleNamespace(free=99_999))
    hub.repos[DATA]["dpo.jsonl"] = bytes(90_000)
    fetch(hub, tmp_path, "--file", "dpo.jsonl")  # has room
    with pytest.raises(UserError, match="0.0 GB are to be downloaded.*make room"):
        fetch(hub, tmp_path / "data", "--set", "mini")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    fetch(hub, tmp_path, "--file", "dpo.jsonl")  # is there already, and needs none


def test_download_models(tmp_path, hub):
    fetch(hub, tmp_path, "--model", "minimind2", "--file", "*.json")
    assert not (tmp_path / "MiniMind2" / "model.safetensors").exists()
    fetch(hub, tmp_path, "--model", "MiniMind2")
    folder = tmp_path / "MiniMind2"
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 999
    about = json.loads((folder / "download.manifest.json").read_text())
    how = {Path(file["file"]).name: file["checked_by"] for file in about["files"]}
    assert how == {"config.json": "git hash", "model.safetensors": "sha256"}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_after = 50_000
    fetch(hub, tmp_path, "--file", "pretrain_t2t_mini.jsonl")
    assert hub.gets == [
        ("pretrain_t2t_mini.jsonl", None),
        ("pretrain_t2t_mini.jsonl", "bytes=50000-"),
    ]
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == PRETRAIN


def test_a_killed_download_is_gone_on_with(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.wait = threading.Event()
    process = fork(lambda: fetch(hub, tmp_path, "--file", "pretrain_t2t_mini.jsonl"))
    partial = tmp_path / ".pretrain_t2t_mini.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size >= 100_000):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    ended(process)
    there = partial.stat().st_size
    assert not (tmp_path / "pretrain_t2t_mini.jsonl").exists()
    hub.wait.set()
    hub.wait = None  # from now on it answers at once
    hub.gets.clear()
    fetch(hub, tmp_path, "--file", "pretrain_t2t_mini.jsonl")
    assert hub.gets == [("pretrain_t2t_mini.jsonl", f"bytes={there}-")]
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == PRETRAIN


@pytest.mark.parametrize("name", ["pretrain_t2t_mini.jsonl", "README.md"])
def test_a_damaged_file_is_not_kept(tmp_path, hub, name):
    content = hub.repos[DATA][name]
    hub.damaged[name] = content[:-2] + b"!\n"
    with pytest.raises(UserError, match=f"{name} has another hash"):
        fetch(hub, tmp_path, "--file", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--file", "sft_9.jsonl"],
            "has no sft_9.jsonl; it has README.md.*sets are mini",
        ),
        (["--set", "big"], "no set big; the sets are mini, full.*: pretrain_t2t_mini.jsonl, pre"),
        (["--repo", "nobody/nothing", "--file", "a"], "has no nobody/nothing"),
        (["--repo", "a b/c", "--file", "a"], "is no name of a repository"),
        (["--model", "MiniMind9"], "no model MiniMind9 is known"),
        ([], "name what to download"),
    ],
)
def test_mistakes_in_downloading(tmp_path, hub, words, sentence):
    with pytest.raises(UserError, match=sentence):
        fetch(hub, tmp_path, *words)


def test_offline(tmp_path, closed_port):
    address = f"http://127.0.0.1:{closed_port}"
    with pytest.raises(UserError, match="cannot be reached.*without a network.*--endpoint"):
        main(["download", "--set", "mini", "--endpoint", address, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_without_modelscope(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        main(["download", "--set", "mini", "--hub", "modelscope", "--output", str(tmp_path)])


def test_modelscope(tmp_path, monkeypatch):
    """Its own package against the stand-in: a broken connection is taken up where it broke."""
    pytest.importorskip("modelscope", reason="pip install modelscope")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "")
    files = {name: b"{}\n" for name in SETS["mini"]} | {"pretrain_t2t_mini.jsonl": PRETRAIN}
    stand_in = Hub({"datasets/gongjy/minimind_dataset": files})
    stand_in.cut_after = 500_000
    with serving(stand_in) as address:
        words = ["--set", "mini", "--hub", "modelscope", "--endpoint", address]
        main(["download", *words, "--output", str(tmp_path)])
        assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == PRETRAIN
        assert ("pretrain_t2t_mini.jsonl", "bytes=500000-") in stand_in.gets
        stand_in.damaged["sft_t2t_mini.jsonl"] = b"!}\n"
        (tmp_path / "sft_t2t_mini.jsonl").unlink()
        with pytest.raises(UserError, match="sft_t2t_mini.jsonl"):
            main(["download", *words, "--output", str(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert names == sorted({"download.manifest.json", *SETS["mini"]} - {"sft_t2t_mini.jsonl"})
