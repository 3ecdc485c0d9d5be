"""Standard benchmarks by lm-evaluation-harness, for one model or several side by side.

    pip install -r requirements-eval.txt
    python scripts/eval_benchmark.py --weight pretrain full_sft             own weights, from out/
    python scripts/eval_benchmark.py --load_from ./MiniMind2 ./Qwen3-0.6B   transformers folders
    python scripts/eval_benchmark.py --tasks ceval piqa --limit 100 --json out/a.json
    python scripts/eval_benchmark.py --compare out/a.json                   with earlier results

Questions are downloaded from the Hugging Face Hub. --local DIR reads them without a network: DIR
has a folder for each benchmark (ceval-exam, cmmlu, openbookqa, ai2_arc, hellaswag, piqa, gsm8k) as
`hf download --repo-type dataset --local-dir` makes it, or as its authors publish it, unzipped:
.parquet, .jsonl or .csv.

A model of MiniMind's size guesses most of these questions. So each accuracy is shown with the
accuracy of guessing ("chance") and its standard error, and is bold only if it is more than two
standard errors above chance.
"""

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.command_line import nearest, option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT, TOKENIZER, is_hf_folder
from scripts.serving.arguments import MACHINE, ModelArgs

BENCHMARKS = "benchmarks"  # a group of --help
TASKS = "ceval cmmlu openbookqa arc_easy arc_challenge hellaswag piqa gsm8k"


@dataclass
class Args(ModelArgs):
    load_from: list[str] = option(
        [str(TOKENIZER)], "./model: own weights from save_dir; else transformers folders"
    )
    weight: list[str] = option(["full_sft"], "own weights: stages, such as pretrain, or .pth files")
    tasks: list[str] = option(
        TASKS.split(), f"benchmarks: {TASKS}; arc: both ARC sets", group=BENCHMARKS
    )
    local: str = option(
        "", "folder with copies of the benchmarks, instead of the network", group=BENCHMARKS
    )
    num_fewshot: int | None = option(
        None,
        "few-shot examples before each question; default: 5 for gsm8k, else 0",
        group=BENCHMARKS,
        at_least=0,
    )
    chat_template: bool = option(
        False, "ask in the chat template, as a user message", group=BENCHMARKS
    )
    skip_missing: bool = option(
        False, "leave out benchmarks whose questions cannot be had", group=BENCHMARKS
    )
    limit: int = option(
        0,
        "maximum number of questions of each task or subject, for a quick test; 0: all",
        group=BENCHMARKS,
        at_least=0,
    )
    batch_size: int = option(16, "sequences per forward pass", group=MACHINE, at_least=1)
    max_seq_len: int = option(
        2048,
        "maximum length of a question with its examples; its beginning is cut",
        group=MACHINE,
        at_least=1,
    )
    compare: list[str] = option([], "files written by --json, whose models are shown too")
    json: str = option("", "also write the results to this file")
    plot: str = option(str(OUT / "benchmark.png"), "file of the bar chart")

    def __post_init__(self) -> None:
        super().__post_init__()
        arc = ["arc_easy", "arc_challenge"]
        self.tasks = [t for task in self.tasks for t in (arc if task == "arc" else [task])]
        for task in self.tasks:
            if task not in TASKS.split():
                meant = nearest(task, TASKS.split())
                raise UserError(f"--tasks {task} is unknown; known are {TASKS}{meant}")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from model.weights import write_json
from scripts.serving.loading import ChatModel, load_chat_model
from trainer.common.hardware import describe_machine, resolve_device
from trainer.report.plots import save_figure


def main(args: Args) -> dict[str, Any]:
    reports = [read_report(path) for path in args.compare]
    try:
        from scripts.evaluation import harness
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed, or not completely ({error}); run "
            "`pip install -r requirements-eval.txt`"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    managers = {}
    for task in args.tasks:
        with told_if(args.skip_missing):
            managers[task] = harness.make_task_manager(harness.BENCHMARKS[task], args.local)
    require_some(managers)
    models = []
    for loaded in load_models(args):
        model = harness.HarnessModel(
            loaded.model, loaded.tokenizer, args.batch_size, args.max_seq_len
        )
        results = {}
        for task, manager in list(managers.items()):
            title = harness.BENCHMARKS[task].title
            print(f"{loaded.name}: {title}")
            with told_if(args.skip_missing):
                try:
                    results[task] = harness.evaluate(
                        model,
                        harness.BENCHMARKS[task],
                        manager,
                        num_fewshot=args.num_fewshot,
                        limit=args.limit or None,
                        chat_template=args.chat_template,
                    )
                except OSError as error:  # errors of the Hub are OSErrors
                    del managers[task]
                    raise UserError(
                        f"{title} cannot be downloaded ({error}); --local reads a copy from a "
                        "folder"
                    ) from error
        models.append(
            {"name": loaded.name, "parameters": loaded.num_parameters, "results": results}
        )
    require_some(managers)
    report = {
        "date": str(date.today()),
        "machine": describe_machine(resolve_device(args.device)),
        "lm_eval": version("lm_eval"),
        "limit": args.limit,
        "chat_template": args.chat_template,
        "models": models,
    }
    models = [model for each in [*reports, report] for model in each["models"]]
    show_table(models)
    plot_bars(models, args.plot)
    print(f"drawn: {args.plot}")
    if args.json:
        write_json(args.json, report)
    return report


