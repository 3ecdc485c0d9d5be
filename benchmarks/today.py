"""Does MiniMind work with the files that people have today, and with those of 2025?

    python benchmarks/today.py [--generation 2026 2025] [--keep FOLDER]        (make today)

A stand-in of the hub on this machine serves small files in the shapes of the released ones. In a
copy of the code each step runs as a user would call it, with default flags except for sizes and
steps: download, pretraining, SFT with thoughts and tools, DPO, GRPO, agent, LoRA, chat, server,
export. A step has an exit code and shows one fact (stand_in/facts.py). Nothing else is reached over
a network. Minutes on two cores; exit code 1 if a step fails.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    generation: list[int] = option([2026, 2025], "of the files: 2026, 2025")
    keep: str = option("", "new folder for code, logs and weights; default: deleted")
    step: list[str] = option([], "run these steps only, in a folder kept before")

    def __post_init__(self) -> None:
        if set(self.generation) - {2026, 2025} or not self.generation:
            raise UserError("--generation must be 2026, 2025 or both")
        if self.step and not Path(self.keep).is_dir():
            raise UserError("--step needs --keep with the folder of a run before")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from rich.console import Console
from rich.table import Table
from stand_in.facts import (
    SIZE,
    Workshop,
    adapter,
    answers,
    downloaded,
    exported,
    learned,
    masked,
    rewarded,
    said,
    served,
)
from stand_in.hub import Files, Hub, serving
from stand_in.models import models
from stand_in.rows import NAME, QUESTIONS, files
from transformers.utils.logging import disable_progress_bar

from dataset.released import REVISION, SETS

ROOT = Path(__file__).resolve().parent.parent
CODE = ("model", "dataset", "trainer", "scripts", "eval_llm.py")
DATA = "datasets/jingyaogong/minimind_dataset"
STEP_SECONDS = 900


@dataclass
class Step:
    name: str
    command: str  # as typed after `python`, from the project's folder
    fact: Callable[..., str]
    stdin: str = ""
    serves: bool = False  # runs until the fact is found


@dataclass
class Result:
    step: str
    code: int
    holds: bool  # the fact
    fact: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.holds and self.code == 0

    def __str__(self) -> str:
        state = "ok" if self.passed else "FAILS"
        return f"{self.step}: {state}, exit {self.code}, {self.fact} ({self.seconds:.0f} s)"


# -- the steps -------------------------------------------------------------------------------------

DOWNLOAD = "scripts/prepare_data.py download"
SIZES = "--hidden_size 128 --num_hidden_layers 2"
CPU = "--device cpu --num_workers 0 --log_interval 1"
TRAIN = f"{CPU} --batch_size 8 --accumulation_steps 1"
FULL_SIZE = f"{CPU} --max_steps 1 --batch_size 1 --max_seq_len 64 --val_share 0"
EMPTY = "--empty_think_ratio 0.5"  # more than by default, as the rows are so few
LORA = f"{CPU} --batch_size 2 --max_seq_len 128"
RL = f"{CPU} --max_steps 6 --max_gen_len 48"
CHAT = "--device cpu --temperature 0 --max_new_tokens 48 --show_speed 0"
SERVE = "scripts/serve_openai_api.py --device cpu --port {port}"
TO_HF = "scripts/convert_model.py to-hf"
SFT_WEIGHTS = f"out/full_sft_{SIZE}.pth"
sft_learned = learned("full_sft", "pretrain")
SUM = "{}*{} = ?".format(*QUESTIONS[0])


def steps_of_2026(data: Files, folder: Files, weights: Files) -> list[Step]:
    mini = {name: data[name] for name in SETS["mini"]}
    pth, theirs = f"minimind-3-pytorch/full_sft_{SIZE}.pth", "--tokenizer_path minimind-3"
    return [
        Step("download", f"{DOWNLOAD} --set mini", downloaded(mini, "dataset")),
        Step(
            "preset",
            f"trainer/train_pretrain.py --preset minimind-3 --save_weight preset {FULL_SIZE}",
            said(r"63\.91M parameters"),
        ),
        Step(
            "pretrain",
            f"trainer/train_pretrain.py --preset minimind-3 {SIZES} {TRAIN} --max_steps 30",
            learned("pretrain"),
        ),
        Step("mask", "scripts/show_batch.py", masked),
        Step(
            "sft",
            f"trainer/train_full_sft.py {TRAIN} --batch_size 4 --epochs 10 {EMPTY}",
            sft_learned,
        ),
        Step("reward", f"trainer/train_reward.py {CPU} --max_steps 8", learned("reward")),
        Step("dpo", f"trainer/train_dpo.py {CPU} --max_steps 8", learned("dpo", "full_sft")),
        Step("grpo", f"trainer/train_grpo.py {RL}", rewarded("grpo", "dpo", "reward")),
        Step(
            "agent",
            f"trainer/train_agent.py {RL}",
            rewarded("agent", "full_sft", "rewards/answer/mean", "tools/call_frequency"),
        ),
        Step("lora", f"trainer/train_lora.py {LORA}", adapter("lora_identity")),
        Step(
            "chat",
            f"eval_llm.py {CHAT} --open_thinking 0",
            answers("For the river."),
            "Why river?\n",
        ),
        Step(
            "chat lora",
            f"eval_llm.py {CHAT} --lora_weight lora_identity",
            answers(NAME),
            "Who are you?\n",
        ),
        Step("serve", SERVE, served("Why river?", "chat", calls=SUM), serves=True),
        Step("export", f"{TO_HF} {SFT_WEIGHTS} exported", exported(SFT_WEIGHTS, "exported")),
        Step("released", f"{DOWNLOAD} --model minimind-3", downloaded(folder, "minimind-3")),
        Step(
            "released pth",
            f"{DOWNLOAD} --model minimind-3-pytorch",
            downloaded(weights, "minimind-3-pytorch"),
        ),
        Step("its mask", f"scripts/show_batch.py {theirs}", masked),
        Step(
            "its sft",
            f"trainer/train_full_sft.py --from_weight {pth} {theirs} --save_weight its {TRAIN} "
            "--max_steps 8",
            learned("its", pth),
        ),
        Step(
            "its chat",
            f"eval_llm.py --load_from ./minimind-3 {CHAT} --open_thinking 0",
            answers(""),
            "Why river?\n",
        ),
    ]


def steps_of_2025(data: Files, folder: Files, weights: Files) -> list[Step]:
    older = {name: data[name] for name in SETS["2025"]}
    more = {name: data[name] for name in ("dpo.jsonl", "lora_identity.jsonl")}
    pth, theirs = f"MiniMind2-Pytorch/full_sft_{SIZE}.pth", "--tokenizer_path MiniMind2-Small"
    return [
        Step("download", f"{DOWNLOAD} --set 2025", downloaded(older, "dataset")),
        Step("others", f"{DOWNLOAD} --file {' '.join(more)}", downloaded(more, "dataset")),
        Step(
            "pretrain",
            f"trainer/train_pretrain.py {SIZES} {TRAIN} --max_steps 30",
            learned("pretrain"),
        ),
        Step("mask", "scripts/show_batch.py", masked),
        Step("sft", f"trainer/train_full_sft.py {TRAIN} --epochs 6", sft_learned),
        Step("reward", f"trainer/train_reward.py {CPU} --max_steps 8", learned("reward")),
        Step("dpo", f"trainer/train_dpo.py {CPU} --max_steps 8", learned("dpo", "full_sft")),
        Step("grpo", f"trainer/train_grpo.py {RL}", rewarded("grpo", "dpo", "reward")),
        Step(
            "reason",
            f"trainer/train_distill_reason.py {CPU} --batch_size 2 --epochs 6",
            learned("reason", "dpo"),
        ),
        Step("lora", f"trainer/train_lora.py {LORA}", adapter("lora_identity")),
        Step("chat", f"eval_llm.py {CHAT}", answers(NAME), "Who are you?\n"),
        Step("serve", SERVE, served("Who are you?", "chat"), serves=True),
        Step("export", f"{TO_HF} {SFT_WEIGHTS} exported", exported(SFT_WEIGHTS, "exported")),
        Step(
            "released", f"{DOWNLOAD} --model minimind2-small", downloaded(folder, "MiniMind2-Small")
        ),
        Step(
            "released pth",
            f"{DOWNLOAD} --model minimind2-pytorch",
            downloaded(weights, "MiniMind2-Pytorch"),
        ),
        Step("its export", f"{TO_HF} {pth} its {theirs}", exported(pth, "its")),
        Step(
            "its sft",
            f"trainer/train_full_sft.py --from_weight {pth} {theirs} --save_weight its {TRAIN} "
            "--max_steps 8",
            learned("its", pth),
        ),
    ]


# -- running them ----------------------------------------------------------------------------------


def run(step: Step, shop: Workshop, environment: dict[str, str]) -> Result:
    """The command, and then the fact; that of a server while it runs."""
    began, found, port = time.perf_counter(), None, free_port()
    shop.address = f"http://127.0.0.1:{port}"
    words = [sys.executable, *shlex.split(step.command.format(port=port))]
    with open(shop.logs / f"{step.name}.log", "wb") as log:
        process = subprocess.Popen(
            words, cwd=shop.folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
        try:
            if step.serves:
                found = find(step, shop)
                process.send_signal(signal.SIGINT)
            process.communicate(step.stdin.encode(), timeout=STEP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode and not found:
        lines = shop.text(step.name).split("\n")
        found = False, next((line for line in reversed(lines) if line.strip()), "no output")
    holds, fact = found or find(step, shop)
    return Result(step.name, process.returncode, holds, fact, time.perf_counter() - began)


def find(step: Step, shop: Workshop) -> tuple[bool, str]:
    """Whether the fact holds, and what it says."""
    try:
        return True, step.fact(shop, step.name)
    except Exception as error:  # whatever a step has not made, or made wrong
        return False, f"{type(error).__name__}: {error}".removeprefix("AssertionError: ")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def copy_code(folder: Path) -> None:
    """The code without data, weights and caches: a fresh copy, as after cloning."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        top = Path(directory) == ROOT / "dataset"
        return [
            name
            for name in names
            if name in ("__pycache__", ".cache") or (top and ".jsonl" in name)
        ]

    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, folder)


