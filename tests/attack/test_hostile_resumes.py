"""Checkpoints whose fields are missing or of another type or shape, and weights that have moved."""

import copy
import os
import shutil

import pytest
import torch
from attacks import ALL, some
from toy import STAGES, Trainer, everything, same

from model.errors import UserError
from model.formats.minimind_format import save_tensors
from trainer import train_distillation, train_full_sft

pytestmark = pytest.mark.usefixtures("in_a_hurry")
COMMON = dict(max_steps=3, save_interval=1)
VALUES = [None, 0, -5, "x", [], [1], {}, {"a": 1}, torch.ones(3)]
OTHER_TYPES = [-5.5, [], [1], torch.ones(3)]  # of no field of these parts


def damages(saved: dict):
    """(what is done to a checkpoint, the checkpoint)"""
    for name in saved:
        lacking = {key: each for key, each in saved.items() if key != name}
        yield f"{name} missing", lacking
        for value in VALUES:
            if not (isinstance(value, list) and not value) or name != "history":
                yield f"{name} {value!r}", saved | {name: value}
    for part in ("progress", "metrics"):
        for name in saved[part]:
            rest = {key: each for key, each in saved[part].items() if key != name}
            yield f"{part} without {name}", saved | {part: rest}
            for value in OTHER_TYPES:
                if name != "loss_sum" or not isinstance(
                    value, float
                ):  # which RL's losses may add up to
                    yield f"{part}.{name} {value!r}", saved | {part: saved[part] | {name: value}}
        yield f"{part} has more", saved | {part: saved[part] | {"more": 1}}
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        yield f"{name} of another shape", saved | {"model": saved["model"] | {name: torch.ones(3)}}
    other = copy.deepcopy(saved)
    for state in other["optimizer"]:
        for each in state["state"].values():
            for name, value in each.items():
                each[name] = torch.ones(2) if isinstance(value, torch.Tensor) else value
    yield "optimizer of another shape", other
    yield "no optimizer state", saved | {"optimizer": [{"state": {}, "param_groups": []}] * 2}
    for value in VALUES:
        yield f"a {type(value).__name__}", value


def test_damaged_fields(tmp_path, killed):
    """A sentence, or the same training."""
    train = Trainer(tmp_path)
    train("whole", **COMMON)
    whole = everything(train, "whole")
    killed(2, train, "a", **COMMON)
    path, saved = train.checkpoint("a"), train.saved("a")
    shutil.copytree(tmp_path / "a", tmp_path / "kept")
    refused = 0
    for what, content in some(list(damages(saved)), 25):
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(tmp_path / "kept", tmp_path / "a")
        save_tensors(path, content)
        try:
            train("a", resume=True, **COMMON)
        except UserError as error:
            assert path.name in str(error), what
            refused += 1
        else:
            assert same(everything(train, "a"), whole), what
    assert refused > 10


def test_a_checkpoint_that_is_no_file(tmp_path, killed):
    train = Trainer(tmp_path)
    killed(2, train, "a", **COMMON)
    path = train.checkpoint("a")
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(UserError, match="is no file"):
            train("a", resume=True, **COMMON)
        (os.unlink if make is os.mkfifo else os.rmdir)(path)


@pytest.mark.parametrize("stage", STAGES if ALL else [train_full_sft, train_distillation])
def test_weights_that_have_moved_are_the_same(tmp_path, killed, monkeypatch, stage, saved_model):
    """Identity is content: elsewhere, by a relative path, under another name."""
    train = Trainer(tmp_path, stage)
    if "from_weight" in train.more:
        train.more["from_weight"] = saved_model
    train("whole", **COMMON)
    killed(2, train, "a", **COMMON)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("from_weight", "teacher_weight"):
        value = train.more.get(name, "")
        if value.endswith(".pth"):
            for suffix in (".pth", ".json"):
                shutil.copy(value[:-4] + suffix, moved / f"other_{name}{suffix}")
            train.more[name] = str(moved / f"other_{name}.pth")
    train("a", resume=True, **COMMON)
    assert same(everything(train, "a"), everything(train, "whole"))
    monkeypatch.chdir(moved)
    train.more |= {
        name: os.path.basename(train.more[name])
        for name in ("from_weight", "teacher_weight")
        if train.more.get(name, "").endswith(".pth")
    }
    train("b", resume=True, **COMMON)
    assert same(everything(train, "b"), everything(train, "whole"))


def test_other_weights_of_the_same_name_are_refused(tmp_path, killed, saved_model):
    train = Trainer(tmp_path, train_full_sft)
    killed(2, train, "a", **COMMON, from_weight=saved_model)
    state = torch.load(saved_model, weights_only=True)
    state["model.norm.weight"] += 1
    save_tensors(saved_model, state)
    with pytest.raises(UserError, match="made with first weights"):
        train("a", resume=True, **COMMON, from_weight=saved_model)


@pytest.fixture
def saved_model(tmp_path) -> str:
    """Weights of the toys' size."""
    (tmp_path / "before").mkdir()
    Trainer(tmp_path / "before")(max_steps=1)
    (path,) = (tmp_path / "before").rglob("*.pth")
    return str(path)