@contextmanager
def told_if(skip: bool) -> Iterator[None]:
    """With `skip` a UserError is a line, and ends nothing."""
    try:
        yield
    except UserError as error:
        if not skip:
            raise
        print(f"left out: {error}")


def require_some(benchmarks: Collection) -> None:
    """UserError if all were left out."""
    if not benchmarks:
        raise UserError("the questions of none of these benchmarks can be had")


def load_models(args: Args) -> Iterator[ChatModel]:
    """One after the other: only one is in memory at a time."""
    for folder in args.load_from:
        in_hf_format = is_hf_folder(folder)
        for weight in [""] if in_hf_format else args.weight:
            loaded = load_chat_model(replace(args, load_from=folder), weight, decode_only=False)
            name = Path(folder).resolve().name if in_hf_format else Path(weight).stem
            name += f" + {args.lora_weight}" if args.lora_weight else ""
            yield loaded._replace(name=name)


def read_report(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        report["models"][0]["results"]
        return report
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"--compare {path} is not a file written by --json") from error


# -- results ---------------------------------------------------------------------------------------


def tasks_in(models: list[dict]) -> list[str]:
    return [task for task in TASKS.split() if any(task in each["results"] for each in models)]


def show_table(models: list[dict]) -> None:
    table = Table(title="accuracy ± standard error, in per cent", title_justify="left")
    for name in ("benchmark", "questions", "shots", "chance"):
        first = name == "benchmark"
        table.add_column(name, justify="left" if first else "right", no_wrap=first)
    for model in models:
        table.add_column(f"{model['name']}\n{model['parameters'] / 1e6:.2f}M", justify="right")
    for task in tasks_in(models):
        rows = [model["results"].get(task) for model in models]
        found = list(filter(None, rows))
        numbers = (
            [f"{r['questions']:,}", str(r["shots"]), f"{100 * r['chance']:.1f}"] for r in found
        )
        same = (" / ".join(dict.fromkeys(column)) for column in zip(*numbers, strict=True))
        table.add_row(found[0]["title"], *same, *(cell(row) if row else "" for row in rows))
    Console(highlight=False, markup=False).print(table)


def cell(row: dict) -> str:
    """Accuracy ± standard error in per cent; bold if it is two standard errors above chance."""
    error = row["standard_error"] or 0
    text = f"{100 * row['accuracy']:.1f} ± {100 * error:.1f}"
    return f"[bold]{text}[/bold]" if row["accuracy"] > row["chance"] + 2 * error else text


def plot_bars(models: list[dict], path: str) -> None:
    """A bar chart with standard errors, and chance as a dashed line."""
    tasks = tasks_in(models)
    figure, axes = plt.subplots(
        figsize=(max(5, 1.2 + len(tasks) * (0.7 + 0.3 * len(models))), 4.5), layout="constrained"
    )
    width = 0.8 / len(models)
    for n, model in enumerate(models):
        kept = [(at, model["results"][t]) for at, t in enumerate(tasks) if t in model["results"]]
        axes.bar(
            [at + width * (n - (len(models) - 1) / 2) for at, _ in kept],
            [100 * row["accuracy"] for _, row in kept],
            width * 0.92,
            yerr=[100 * (row["standard_error"] or 0) for _, row in kept],
            capsize=2,
            label=f"{model['name']} ({model['parameters'] / 1e6:.1f}M)",
        )
    rows = [next(m["results"][task] for m in models if task in m["results"]) for task in tasks]
    for at, row in enumerate(rows):
        label = "chance" if at == 0 else None
        axes.hlines(100 * row["chance"], at - 0.45, at + 0.45, "black", "dashed", label=label)
    axes.set_xticks(range(len(tasks)), [row["title"] for row in rows], rotation=20, ha="right")
    axes.set(title="benchmarks", ylabel="accuracy, %", ylim=(0, None))
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
