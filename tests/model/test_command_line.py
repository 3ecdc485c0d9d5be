"""Command lines out of dataclasses: kinds of flags, their rules, and flags of other versions."""

import re
from dataclasses import dataclass
from typing import Literal

import pytest

import eval_llm  # noqa: I001
from model.command_line import Ignored, Refused, option, parse_arguments, parse_command
from model.errors import UserError, tell_once
from model.model_lora import ATTENTION_MODULES
from scripts import eval_toolcall
from scripts.serving.arguments import ServerArgs
from trainer import train_agent, train_distillation, train_grpo, train_lora, train_ppo
from trainer import train_pretrain as pretrain


@dataclass
class Args:
    legacy_flags = {
        "engine": {"own": Ignored("there is one", also=("address",)), "other": "--mode fast"},
        "address": "--name {} --mode fast",
        "gone": Refused("--count does it"),
    }
    count: int = option(1, "how many", at_least=1, alias=("number",))
    rate: float | None = option(None, "how fast", above=0, at_most=1)
    names: list[str] = option(["a"], "which")
    mode: Literal["slow", "fast"] = option("slow", "how")
    on: bool = option(True, "or off")
    off: bool = option(False, "or on")
    maybe: bool | None = option(None, "on, off or neither")
    name: str = option("", "what 100%% means", needs="mode=fast")


def parse(*argv: str) -> Args:
    return parse_arguments(Args, argv=argv)


@pytest.fixture(autouse=True)
def fresh():
    tell_once.cache_clear()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Args()),
        (["--count", "3", "--rate=0.5"], Args(count=3, rate=0.5)),
        (["--names", "b", "c"], Args(names=["b", "c"])),
        (["--on", "0", "--off"], Args(on=False, off=True)),
        (["--no_on", "--off", "true"], Args(on=False, off=True)),
        (["--no-on", "--maybe", "no"], Args(on=False, maybe=False)),
        (["--maybe"], Args(maybe=True)),
        (["--mode", "fast", "--name", "x"], Args(mode="fast", name="x")),
        (["--number", "3"], Args(count=3)),
        (["--number=3", "--engine", "other"], Args(count=3, mode="fast")),
        (["--engine", "own", "--address", "x"], Args()),
        (["--address", "x", "--name", "y"], Args(mode="fast", name="y")),
    ],
)
def test_words_and_what_they_mean(argv, expected):
    assert parse(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--cuont", "3"], "unknown argument --cuont; did you mean --count?"),
        (["--xyz"], r"unknown argument --xyz \(--help"),
        (["stray"], "unknown argument stray"),
        (["--count", "0"], "--count must be at least 1, not 0"),
        (["--rate", "1.5"], "--rate must be more than 0 and at most 1, not 1.5"),
        (["--rate", "nan"], "--rate must be a finite number, not nan"),
        (["--mode", "fats"], "invalid choice: 'fats' .choose from slow, fast; did you mean fast?"),
        (["--off", "maybe"], "'maybe' is neither 1 nor 0"),
        (["--name", "x"], "--name has no effect without --mode fast"),
        (["--engine", "third"], "--engine third is unknown; known are own, other"),
        (["--gone", "1"], "--gone is not a flag here: --count does it"),
    ],
)
def test_mistakes(argv, told):
    with pytest.raises(UserError, match=told):
        parse(*argv)


def test_what_is_replaced_is_told_once_in_a_line(capsys):
    parse("--number", "3")
    parse("--number", "3")
    assert capsys.readouterr().err == "note: --number is --count here\n"
    parse("--engine", "own")
    assert capsys.readouterr().err == "note: --engine own has no effect here: there is one\n"


