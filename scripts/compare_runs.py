"""Compare training runs: loss curves in one chart, metrics and settings side by side.

    python scripts/compare_runs.py --runs out/pretrain_512 out/pretrain_768
    python scripts/compare_runs.py --runs out/pretrain_96 --recipe demo_pretrain

A run is named by its weights, its log, or their common path without a suffix. The output is one
self-contained HTML page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from trainer.report.recipes import read_recipe


@dataclass
class Args:
    runs: list[str] = option([], "training runs, such as out/pretrain_512 out/pretrain_768")
    recipe: list[str] = option([], "recipes whose baselines are shown too")
    output: str = option(str(OUT / "compare.html"), "file of the HTML page")

    def __post_init__(self) -> None:
        if not self.runs and not self.recipe:
            raise UserError("--runs needs the runs to compare, such as out/pretrain_512")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from rich.console import Console
from rich.table import Table

from model.weights import read_info
from trainer.report.forecast import duration
from trainer.report.log import files_of, read_log
from trainer.report.pages import shown
from trainer.report.parts import Records, charts, section, table, write_page

COLUMNS = ("run", "parameters", "steps", "tokens", "time", "tokens/s", "loss", "bits per byte")


def main(args: Args) -> list[tuple[str, ...]]:
    runs: dict[str, Records] = {}
    settings: dict[str, dict[str, Any]] = {}
    parameters: dict[str, int | None] = {}
    for run, name in zip(args.runs, short_names(args.runs), strict=True):
        weights, log = files_of(run)
        info = read_info(weights) or {}
        runs[name] = read_log(log, info.get("stage", ""))
        settings[name] = info.get("origin", {}).get("args", {})
        parameters[name] = info.get("parameters")
    for recipe in map(read_recipe, args.recipe):
        name = f"recipe {recipe['name']}"
        runs[name], settings[name] = recipe["records"], recipe["flags"]
        parameters[name] = recipe.get("parameters")
    rows = [summary(name, records, parameters[name]) for name, records in runs.items()]
    parts = [
        table(rows, COLUMNS),
        charts(runs),
        section("Settings that differ", table(differences(settings), ("", *settings))),
    ]
    write_page(Path(args.output), "Runs side by side", ", ".join(runs), parts)
    console_table = Table()
    for column in COLUMNS:
        console_table.add_column(
            column, overflow="fold", no_wrap=column not in ("run", "bits per byte")
        )
    for row in rows:
        console_table.add_row(*row)
    Console(highlight=False, markup=False).print(console_table)
    print(f"curves: {args.output}")
    return rows


def short_names(runs: list[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    paths = [files_of(run)[0].with_suffix("").parts for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError("--runs names the same run twice")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def summary(name: str, records: Records, parameters: int | None) -> tuple[str, ...]:
    """A row of COLUMNS, from the last value of each metric."""
    last: dict[str, Any] = {}
    for record in records:
        last |= {key: value for key, value in record.items() if value is not None}
    seconds, tokens = last.get("seconds", 0), last.get("num_tokens", 0)
    return (
        name,
        f"{parameters / 1e6:.2f}M" if parameters else "",
        f"{last['step']:,}",
        f"{tokens:,}",
        duration(seconds),
        f"{tokens / max(1e-9, seconds):,.0f}",
        f"{last['loss']:.4f}" if "loss" in last else "",
        f"{last['eval_bpb']:.4f}" if "eval_bpb" in last else "",
    )


def differences(settings: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The flags that differ between the runs; empty where a run does not record the flag."""
    flags = sorted({flag for each in settings.values() for flag in each})
    rows = [(f"--{flag}", *(shown(s.get(flag, "")) for s in settings.values())) for flag in flags]
    return [row for row in rows if len(set(row[1:]) - {""}) > 1]


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
