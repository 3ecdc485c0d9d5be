"""Which file a stage trains on when no --data_path is given."""

import os
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest

from dataset import released
from dataset.jsonl import check_file
from dataset.released import OLDER, SIZES, default_data, resolve_data_path
from model.command_line import rules_of
from model.errors import UserError
from scripts import show_batch, train_tokenizer
from trainer import train_agent, train_full_sft, train_pretrain

STAGES = sorted(path.stem for path in Path(train_pretrain.__file__).parent.glob("train_*.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "DATASET", tmp_path)
    return tmp_path


def test_todays_file_comes_first_and_mini_before_full(folder):
    for name in ("sft_1024", "sft_mini_512", "sft_t2t", "sft_t2t_mini"):
        (folder / f"{name}.jsonl").touch()
        assert default_data("full_sft") == str(folder / f"{name}.jsonl")
    args = train_full_sft.Args()
    assert args.data_path == []  # looked for when the training starts
    resolve_data_path(args)
    assert args.data_path == [str(folder / "sft_t2t_mini.jsonl")]
    args = train_full_sft.Args(data_path=["mine.jsonl"])
    resolve_data_path(args)
    assert args.data_path == ["mine.jsonl"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_trainer_has_a_default(folder, stage):
    args = import_module(f"trainer.{stage}").Args()
    with pytest.raises(UserError, match=r"no training data.*download --set mini.*--data_path"):
        resolve_data_path(args)
    about = {each.name: each for each in fields(args)}["data_path"].metadata["help"]
    names = released.names_of(rules_of(type(args))["data_path"]["released"])
    assert all(name in about for name in names)
    (folder / names[-1]).touch()
    resolve_data_path(args)
    assert args.data_path == [str(folder / names[-1])]


def test_agent_and_rl_differ():
    """A class that inherits another stage's --data_path has its own default."""
    assert rules_of(train_agent.Args)["data_path"]["released"] == "agent"
    assert rules_of(train_agent.Args.__base__)["data_path"]["released"] == "rl"


def test_scripts_have_the_defaults_of_their_stage(folder):
    for script in (show_batch, train_tokenizer):
        with pytest.raises(UserError, match="there is no training data: .* has none of"):
            script.main(script.Args())
    with pytest.raises(UserError, match="none of dpo.jsonl"):
        show_batch.main(show_batch.Args(kind="preferences"))


# -- --data_dir ------------------------------------------------------------------------------------


def test_a_folder_of_ones_own(tmp_path):
    """Plain names and .gz are found there, after the released ones."""
    (tmp_path / "sft.jsonl.gz").touch()
    args = train_full_sft.Args(data_dir=str(tmp_path))
    resolve_data_path(args)
    assert args.data_path == [str(tmp_path / "sft.jsonl.gz")] and args.val_path == []
    (tmp_path / "sft_mini_512.jsonl.gz").touch()
    args = train_full_sft.Args(data_dir=str(tmp_path))
    resolve_data_path(args)
    assert args.data_path == [str(tmp_path / "sft_mini_512.jsonl.gz")]
    again = replace(args, learning_rate=1e-3)  # as --minutes and evaluations of RL do
    assert again.data_path == args.data_path


def test_the_held_out_file_beside_it(tmp_path):
    for name in ("pretrain.jsonl.gz", "pretrain_val.jsonl", "dpo_val.jsonl"):
        (tmp_path / name).touch()
    found = {}
    for name, given in (
        ("none", {}),
        ("share", {"val_share": 0.05}),
        ("nothing", {"val_share": 0.0}),
        ("other", {"val_path": ["mine.jsonl"]}),
    ):
        args = train_pretrain.Args(data_dir=str(tmp_path), **given)
        resolve_data_path(args)
        found[name] = args.val_path
    own = [str(tmp_path / "pretrain_val.jsonl")]
    assert found == {"none": own, "share": [], "nothing": [], "other": ["mine.jsonl"]}
    args = train_pretrain.Args(data_path=[str(tmp_path / "pretrain.jsonl.gz")])
    resolve_data_path(args)
    assert args.val_path == []  # only beside a file that was looked for


def test_a_folder_without_data(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder.*--data_dir names another"):
        default_data("full_sft", tmp_path / "nowhere")
    with pytest.raises(UserError, match="has none of sft_t2t_mini.jsonl.* sft.jsonl. "):
        default_data("full_sft", tmp_path)
    with pytest.raises(UserError, match="--data_dir has no effect with --data_path"):
        train_pretrain.Args(data_dir="a", data_path=["b.jsonl"])


@pytest.mark.parametrize("name", ["pretrain_t2t.jsonl", "sft_512.jsonl"])
def test_a_released_file_that_is_missing(folder, name):
    assert name in SIZES or name in OLDER
    with pytest.raises(UserError, match=f"does not exist; `.* download --file {name}` downloads"):
        check_file(os.fspath(folder / name))
