"""Does a student learn more from a teacher than from the data alone, with the same number of steps?

    python benchmarks/learning/stage_distillation.py --base DIR [--seeds 42 43 44] [--json FILE]
                                            [--variants reverse jsd skew on_policy]

DIR holds data and base model of stages.py: `data` and `base/full_sft_192.pth`. The teacher is the
base model with its fine-tuning finished (TEACHER): 3.0M parameters in 4 layers. The student is the
base model without two of its layers, so that it has to learn again: 2.1M parameters. Both are made
once and kept in --output. With each seed the student is trained twice, on the same rows in the same
order, with the same number of steps and learning rate: by train_full_sft.py, on cross-entropy
(CE) alone, and by train_distillation.py with its defaults (and with each of --variants: other
divergences, and on-policy distillation). Metrics:

    held_out_loss    CE of held-out conversations, nats per answer token
    skill_accuracy   exact-match accuracy of greedy answers to held-out problems of 13 skills

A row has CE alone as `before` and distillation as `after`. Verdict: is distillation better on both,
averaged over the seeds, by more than two standard errors of the paired differences?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from trainings import run_trainer

from dataset.demo.files import load_tests
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import OUT, load_model, load_tokenizer, save_weights, write_json
from scripts.evaluation.exact_match import exact_match
from scripts.runs.demo import HIDDEN_SIZE
from scripts.serving.arguments import ModelArgs
from scripts.serving.loading import load_chat_model
from trainer import train_distillation, train_full_sft
from trainer.common.hardware import describe_machine
from trainer.report.plots import plot_losses

DATA = """--data_path {data}/sft_mini_512.jsonl --val_path {data}/sft_mini_512_val.jsonl
    --val_documents 600 --max_seq_len 160 --batch_size 12 --epochs 3 --num_workers 0 --device cpu
    --log_interval 10 --save_interval 0 --eval_interval 0"""
TEACHER = "--from_weight {base} --learning_rate 8e-4 --max_steps 400"
ALONE = "--from_weight {student} --learning_rate 8e-4 --max_steps 250"
DISTILLED = f"{ALONE} --teacher_weight {{teacher}} --alpha 0.5 --temperature 1.5"
VARIANTS = {
    **{name: f"--divergence {name}" for name in ("reverse", "jsd", "skew")},
    "on_policy": "--on_policy 0.5 --max_gen_len 64",
}
STUDENT_LAYERS = (0, 3)  # of 0 to 3
SUFFIX = f"_{HIDDEN_SIZE}"
DIRECTION = {"held_out_loss": -1, "skill_accuracy": 1}  # 1: higher is better


@dataclass
class Args:
    base: str = option(str(OUT / "stages"), "output folder of stages.py, with data and base model")
    seeds: list[int] = option([42, 43, 44], "random seeds; the student is trained twice with each")
    variants: list[str] = option([], f"also train with: {', '.join(VARIANTS)}")
    output: str = option(str(OUT / "stage_distillation"), "folder of weights, logs and plots")
    json: str = option(str(OUT / "stage_distillation.json"), "file of the report")
    max_steps: int = option(0, "most optimizer steps of each training, for a quick test; 0: all")


def main(args: Args) -> dict[str, Any]:
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        raise UserError(f"--variants: {min(unknown)} is unknown; known are {', '.join(VARIANTS)}")
    console, base, out = Console(highlight=False), Path(args.base), Path(args.output)
    rows = []
    for seed in args.seeds:
        console.rule(f"seed {seed}")
        folders = base / "base", base / "data", out
        rows += distillation(seed, *folders, args.max_steps, console, args.variants)
        report = {
            "date": str(date.today()),
            "machine": describe_machine(torch.device("cpu")),
            "rows": rows,
            "verdict": mean_gains(rows),
        }
        write_json(args.json, report)
    show(console, report)
    console.print(f"report: {args.json}")
    return report


def distillation(
    seed: int,
    base: Path,
    data: Path,
    out: Path,
    max_steps: int,
    console: Console,
    variants: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Train with one seed; returns a row for each metric, of the defaults and of each variant."""
    paths = prepare(base, data, out, max_steps, console)
    questions = load_tests(data)["skills"]
    results, curves = {}, {}
    trainings = {"alone": (train_full_sft, ALONE), "distilled": (train_distillation, DISTILLED)}
    trainings |= {name: (train_distillation, f"{DISTILLED} {VARIANTS[name]}") for name in variants}
    for name, (trainer, flags) in trainings.items():
        result = train(console, trainer, flags, f"{name}_{seed}", seed, paths, out, max_steps)
        curves[name] = result["history"]
        results[name] = {
            "held_out_loss": result["eval_loss"],
            "skill_accuracy": skill_accuracy(out / f"{name}_{seed}{SUFFIX}.pth", questions),
            "seconds": round(result["seconds"], 1),
        }
    plot_losses(curves, out / f"distillation_{seed}.png")
    teacher = {"teacher_skill_accuracy": skill_accuracy(paths["teacher"], questions)}
    rows = []
    for name, (metric, sign) in product(list(results)[1:], DIRECTION.items()):
        before, after = results["alone"][metric], results[name][metric]
        details = {**teacher, "seconds": results[name]["seconds"]}
        details["seconds_alone"] = results["alone"]["seconds"]
        if metric == "skill_accuracy":
            error = math.sqrt(after * (1 - after) / len(questions))
            details["skill_accuracy_error"] = error
        label = metric if name == "distilled" else f"{name}_{metric}"
        rows.append(
            dict(stage="distillation", seed=seed, metric=label, before=before, after=after)
            | dict(target=before, met=sign * (after - before) > 0, details=details)
        )
    return rows


