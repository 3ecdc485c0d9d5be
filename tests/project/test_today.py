"""benchmarks/today.py without its trainings: its files, commands, and facts that do not hold."""

import json
import shlex
from importlib import import_module
from types import SimpleNamespace

import pytest
import today
import torch
from stand_in import facts, rows
from stand_in.facts import SIZE, Workshop

from dataset.encoding import SEGMENTERS
from dataset.released import SETS
from model.command_line import parse_arguments, parse_command
from model.weights import ROOT
from scripts import prepare_data

STAGES = {"pretrain": "text", "dpo": "preferences"}  # others: conversations


def steps(year: int) -> list[today.Step]:
    files = rows.files(2026) | rows.files(year)
    make = today.steps_of_2026 if year == 2026 else today.steps_of_2025
    return make(files, {"config.json": b""}, {f"full_sft_{SIZE}.pth": b""})


@pytest.mark.parametrize("year", [2026, 2025])
def test_files_have_the_released_names_and_rows(year, tokenizer):
    files = rows.files(year)
    if year == 2026:
        assert set(SETS["mini"]) <= files.keys()
    else:
        assert set(SETS["2025"]) <= files.keys()
    for name, content in files.items():
        kind = STAGES.get(name.removesuffix(".jsonl").partition("_")[0], "conversations")
        for row in map(json.loads, content.decode().splitlines()[:3]):
            if name.startswith(("rlaif", "agent")):  # the last answer is the model's to write
                assert row["conversations"][-1]["content"] in ("", "空")
            else:
                assert SEGMENTERS[kind](tokenizer, row)
    assert files == rows.files(year)  # the same each time


def test_every_sum_of_an_agent_can_be_right():
    for row in rows.rows(2026)["agent_rl_math.jsonl"]:
        assert row["gt"] == [str(eval(row["conversations"][1]["content"].rstrip(" =?")))]


@pytest.mark.parametrize("year", [2026, 2025])
def test_steps_have_scripts_that_know_their_flags(year):
    """As a command would, up to where it begins to work."""
    for step in steps(year):
        script, *argv = shlex.split(step.command.format(port=8000))
        assert (ROOT / script).is_file()
        if script.startswith("trainer/"):
            parse_arguments(import_module(script[:-3].replace("/", ".")).Args, argv=argv)
        if script == "scripts/prepare_data.py":
            parse_command(prepare_data.FLAGS, None, argv)


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "out").mkdir()
    return Workshop(tmp_path, tmp_path)


def log(shop, stage, **metrics):
    """A log with one record for each value."""
    lines = [
        dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)
    ]
    path = shop.folder / "out" / f"{stage}_{SIZE}.metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def found(fact, shop, step="step"):
    return today.find(SimpleNamespace(fact=fact, name=step), shop)


def test_facts_that_do_not_hold(shop):
    weights = {"a": torch.zeros(4)}
    torch.save(weights, shop.folder / "out" / f"dpo_{SIZE}.pth")
    torch.save(weights, shop.folder / "out" / f"grpo_{SIZE}.pth")
    log(shop, "grpo", loss=[2.0, 1.0], reward=[0.5, 0.5])
    assert found(facts.learned("grpo"), shop) == (True, "loss 2.00 → 1.00")
    same = found(facts.learned("grpo", "dpo"), shop)
    assert same == (False, "the weights are those of dpo")
    assert found(facts.rewarded("grpo", "dpo", "reward"), shop) == (False, "reward is always 0.5")
    assert not found(facts.rewarded("grpo", "dpo", "success"), shop)[0]  # no such metric
    assert not found(facts.learned("nothing"), shop)[0]
    torch.save({"a": torch.tensor([0.0, 0, 0, 1])}, shop.folder / "out" / f"grpo_{SIZE}.pth")
    assert "25% of the weights changed" in found(facts.learned("grpo", "dpo"), shop)[1]
    for text, holds in (("128 tokens, 0 trained", False), ("128 tokens, 7 trained", True)):
        (shop.logs / "step.log").write_text(text)
        assert found(facts.masked, shop)[0] == holds
    answer = "full_sft_128: 1.0M parameters, cpu\n{}\n[9.9 tokens/s]\n"
    for text, holds in (
        ("hm\n</think>\nThe river.", False),
        ("<think>\nhm\n</think>\nThe river.", False),
        ("The river.", True),
    ):
        (shop.logs / "step.log").write_text(answer.format(text))
        assert found(facts.answers("The river."), shop)[0] == holds
    (shop.folder / "dpo.jsonl").write_bytes(b"other")
    assert found(facts.downloaded({"dpo.jsonl": b"this"}, "."), shop) == (
        False,
        "dpo.jsonl differs",
    )
