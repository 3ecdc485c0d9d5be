"""Downloads, against a stand-in for the hub: resumed, checked, and mistakes."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from prepare_samples import CHAT, sentences
from stand_in_hub import COMMIT, Hub, serving
from toy import ended, fork

from model.errors import UserError
from scripts.prepare_data import main

DATA = "datasets/jingyaogong/minimind_dataset"
PRETRAIN = b"".join(json.dumps({"text": sentences(n)}).encode() + b"\n" for n in range(2000))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    names = ("sft_mini_512.jsonl", "dpo.jsonl")
    files = {name: json.dumps({"conversations": CHAT}).encode() + b"\n" for name in names}
    model = {"config.json": b"{}", "model.safetensors": b"weights" * 999, ".gitattributes": b""}
    stand_in = Hub(
        {
            DATA: {"pretrain_hq.jsonl": PRETRAIN, **files, "README.md": b"# data\n"},
            "models/jingyaogong/MiniMind2": model,
        }
    )
    stand_in.small = {"README.md", "config.json", ".gitattributes"}
    with serving(stand_in) as address:
        stand_in.address = address
        yield stand_in


def fetch(hub, folder, *words):
    return main(["download", "--endpoint", hub.address, "--output", str(folder), *words])


def test_download_a_set(tmp_path, hub):
    found = fetch(hub, tmp_path, "--set", "mini")
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "download.manifest.json",
        "pretrain_hq.jsonl",
        "sft_mini_512.jsonl",
    ]
    about = json.loads((tmp_path / "download.manifest.json").read_text())
    assert about["revision"] == COMMIT
    assert about["files"][0]["sha256"] == hashlib.sha256(PRETRAIN).hexdigest()
    assert about["files"][0]["checked_by"] == "sha256"
    assert found["jingyaogong/minimind_dataset"]["files"] == about["files"]
    hub.gets.clear()
    fetch(hub, tmp_path, "--set", "mini")  # what is there and whole is left
    assert hub.gets == []
    (tmp_path / "pretrain_hq.jsonl").write_bytes(PRETRAIN[:-1] + b" ")  # of the same size
    fetch(hub, tmp_path, "--set", "mini")
    assert hub.gets == [("pretrain_hq.jsonl", None)]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN


def test_download_models(tmp_path, hub):
    fetch(hub, tmp_path, "--model", "MiniMind2")
    folder = tmp_path / "MiniMind2"
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 999
    about = json.loads((folder / "download.manifest.json").read_text())
    how = {Path(file["file"]).name: file["checked_by"] for file in about["files"]}
    assert how == {"config.json": "git hash", "model.safetensors": "sha256"}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_after = 50_000
    fetch(hub, tmp_path, "--file", "pretrain_hq.jsonl")
    assert hub.gets == [("pretrain_hq.jsonl", None), ("pretrain_hq.jsonl", "bytes=50000-")]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN


def test_a_killed_download_is_gone_on_with(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.wait = threading.Event()
    process = fork(lambda: fetch(hub, tmp_path, "--file", "pretrain_hq.jsonl"))
    partial = tmp_path / ".pretrain_hq.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size >= 100_000):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    ended(process)
    there = partial.stat().st_size
    assert not (tmp_path / "pretrain_hq.jsonl").exists()
    hub.wait.set()
    hub.wait = None  # from now on it answers at once
    hub.gets.clear()
    fetch(hub, tmp_path, "--file", "pretrain_hq.jsonl")
    assert hub.gets == [("pretrain_hq.jsonl", f"bytes={there}-")]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN


@pytest.mark.parametrize("name", ["pretrain_hq.jsonl", "README.md"])
def test_a_damaged_file_is_not_kept(tmp_path, hub, name):
    content = hub.repos[DATA][name]
    hub.damaged[name] = content[:-2] + b"!\n"
    with pytest.raises(UserError, match=f"{name} has another hash"):
        fetch(hub, tmp_path, "--file", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--file", "sft_9.jsonl"], "has no sft_9.jsonl; it has README.md, dpo.jsonl"),
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
    files = {"pretrain_hq.jsonl": PRETRAIN, "sft_mini_512.jsonl": b"{}\n"}
    stand_in = Hub({"datasets/gongjy/minimind_dataset": files})
    stand_in.cut_after = 500_000
    with serving(stand_in) as address:
        words = ["--set", "mini", "--hub", "modelscope", "--endpoint", address]
        main(["download", *words, "--output", str(tmp_path)])
        assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN
        assert ("pretrain_hq.jsonl", "bytes=500000-") in stand_in.gets
        stand_in.damaged["sft_mini_512.jsonl"] = b"!}\n"
        (tmp_path / "sft_mini_512.jsonl").unlink()
        with pytest.raises(UserError, match="sft_mini_512.jsonl"):
            main(["download", *words, "--output", str(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert names == ["download.manifest.json", "pretrain_hq.jsonl"]
