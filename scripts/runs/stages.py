"""The stages of scripts/runs/minimind.sh, and what its folder holds of each. Imports nothing slow.

A folder of a run, by default out/minimind, has the weights, logs and reports of the trainers and

    plan.json        what was asked for, how much time each stage has, and the estimate
    results.json     evaluate.py's: bits per byte, preferences
    questions.json   questions.py's: the fixed questions and each stage's answers; .md for reading
    benchmarks.json  eval_benchmark.py's, if it could be run
    report.html      report.py's page of it all
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dataset.released import default_data
from model.command_line import nearest
from model.errors import UserError
from model.paths import list_weights


class Stage(NamedTuple):
    """A stage of the run; the defaults of its trainer say the rest."""

    title: str
    trainer: str  # trainer/{trainer}.py
    data: str  # its files, in dataset/released.py
    start: str  # the stage whose weights it starts from, by its trainer's default
    share: float  # of the minutes, relative to the others'


STAGES = {  # in the order in which they run
    "pretrain": Stage("pretraining", "train_pretrain", "pretrain", "", 6),
    "full_sft": Stage("fine-tuning (SFT)", "train_full_sft", "full_sft", "pretrain", 4),
    "lora": Stage("LoRA", "train_lora", "lora", "full_sft", 0.5),
    "dpo": Stage("DPO", "train_dpo", "preferences", "full_sft", 1),
    "reward": Stage("reward model", "train_reward", "preferences", "full_sft", 1),
    "ppo": Stage("PPO", "train_ppo", "rl", "dpo", 2),
    "grpo": Stage("GRPO", "train_grpo", "rl", "dpo", 2),
    "spo": Stage("SPO", "train_spo", "rl", "dpo", 2),
    "reason": Stage("reasoning", "train_distill_reason", "reason", "dpo", 2),
    "agent": Stage("tool use", "train_agent", "agent", "full_sft", 2),
}
NUMBER = r"\d+([.]\d+)?"  # in a price
DEFAULT = ["pretrain", "full_sft", "dpo"]
CHAT = ["full_sft", "dpo", "ppo", "grpo", "spo"]  # the last that is there is the one to talk to
BENCHMARKS = "ceval cmmlu arc openbookqa"
WITH_REWARD_MODEL = {"ppo", "grpo", "spo"}  # real prompts have no answer that a rule could check


def in_order(names: list[str], folder: Path | str) -> list[str]:
    """The stages in the order in which they run, with the reward model that others need.

    Raises:
        UserError: an unknown stage, or one that starts from a stage which neither runs nor has
            weights in the folder.
    """
    for name in names:
        if name not in STAGES:
            known = ", ".join(STAGES)
            raise UserError(f"STAGES has no stage {name}; known are {known}{nearest(name, STAGES)}")
    wanted = set(names) | ({"reward"} if WITH_REWARD_MODEL & set(names) else set())
    for name in sorted(wanted):
        start = STAGES[name].start
        if start and start not in wanted and not list_weights(start, None, folder):
            raise UserError(
                f"{name} starts from {start}, which is not in STAGES and has no weights in {folder}"
            )
    return [name for name in STAGES if name in wanted]


@contextmanager
def stopped_quietly() -> Iterator[None]:
    """Ctrl-C ends a command without a traceback; the script says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def in_hours(price: str, seconds: float) -> str:
    """What so many seconds cost: "1.5 RMB" an hour and 1,200 s are "0.50 RMB"."""
    return re.sub(NUMBER, lambda hour: f"{float(hour[0]) * seconds / 3600:.2f}", price, count=1)


# -- what the folder holds -------------------------------------------------------------------------


def read_plan(folder: Path | str) -> dict[str, Any]:
    """plan.json; {} if there is none."""
    return read_json(Path(folder) / "plan.json")


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file, or a damaged one."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def weights_of(stage: str, folder: Path | str) -> Path | None:
    """The newest weights of a stage in the folder; of LoRA those of the adapter."""
    if stage == "lora":
        found = Path(folder, "lora").glob("*.pth")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    return next(iter(list_weights(stage, None, folder)), None)


def log_of(weights: Path) -> Path:
    return weights.with_suffix(".metrics.jsonl")


def is_finished(stage: str, folder: Path | str) -> bool:
    """Whether its training came to its end: only then a trainer logs what it changed at last."""
    weights = weights_of(stage, folder)
    if weights is None:
        return False
    with suppress(OSError):
        last = log_of(weights).read_text(encoding="utf-8").splitlines()[-1:]
        return any(re.search(r'^\{"step": \d+, "changed_fraction"', line) for line in last)
    return False


def finished_stages(folder: Path | str) -> list[str]:
    """In the order in which they run."""
    return [stage for stage in STAGES if is_finished(stage, folder)]


def flags_of(step: str, folder: Path | str) -> str:
    """The flags of a step's command by the plan; "" if it is not wanted, or done already.

    Args:
        step: a stage; data: the download; cut: a part of large files; benchmarks; chat.
    """
    plan = read_plan(folder)
    if not plan:
        raise UserError(f"{folder} has no plan.json; run plan.py without --stage first")
    if step == "data":
        return "" if plan["data_dir"] or not missing_data(plan["stages"]) else "--set mini"
    if step == "cut":
        return "1" if plan.get("cut") else ""
    if step in STAGES:
        wanted = plan["stages"].get(step)
        if not wanted or is_finished(step, folder):
            return ""
        check_finished(list(STAGES)[: list(STAGES).index(step)], plan, folder)
        often = ""
        if plan["minutes"] and plan["device"] == "cpu":  # a GPU makes 100 steps soon
            often = " --log_interval 10 --eval_interval 200 --save_interval 20"
        return f"--minutes {wanted['minutes']:g}{often}"
    there = finished_stages(folder)
    chat = [stage for stage in CHAT if stage in there][-1:]
    if step == "chat":
        return f"--weight {chat[0]}" if chat else ""
    stages = [stage for stage in there if stage == "pretrain" or stage in chat]
    if is_newer(Path(folder, "benchmarks.json"), [weights_of(stage, folder) for stage in stages]):
        return ""
    few = plan["device"] == "cpu" or plan["minutes"]  # a few questions of each subject
    return (
        f"--weight {' '.join(stages)} --tasks {BENCHMARKS} --skip_missing 1"
        + " --limit 5" * bool(few)
    )


def data_dir_of(folder: Path | str) -> str:
    """The folder of the data files that the run reads."""
    own = Path(folder, "data")
    return str(own) if own.is_dir() else read_plan(folder).get("data_dir", "")


def check_finished(stages: Iterable[str], plan: dict[str, Any], folder: Path | str) -> None:
    """UserError if one of these stages is in the plan, but was stopped before its end."""
    for stage in stages:
        if stage in plan.get("stages", {}) and not is_finished(stage, folder):
            raise UserError(f"{stage} was stopped before its end; the same command goes on with it")


def is_newer(made: Path, sources: Iterable[Path | None]) -> bool:
    """Whether a file was made after all of its sources."""
    times = [path.stat().st_mtime for path in sources if path]
    return not times or (made.exists() and made.stat().st_mtime > max(times))


def missing_data(stages: Iterable[str], folder: str = "") -> list[str]:
    """The stages that have no file in the folder, by default dataset/."""
    missing = []
    for stage in stages:
        try:
            default_data(STAGES[stage].data, folder)
        except UserError:
            missing.append(stage)
    return missing
