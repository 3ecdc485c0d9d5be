"""Does a student learn more from a teacher than from the data alone, in as many updates?

    python benchmarks/learning/stage_distillation.py --base DIR [--seeds 42 43 44] [--json FILE]
                                            [--variants reverse jsd skew on_policy]

DIR holds data and unfinished model of stages.py: `data` and `base/full_sft_192.pth`. Its
fine-tuning is finished (TEACHER): 3.0M parameters in 4 layers. The student is the unfinished model
with two of its layers cut out, so that it has to learn anew: 2.1M parameters. Both are made once
and kept in --output. With each seed the student is trained twice on the same rows in the same
order, in as many updates at the same learning rate: by train_full_sft.py, which is CE alone, and by
train_distillation.py at its defaults (and with each of --variants, other divergences and answers of
the student's own). Then

    held_out_loss    CE of held-out conversations, nats a token of the answers
    skill_accuracy   greedy answers to held-out problems of 13 skills that are exactly right

A row has CE alone as `before` and distilled as `after`. The verdict: is distilled better on
both, in the mean of the seeds, by more than two standard errors (of the differences between the
two trainings of a seed)?
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
from dataset.grading import grade
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.inference.generation import prepare_to_decode
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import OUT, load_model, load_tokenizer, save_weights, write_json
from scripts.runs.demo import HIDDEN_SIZE, answers
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
KEPT = (0, 3)  # the student's layers, of 0 to 3
WIDTH = f"_{HIDDEN_SIZE}"
BETTER = {"held_out_loss": -1, "skill_accuracy": 1}  # which way each metric improves


@dataclass
class Args:
    base: str = option(str(OUT / "stages"), "folder of data and base, as stages.py leaves them")
    seeds: list[int] = option([42, 43, 44], "the student is trained twice with each of them")
    variants: list[str] = option([], f"also train with: {', '.join(VARIANTS)}")
    output: str = option(str(OUT / "stage_distillation"), "folder of weights, logs and curves")
    json: str = option(str(OUT / "stage_distillation.json"), "the report")
    max_steps: int = option(0, "updates of each training at most, for a quick look; 0: all")


def main(args: Args) -> dict[str, Any]:
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        raise UserError(f"--variants: {min(unknown)} is unknown; there are {', '.join(VARIANTS)}")
    console, base, out = Console(highlight=False), Path(args.base), Path(args.output)
    rows = []
    for seed in args.seeds:
        console.rule(f"seed {seed}")
        places = base / "base", base / "data", out
        rows += distillation(seed, *places, args.max_steps, console, args.variants)
        report = {
            "date": str(date.today()),
            "machine": describe_machine(torch.device("cpu")),
            "rows": rows,
            "verdict": verdict(rows),
        }
        write_json(args.json, report)
    show(console, report)
    console.print(f"figures: {args.json}")
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
    """The trainings of a seed: a row for each metric, and for each of every variant."""
    places = prepare(base, data, out, max_steps, console)
    questions = load_tests(data)["skills"]
    found, curves = {}, {}
    trainings = {"alone": (train_full_sft, ALONE), "distilled": (train_distillation, DISTILLED)}
    trainings |= {name: (train_distillation, f"{DISTILLED} {VARIANTS[name]}") for name in variants}
    for name, (trainer, flags) in trainings.items():
        result = train(console, trainer, flags, f"{name}_{seed}", seed, places, out, max_steps)
        curves[name] = result["records"]
        found[name] = {
            "held_out_loss": result["val_loss"],
            "skill_accuracy": accuracy(out / f"{name}_{seed}{WIDTH}.pth", questions),
            "seconds": round(result["seconds"], 1),
        }
    plot_losses(curves, out / f"distillation_{seed}.png")
    teacher = {"teacher_skill_accuracy": accuracy(places["teacher"], questions)}
    rows = []
    for name, (metric, sign) in product(list(found)[1:], BETTER.items()):
        before, after = found["alone"][metric], found[name][metric]
        beside = {**teacher, "seconds": found[name]["seconds"]}
        beside["seconds_alone"] = found["alone"]["seconds"]
        if metric == "skill_accuracy":
            error = math.sqrt(after * (1 - after) / len(questions))
            beside["skill_accuracy_error"] = error
        shown = metric if name == "distilled" else f"{name}_{metric}"
        rows.append(
            dict(stage="distillation", seed=seed, metric=shown, before=before, after=after)
            | dict(target=before, met=sign * (after - before) > 0, beside=beside)
        )
    return rows


def prepare(base: Path, data: Path, out: Path, max_steps: int, console: Console) -> dict[str, Path]:
    """Teacher and student, made once: where they and the data are."""
    places = {name: out / f"{name}{WIDTH}.pth" for name in ("student", "teacher")}
    places |= {"data": data, "base": base / f"full_sft{WIDTH}.pth"}
    if not places["teacher"].exists():
        train(console, train_full_sft, TEACHER, "teacher", 7, places, out, max_steps)
    if not places["student"].exists():
        cut(places["base"], places["student"])
    return places


def train(
    console: Console,
    trainer: Any,
    flags: str,
    name: str,
    seed: int,
    places: dict[str, Path],
    out: Path,
    max_steps: int,
) -> dict[str, Any]:
    words = [word.format(**places) for word in f"{flags} {DATA}".split()]
    words += ["--seed", str(seed), "--save_weight", name, "--save_dir", str(out)]
    words += ["--checkpoint_dir", str(out / "checkpoints")]
    return run_trainer(console, trainer, words, max_steps)


def cut(base: Path, student: Path) -> None:
    """The model with some of its layers only, as DistilBERT begins (arXiv 1910.01108)."""
    tokenizer = load_tokenizer()
    model = load_model(base, tokenizer=tokenizer)
    config = MiniMindConfig(**{**model.config.to_diff_dict(), "num_hidden_layers": len(KEPT)})
    shallow = MiniMindForCausalLM(config)
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in KEPT)
    shallow.load_state_dict(model.state_dict())
    origin = {"cut_from": str(base), "layers": KEPT}
    save_weights(shallow, student, stage="full_sft", tokenizer=tokenizer, origin=origin)


def accuracy(weights: Path, questions: list[dict]) -> float:
    """The share of the questions that is answered exactly right."""
    tokenizer = load_tokenizer()
    model = prepare_to_decode(load_model(weights, tokenizer=tokenizer))
    replies = answers(model, tokenizer, [question["prompt"] for question in questions])
    pairs = zip(questions, replies, strict=True)
    return fmean(grade(question["answer"], reply) for question, reply in pairs)


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each metric the mean gain of the seeds, its standard error, and whether the gain is more
    than twice that."""
    found = []
    for metric, sign in BETTER.items():
        of_metric = [row for row in rows if row["metric"] == metric]
        gains = [sign * (row["after"] - row["before"]) for row in of_metric]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        means = {name: fmean(row[name] for row in of_metric) for name in ("before", "after")}
        gain = fmean(gains)
        found.append(dict(metric=metric, **means, gain=gain, error=error, met=gain > 2 * error))
    return found


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="as many updates, with and without a teacher", title_justify="left")
    for name in ("metric", "seed", "CE alone", "distilled", "difference ± standard error", ""):
        table.add_column(name, justify="left" if name in ("metric", "") else "right")
    for row in report["rows"]:
        difference = row["after"] - row["before"]
        figures = (f"{row[name]:.4f}" for name in ("before", "after"))
        table.add_row(row["metric"], str(row["seed"]), *figures, f"{difference:+.4f}", "")
    for mean in report["verdict"]:
        difference = f"{mean['after'] - mean['before']:+.4f} ± {mean['error']:.4f}"
        said = "[green]met[/green]" if mean["met"] else "[red]missed[/red]"
        figures = (f"{mean[name]:.4f}" for name in ("before", "after"))
        table.add_row(mean["metric"], "mean", *figures, difference, said)
    console.print(table)
    console.print(f"{report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