def test_a_script_of_several_commands(capsys):
    assert parse_command({"one": Args}, "about", ["one", "--count", "2"]) == ("one", Args(count=2))
    for argv, told in (
        (["two"], "invalid choice: 'two' (choose from one)"),
        ([], "no command is given (choose from one)"),
        (["one", "--cuont", "2"], "did you mean --count?"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            parse_command({"one": Args}, "about", argv)
    with pytest.raises(SystemExit) as end:
        parse_command({"one": Args}, "about the script", ["--help"])
    assert end.value.code == 0 and "about the script" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args_class", "argv", "told"),
    [
        (pretrain.Args, ["--val_share", "0.1", "--val_path", "x"], "no effect with --val_path"),
        (pretrain.Args, ["--epochs", "0"], "--epochs must be more than 0"),
        (train_grpo.Args, ["--judge_url", "u", "--reward", "answer"], "without --reward judge"),
        (
            train_distillation.Args,
            ["--teacher_weight", "t.pth", "--teacher_use_moe", "1"],
            "names the file or folder itself",
        ),
        (ServerArgs, ["--temperature", "-1"], "--temperature must not be negative"),
        (ServerArgs, ["--top_p", "0"], "--top_p must be more than 0 and at most 1"),
        (ServerArgs, ["--top_k", "-1"], "--top_k must not be negative"),
        (ServerArgs, ["--yarn_factor", "4"], "without --inference_rope_scaling 1"),
    ],
)
def test_flags_without_effect_or_sense_are_refused(args_class, argv, told):
    with pytest.raises(UserError, match=told):
        args = parse_arguments(args_class, argv=argv)
        args.teacher_path()


@pytest.mark.parametrize(
    ("args_class", "argv", "told"),
    [
        (pretrain.Args, ["--wandb_project", "p"], "--wandb_project has no effect without"),
        (pretrain.Args, ["--tracker", "swanlab"], "--tracker has no effect without --use_wandb 1"),
        (
            train_grpo.Args,
            ["--reward", "answer", "--reward_model_path", "x", "--trust_remote_code"],
            "--reward_model_path has no effect without --reward transformers",
        ),
    ],
)
def test_habits_without_effect_are_told(args_class, argv, told, capsys):
    parse_arguments(args_class, argv=argv)
    assert told in capsys.readouterr().err


def test_own_weights_beside_a_transformers_folder_are_told(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    argv = ["--load_from", str(tmp_path), "--weight", "pretrain", "--hidden_size", "768"]
    parse_arguments(eval_llm.Args, argv=argv)
    told = capsys.readouterr().err
    assert "--weight has no effect" in told and "--hidden_size has no effect" in told


def test_the_default_targets_of_lora():
    assert train_lora.Args().lora_targets == list(ATTENTION_MODULES)


SGLANG = ["--rollout_engine", "sglang", "--sglang_base_url", "http://localhost:8998"]
SERVED = dict(rollout_url="http://localhost:8998", rollout_reload="sglang", rollout_folder="w")
SERVER = [*SGLANG, "--sglang_shared_path", "w", "--sglang_model_path", "../model"]
LOCAL = ["--rollout_engine", "torch", *SGLANG[2:], "--sglang_shared_path", "w"]


@pytest.mark.parametrize(
    ("args_class", "argv", "expected"),
    [
        (pretrain.Args, ["--use_compile", "1"], dict(compile=True)),
        (
            train_distillation.Args,
            "--student_num_layers 4 --teacher_num_layers 8 --from_student_weight pretrain "
            "--from_teacher_weight full_sft".split(),
            dict(
                student_num_hidden_layers=4,
                teacher_num_hidden_layers=8,
                from_weight="pretrain",
                teacher_weight="full_sft",
            ),
        ),
        (train_grpo.Args, SERVER, SERVED),
        (train_ppo.Args, SERVER, SERVED),
        (train_agent.Args, SERVER, SERVED),
        (train_grpo.Args, LOCAL, {}),
        (
            train_ppo.Args,
            "--lam 0.9 --cliprange_value 0.3 --ppo_update_iters 3 --early_stop_kl 0.25 "
            "--update_old_actor_freq 4".split(),
            dict(gae_lambda=0.9, value_clip=0.3, update_epochs=3, target_kl=0.25),
        ),
        (train_agent.Args, ["--max_total_len", "900"], dict(max_total_len=900)),
        (
            eval_llm.Args,
            "--use_moe 0 --num_hidden_layers 8 --lora_weight None".split(),
            dict(use_moe=False, num_hidden_layers=8, lora_weight=""),
        ),
        (
            ServerArgs,
            "--use_moe 1 --max_seq_len 900 --lora_weight None".split(),
            dict(use_moe=True, max_length=900, lora_weight=""),
        ),
        (
            eval_toolcall.Args,
            "--backend local --api_base_url u --api_key k --api_model m --top_p 0.9 "
            "--show_speed 1".split(),
            dict(top_p=0.9),
        ),
    ],
)
def test_flags_that_peoples_scripts_pass(args_class, argv, expected):
    assert parse_arguments(args_class, argv=argv) == args_class(**expected)


@pytest.mark.parametrize(
    ("args_class", "argv", "told"),
    [
        (train_ppo.Args, ["--mini_batch_size", "2"], "--num_minibatches"),
        (eval_toolcall.Args, ["--backend", "api"], "chat_openai_api.py"),
    ],
)
def test_flags_that_nothing_can_replace(args_class, argv, told):
    with pytest.raises(UserError, match=told):
        parse_arguments(args_class, argv=argv)