def prepare(base: Path, data: Path, out: Path, max_steps: int, console: Console) -> dict[str, Path]:
    """Make teacher and student, once; returns the paths of weights and data."""
    paths = {name: out / f"{name}{SUFFIX}.pth" for name in ("student", "teacher")}
    paths |= {"data": data, "base": base / f"full_sft{SUFFIX}.pth"}
    if not paths["teacher"].exists():
        train(console, train_full_sft, TEACHER, "teacher", 7, paths, out, max_steps)
    if not paths["student"].exists():
        remove_layers(paths["base"], paths["student"])
    return paths


def train(
    console: Console,
    trainer: Any,
    flags: str,
    name: str,
    seed: int,
    paths: dict[str, Path],
    out: Path,
    max_steps: int,
) -> dict[str, Any]:
    argv = [word.format(**paths) for word in f"{flags} {DATA}".split()]
    argv += ["--seed", str(seed), "--save_weight", name, "--save_dir", str(out)]
    argv += ["--checkpoint_dir", str(out / "checkpoints")]
    return run_trainer(console, trainer, argv, max_steps)


def remove_layers(base: Path, student: Path) -> None:
    """Save the model with some of its layers, as DistilBERT is initialised (arXiv 1910.01108)."""
    tokenizer = load_tokenizer()
    model = load_model(base, tokenizer=tokenizer)
    config = MiniMindConfig(
        **{**model.config.to_diff_dict(), "num_hidden_layers": len(STUDENT_LAYERS)}
    )
    shallow = MiniMindForCausalLM(config)
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in STUDENT_LAYERS)
    shallow.load_state_dict(model.state_dict())
    origin = {"cut_from": str(base), "layers": STUDENT_LAYERS}
    save_weights(shallow, student, stage="full_sft", tokenizer=tokenizer, origin=origin)


def skill_accuracy(weights: Path, questions: list[dict]) -> float:
    loaded = load_chat_model(ModelArgs(weight=str(weights), device="cpu"))
    return exact_match(loaded.model, loaded.tokenizer, "skills", questions)


def mean_gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each metric the mean gain over the seeds, its standard error, and whether the gain is
    more than twice the error."""
    results = []
    for metric, sign in DIRECTION.items():
        metric_rows = [row for row in rows if row["metric"] == metric]
        gains = [sign * (row["after"] - row["before"]) for row in metric_rows]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        means = {name: fmean(row[name] for row in metric_rows) for name in ("before", "after")}
        gain = fmean(gains)
        results.append(dict(metric=metric, **means, gain=gain, error=error, met=gain > 2 * error))
    return results


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(
        title="the same number of steps, with and without a teacher", title_justify="left"
    )
    for name in ("metric", "seed", "CE alone", "distilled", "difference ± standard error", ""):
        table.add_column(name, justify="left" if name in ("metric", "") else "right")
    for row in report["rows"]:
        difference = row["after"] - row["before"]
        values = (f"{row[name]:.4f}" for name in ("before", "after"))
        table.add_row(row["metric"], str(row["seed"]), *values, f"{difference:+.4f}", "")
    for mean in report["verdict"]:
        difference = f"{mean['after'] - mean['before']:+.4f} ± {mean['error']:.4f}"
        status = "[green]met[/green]" if mean["met"] else "[red]missed[/red]"
        values = (f"{mean[name]:.4f}" for name in ("before", "after"))
        table.add_row(mean["metric"], "mean", *values, difference, status)
    console.print(table)
    console.print(f"{report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
