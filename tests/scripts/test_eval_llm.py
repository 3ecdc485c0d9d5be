"""Talking to a model in the terminal, through the command line, as a person would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval_llm import Args
from model.command_line import parse_arguments
from model.errors import UserError
from model.formats.lora_format import save_lora
from model.model_lora import LoraConfig, add_lora, lora_layers
from model.weights import ROOT, load_model, save_weights, weight_path
from scripts.serving.prompts import CHAT_EXAMPLES, TEXT_EXAMPLES


@pytest.fixture
def weights(make_model, tokenizer, tmp_path) -> Path:
    """A folder with untrained weights of two stages."""
    model = make_model(vocab_size=len(tokenizer), hidden_size=32)
    for stage in ("pretrain", "full_sft"):
        path = weight_path(stage, 32, tmp_path)
        save_weights(model, path, stage=stage, tokenizer=tokenizer, origin={})
    return tmp_path


def talk(*flags: object, typed: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "eval_llm.py", "--device", "cpu", *map(str, flags)],
        input=typed,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "examples"), [("full_sft", CHAT_EXAMPLES), ("pretrain", TEXT_EXAMPLES)]
)
def test_automatic_prompts_are_answered(weights, tmp_path, stage, examples):
    result = talk(
        "--save_dir", weights, "--weight", stage, "--prompts", "auto", "--max_new_tokens", 4,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{stage}: 0.2")  # millions of parameters
    assert re.findall(r"^> (.*)$", result.stdout, re.MULTILINE) == examples
    assert len(re.findall(r"^\[[0-9.]+ tokens/s\]$", result.stdout, re.MULTILINE)) == len(examples)


@pytest.mark.slow
def test_piped_prompts_are_answered_one_a_line_and_the_same_with_a_seed(weights):
    flags = ["--save_dir", weights, "--max_new_tokens", 8, "--seed", 1, "--no_show_speed"]
    first = talk(*flags, typed="你是谁？\n\nWho are you? <|im_end|>\n")
    assert first.returncode == 0, first.stderr
    assert re.findall(r"^> (.*)$", first.stdout, re.MULTILINE) == [
        "你是谁？",
        "Who are you? <|im_end|>",
    ]
    assert "tokens/s" not in first.stdout
    assert talk(*flags, typed="你是谁？\n\nWho are you? <|im_end|>\n").stdout == first.stdout


@pytest.mark.slow
def test_several_models_answer_in_turn_and_the_conversation_is_kept(weights, tmp_path):
    flags = ["--save_dir", weights, "--weight", "pretrain", "full_sft", "--max_new_tokens", 4]
    lines = ["/help", "forget this", "/clear", "hello", f"/save {tmp_path}/kept.json"]
    typed = "\n".join([*lines, f"/save {tmp_path}/kept.json/x", "/quit", "never asked"])
    result = talk(*flags, typed=typed)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\[(\w+)\]$", result.stdout, re.MULTILINE) == ["pretrain", "full_sft"] * 2
    assert "/clear        forget" in result.stdout
    assert f"cannot write {tmp_path}/kept.json/x" in result.stdout
    kept = json.loads((tmp_path / "kept.json").read_text())
    for name in ("pretrain", "full_sft"):
        assert [m["role"] for m in kept[name]] == ["user", "assistant"]
        assert kept[name][0]["content"] == "hello"


@pytest.mark.slow
def test_an_addition_changes_the_answers(weights, tokenizer):
    model = load_model(weight_path("full_sft", 32, weights))
    settings = LoraConfig(alpha=64.0)
    add_lora(model, settings)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight)
    path = weight_path("lora/persona", 32, weights)
    save_lora(model, path, stage="lora", config=settings, tokenizer=tokenizer, origin={})
    flags = ["--save_dir", weights, "--temperature", 0, "--max_new_tokens", 8, "--no_show_speed"]
    answers = []
    for more in ([], ["--lora_weight", "persona"], ["--lora_weight", path]):
        result = talk(*flags, *more, typed="Who are you?\n")
        assert result.returncode == 0, result.stderr
        answers.append(result.stdout)
    assert answers[0] != answers[1] == answers[2]
    missing = talk(*flags, "--lora_weight", "nobody", typed="x\n")
    assert missing.returncode == 2 and "persona_32.pth" in missing.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--weight", "dpo"], "full_sft_32.pth, pretrain_32.pth"), (["--wieght", "dpo"], "--wieght")],
    ids=["missing_weights", "unknown_flag"],
)
def test_a_mistake_is_one_line_and_exit_code_2(weights, flags, words):
    result = talk("--save_dir", weights, *flags)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*\n", result.stderr)
    assert words in result.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "-1"],
        ["--top_p", "0"],
        ["--top_p", "1.5"],
        ["--max_new_tokens", "0"],
        ["--max_new_tokens", "many"],
        ["--historys", "-2"],
        ["--prompts", "none"],
        ["--seed"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_bad_values_of_flags_are_named(flags):
    with pytest.raises(UserError, match=flags[0]):
        parse_arguments(Args, argv=flags)


def test_settings_of_yarn_need_yarn():
    flags = "--yarn_factor 16.0 --yarn_original_length 512".split()
    with pytest.raises(UserError, match="--yarn_factor has no effect without --inference_rope"):
        parse_arguments(Args, None, flags)
    args = parse_arguments(Args, None, ["--inference_rope_scaling", "1", *flags])
    settings = dict(inference_rope_scaling=True, yarn_factor=16.0, yarn_original_length=512)
    assert args.config_fields() == settings
    assert Args().config_fields() == {}
