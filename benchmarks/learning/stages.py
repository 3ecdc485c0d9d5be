"""Does each algorithm learn? Each stage, from a small undertrained model, with several seeds.

    python benchmarks/learning/stages.py [--stage dpo grpo] [--seeds 42 43 44]    (make stages)

The base model is the demo's (3.0M parameters, data of `python -m dataset.demo`). Its fine-tuning is
stopped before the learning rate decays, so that it answers about half of the held-out questions of
the skills. It is trained once and kept in --output, as all other weights. Then each stage is
trained for some minutes with each seed, one training per core, by the commands in the logs next to
the weights, and evaluated on held-out data:

    skill_accuracy       exact-match accuracy of greedy answers to held-out problems of 13 skills
    rule_reward          similarity of these answers to the right ones, from 0 to 1
    preference_accuracy  share of held-out pairs in which the chosen answer has the higher implicit
                         reward log π/π_ref of DPO
    pair_accuracy        of the reward model: share of held-out pairs with the chosen answer higher
    kl                   KL divergence from the base model per answer (sampled at temperature 1)
    length               mean length of an answer, in tokens

with standard errors. Distillation, reasoning and tools have metrics of their own; see
stage_distillation.py, stage_reason.py and stage_tools.py. The report has a row for each metric with
a target: {stage, seed, metric, before, after, target, met, details}, where details has the other
metrics. A plot shows the training curves.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stage_distillation
import stage_reason
import stage_tools
import torch
from held_out import held_out_evaluation
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from trainings import plot_curves, run_trainer

from dataset.demo.files import write_demo_data
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.weights import OUT, load_model, write_json
from scripts.runs.demo import COMMON, HIDDEN_SIZE, PRETRAIN, SFT
from trainer.common.hardware import describe_machine

BASE_STEPS = {"pretrain": 480, "full_sft": 750}  # of about 1,340 in the demo
FROM = "--from_weight {base}/full_sft_{size}.pth"
# Many different prompts per step and few answers to each: that averages out the noise best.
RL = f"""{FROM} --data_path {{data}}/rlaif-mini.jsonl --val_share 0 --epochs 9
    --reward answer:0.5 similarity:0.5 --max_gen_len 48 --update_batch_size 64
    --rollout_batch_size 128 --num_workers 0 --learning_rate 2e-4"""
PAIRS = f"""{FROM} --data_path {{data}}/dpo.jsonl --val_path {{data}}/dpo_val.jsonl
    --val_documents 1000 --max_seq_len 256 --num_workers 0"""


@dataclass
class Stage:
    """Of trainer/train_NAME.py, by its name in STAGES."""

    flags: str
    targets: dict[str, tuple[str, float]]  # metric → ("level", at least) or ("gain", over before)
    curve: str  # metric of the log that is plotted


UP_15 = {"skill_accuracy": ("gain", 0.15)}
STAGES = {
    "reward": Stage(
        f"{PAIRS} --batch_size 8 --learning_rate 4e-4",
        {"pair_accuracy": ("level", 0.85)},
        "rewards/accuracies",
    ),
    "dpo": Stage(
        f"{PAIRS} --batch_size 16 --learning_rate 1e-5",
        {"preference_accuracy": ("level", 0.85), "skill_accuracy": ("gain", -0.03)},
        "rewards/accuracies",
    ),
    "ppo": Stage(
        f"{RL} --batch_size 128 --critic_learning_rate 2e-4 --kl_coef 0 --update_epochs 1 "
        "--max_steps 90",
        UP_15,
        "reward",
    ),
    "grpo": Stage(
        f"{RL} --batch_size 32 --num_generations 4 --loss_type dr_grpo --beta 0 --max_steps 110",
        UP_15,
        "reward",
    ),
    "spo": Stage(
        f"{RL} --batch_size 128 --accumulation_steps 1 --beta 0.1 --max_steps 100",
        UP_15,
        "reward",
    ),
}


OTHER_STAGES = {  # functions that train with a seed and return rows of the report
    "distillation": stage_distillation.distillation,
    "reason": stage_reason.reason,
    "toolcall": stage_tools.toolcall,
    "agent": stage_tools.agent,
}
STAGE_NAMES = [*STAGES, *OTHER_STAGES]


@dataclass
class Args:
    stage: list[str] = option(STAGE_NAMES, "stages to run")
    seeds: list[int] = option([42, 43, 44], "random seeds; each stage is trained with each")
    questions: int = option(120, "maximum number of held-out questions of each skill")
    jobs: int = option(os.cpu_count() or 1, "number of trainings in parallel")
    output: str = option(str(OUT / "stages"), "folder of data, weights, logs and plot")
    json: str = option(str(OUT / "stages_report.json"), "file of the report")
    max_steps: int = option(0, "most optimizer steps of each training, for a quick test; 0: all")


def main(args: Args) -> dict[str, Any]:
    unknown = set(args.stage) - set(STAGE_NAMES)
    if unknown:
        raise UserError(f"--stage: {min(unknown)} is unknown; known are {', '.join(STAGE_NAMES)}")
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    started, console, out = time.time(), Console(highlight=False), Path(args.output)
    base = train_base(console, out, args)
    evaluation = held_out_evaluation(out / "data", base, args.questions)
    before = evaluation.evaluate_policy(evaluation.base)
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in before.items())
    console.print(f"base model: {metrics}")
    for name, stage in (("distillation", stage_distillation), ("agent", stage_tools)):
        if name in args.stage:  # weights that all seeds share
            stage.prepare(base.parent, out / "data", out, args.max_steps, console)
    rows, curves = [], {name: {} for name in args.stage if name in STAGES}
    tasks = [(name, seed, args, before) for name in args.stage for seed in args.seeds]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(
        args.jobs, get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        futures = {pool.submit(train_and_measure, *task): task for task in tasks}
        for future in tqdm(as_completed(futures), total=len(futures), desc="trainings"):
            name, seed, *_ = futures[future]
            new_rows, records = future.result()
            rows += new_rows
            if name in STAGES:
                curves[name][seed] = records
            rows.sort(key=lambda row: (args.stage.index(row["stage"]), row["seed"]))
            report = {
                "date": str(date.today()),
                "machine": describe_machine(torch.device("cpu")),
                "jobs": args.jobs,
                "seconds": round(time.time() - started, 1),
                "base": before,
                "questions": evaluation.counts,
                "rows": rows,
            }
            if distilled := [row for row in rows if row["stage"] == "distillation"]:
                report["distillation"] = stage_distillation.mean_gains(distilled)
            write_json(
                args.json, report
            )  # after each training, so that a crash does not lose the others
    show(console, report)
    console.print(f"report: {args.json}")
    if curves:
        plot_curves(curves, {name: STAGES[name].curve for name in curves}, out / "stages.png")
        console.print(f"curves:  {out / 'stages.png'}")
    return report


def train_base(console: Console, out: Path, args: Args) -> Path:
    """Generate the data and train the base model, or resume where that was interrupted."""
    base = out / "base"
    write_demo_data(out / "data", seed=42)
    trainings = ("pretrain", PRETRAIN, ""), ("full_sft", SFT, "--lr_schedule constant")
    for name, flags, extra in trainings:
        text = f"{flags} {COMMON} {extra} --max_steps {BASE_STEPS[name]} --num_workers 0 --resume 1"
        argv = [w.format(data=out / "data", out=base, device="cpu") for w in text.split()]
        run_trainer(console, import_module(f"trainer.train_{name}"), argv, args.max_steps)
    return base / f"full_sft_{HIDDEN_SIZE}.pth"


def train_and_measure(
    name: str, seed: int, args: Args, before: dict[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the report, and the training's records. Runs in a process of its own."""
    out = Path(args.output)
    with (
        open(out / f"{name}_{seed}.log", "w", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        console = Console(file=log, highlight=False)
        if name in OTHER_STAGES:
            folders = out / "base", out / "data", out
            return OTHER_STAGES[name](seed, *folders, args.max_steps, console), []
        result = train(console, name, seed, out, args)
        base = out / "base" / f"full_sft_{HIDDEN_SIZE}.pth"
        evaluation = held_out_evaluation(out / "data", base, args.questions)
        if name == "reward":
            after = evaluation.evaluate_reward_model(result)
        else:
            model = load_model(out / f"{name}_{seed}_{HIDDEN_SIZE}.pth")
            after = evaluation.evaluate_policy(model)
    after["seconds"] = round(result["seconds"], 1)
    return target_rows(name, seed, before, after), result["history"]


def train(console: Console, name: str, seed: int, out: Path, args: Args) -> dict[str, Any]:
    values = dict(base=out / "base", data=out / "data", size=HIDDEN_SIZE)
    argv = [word.format(**values) for word in STAGES[name].flags.split()]
    argv += f"--seed {seed} --save_weight {name}_{seed} --device cpu --log_interval 2".split()
    argv += "--save_interval 0 --eval_interval 0".split()
    argv += ["--save_dir", str(out), "--checkpoint_dir", str(out / "checkpoints")]
    return run_trainer(console, import_module(f"trainer.train_{name}"), argv, args.max_steps)


def target_rows(stage: str, seed: int, before: dict, after: dict) -> list[dict[str, Any]]:
    """A row for each metric that has a target."""
    rows = []
    for metric, (kind, amount) in STAGES[stage].targets.items():
        start = before.get(metric, 0.5)  # an untrained reward model guesses
        target = start + amount if kind == "gain" else amount
        details = {name: value for name, value in after.items() if name != metric}
        rows.append(
            dict(stage=stage, seed=seed, metric=metric, before=start, after=after[metric])
            | dict(target=target, met=after[metric] >= target, details=details)
        )
    return rows


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="held out, before and after (± standard error)", title_justify="left")
    for name in ("stage", "seed", "metric", "before", "after", "target", "", "KL", "length", "s"):
        table.add_column(name, justify="left" if name in ("stage", "metric", "") else "right")
    for row in report["rows"]:
        each = SimpleNamespace(**row)
        fmt = "{:.3f}" if each.metric.endswith("loss") else "{:.1%}"
        error = each.details.get(f"{each.metric}_error")
        table.add_row(
            each.stage,
            str(each.seed),
            each.metric,
            fmt.format(each.before),
            fmt.format(each.after) + (f" ± {fmt.format(error)}" if error else ""),
            fmt.format(each.target),
            "[green]met[/green]" if each.met else "[red]missed[/red]",
            f"{each.details['kl']:.2f}" if "kl" in each.details else "",
            f"{each.details['length']:.1f}" if "length" in each.details else "",
            f"{each.details['seconds']:.0f}",
        )
    console.print(table)
    for mean in report.get("distillation", []):
        gain, error = mean["gain"], mean["error"]
        comparison = "more" if mean["met"] else "not more"
        metric = f"distillation, mean of the seeds: {mean['metric']} better by {gain:.4f}"
        console.print(f"{metric} ± {error:.4f}, {comparison} than two standard errors")
    console.print(f"{report['machine']}, {report['date']}, {report['seconds'] / 60:.0f} min in all")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