def run_generation(year: int, folder: Path, only: list[str]) -> list[Result]:
    """All steps with the files of a year."""
    shop = Workshop(folder / f"minimind_{year}", folder / f"logs_{year}")
    if not shop.folder.is_dir():
        copy_code(shop.folder)
    shop.logs.mkdir(parents=True, exist_ok=True)
    today, released = files(2026), models(year)
    hub = Hub({DATA: today, **released})
    hub.commit = REVISION
    hub.older[DATA] = {"5" * 40: files(2025)}  # as on the hub: gone from its main branch
    steps = steps_of_2026 if year == 2026 else steps_of_2025
    data = today if year == 2026 else files(2025) | today
    results = []
    with serving(hub) as address:
        environment = {
            **{name: value for name, value in os.environ.items() if name[:3] != "HF_"},
            "HF_ENDPOINT": address,
            "HF_HOME": str(shop.logs / "hf"),
            "PYTHONPATH": str(shop.folder),
            "NO_PROXY": "127.0.0.1",
        }
        for step in steps(data, *released.values()):
            if only and step.name not in only:
                continue
            results.append(run(step, shop, environment))
            print(f"{year} {results[-1]}", flush=True)
    return results


def main(args: Args) -> bool:
    """Whether all steps pass."""
    disable_progress_bar()  # of the small models that are made here
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary).resolve()
        results = {year: run_generation(year, folder, args.step) for year in args.generation}
    table = Table("files of", "step", "exit", "fact", "seconds")
    for year, of_year in results.items():
        for result in of_year:
            style = "" if result.passed else "red"
            seconds = f"{result.seconds:.0f}"
            table.add_row(
                str(year), result.step, str(result.code), result.fact, seconds, style=style
            )
    Console().print(table)
    everything = [result for of_year in results.values() for result in of_year]
    failed = sum(not result.passed for result in everything)
    minutes = sum(result.seconds for result in everything) / 60
    print(f"{failed} of {len(everything)} steps fail; {minutes:.1f} minutes")
    return not failed


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(0 if main(args) else 1)
