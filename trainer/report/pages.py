"""The report card of a training: one HTML page with everything in it, to look at or to pass on.

out/{name}.report.html has the curves, samples of the model's text over time, settings and data, and
with --recipe how the run compares with the recipe's baseline. It is made from the log, so that a
run that was stopped and resumed has the same page. scripts/compare_runs.py draws several runs in
the same charts.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, fields
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.packing import TrainingData
from model.weights import atomic_write, count_parameters
from trainer.common import hardware
from trainer.common.context import Context
from trainer.common.metrics import CURVES, Curve
from trainer.report.forecast import duration
from trainer.report.plots import curve_svg
from trainer.report.recipe_comparison import RecipeComparison

Records = list[dict[str, Any]]


def run_metadata(
    ctx: Context, model: nn.Module, train_data: TrainingData, val_data: TrainingData | None
) -> dict[str, Any]:
    """How weights are made, for the .json beside them and the report."""
    return {
        "data": train_data.fingerprint,
        "packing_efficiency": round(train_data.packing_efficiency, 4),
        "from_weight": ctx.args.from_weight,
        "machine": hardware.describe_machine(ctx.device),
        "parameters": count_parameters(model),
        "manifest": data_manifest(ctx.args, train_data, val_data),
    }


def data_manifest(
    args: Any, train_data: TrainingData, val_data: TrainingData | None
) -> dict[str, Any]:
    """What a training reads, for its weights' .json, its report and recipes. The hashes are of
    tokens: the same for the same text, whatever its file is called. How a file was made is in
    FILE.manifest.json, if it is there."""

    def files(paths: list[str]) -> list[dict[str, Any]]:
        found = []
        for path in paths:
            found.append({"file": Path(path).name, "bytes": Path(path).stat().st_size})
            with suppress(OSError, ValueError):
                made = json.loads(Path(f"{path}.manifest.json").read_text(encoding="utf-8"))
                found[-1]["made"] = made
        return found

    return {
        "files": files(args.data_path),
        "hash": train_data.fingerprint,
        "documents": len(train_data.indices),
        "tokens": train_data.num_tokens,
        "held_out": val_data
        and {
            "files": files(args.val_path or args.data_path),
            "hash": val_data.fingerprint,
            "documents": len(val_data.indices),
            "tokens": val_data.num_tokens,
        },
    }


def write_report(
    path: Path,
    ctx: Context,
    *,
    name: str,
    stage: str,
    state: str,
    metadata: dict[str, Any],
    history: Records,
    recipe: RecipeComparison | None = None,
) -> None:
    """The page of a run that has finished or was stopped, which `state` says."""
    runs = {name: history}
    if recipe:
        runs[f"recipe {recipe.name}"] = recipe.history
    parts = [
        status(recipe.status(history), recipe.lines()) if recipe else "",
        tiles(history),
        charts(runs),
        section("Samples over time", samples(history)),
        section("Data", data(metadata)),
        section("Settings", settings(ctx.args)),
    ]
    about = (
        f"{stage}, {metadata.get('parameters', 0) / 1e6:.2f}M parameters, {state} "
        f"{date.today()}, {metadata.get('machine', '')}, {ctx.world_size} process"
        f"{'es' * (ctx.world_size > 1)}, torch {torch.__version__}"
    )
    write_page(path, name, about, parts)


def write_page(path: Path, title: str, about: str, parts: Iterable[str]) -> None:
    page = PAGE.format(
        title=escape(title), about=escape(about), style=STYLE, parts="\n".join(filter(None, parts))
    )
    with atomic_write(path) as file:
        file.write(page.encode())


# -- parts of a page -------------------------------------------------------------------------------


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def status(line: str, lines: list[str]) -> str:
    kind = line.split(":")[0].replace(" ", "-")  # on-track, behind or ahead
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in filter(None, [line, *lines]))
    return f'<div class="status {kind}">{paragraphs}</div>'


def tiles(records: Records) -> str:
    """The last value of each metric, and the peak memory."""
    last: dict[str, Any] = {}
    for record in records:
        last |= {name: value for name, value in record.items() if value is not None}
    memory = max((record.get("memory_gb") or 0 for record in records), default=0)
    num_tokens = last.get("num_tokens", 0)
    speed = num_tokens / max(1e-9, last.get("seconds", 0))
    shown = [
        ("bits per byte, held out", f"{last['eval_bpb']:.4f}" if "eval_bpb" in last else ""),
        ("loss, held out", f"{last['eval_loss']:.4f}" if "eval_loss" in last else ""),
        ("training loss", f"{last['loss']:.4f}" if "loss" in last else ""),
        ("steps", f"{last.get('step', 0):,}"),
        ("tokens", f"{num_tokens:,}"),
        ("training time", duration(last.get("seconds", 0))),
        ("tokens per second", f"{speed:,.0f}"),
        ("peak memory, GB", f"{memory:.2f}"),
        ("steps skipped", f"{last.get('skipped', 0):,}"),
        (
            "float16 weights changed",
            f"{last['changed_fraction']:.1%}" if "changed_fraction" in last else "",
        ),
    ]
    cells = (f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown if value)
    return f'<div class="tiles">{"".join(cells)}</div>'


def charts(runs: dict[str, Records]) -> str:
    """A chart of each metric in the logs, with all runs in it, over the tokens trained."""
    curves = dict(CURVES)
    for record in (record for records in runs.values() for record in records):
        for name, value in record.items():
            if isinstance(value, int | float | list):
                curves.setdefault(name, Curve(name.replace("_", " ")))
    drawn = []
    for name, curve in curves.items():
        lines = {run: points(records, name) for run, records in runs.items()}
        if curve and any(lines.values()):
            drawn.append(f"<figure>{curve_svg(lines, *curve)}</figure>")
    return f'<div class="charts">{"".join(drawn)}</div>'


def points(records: Records, name: str) -> list[tuple[int, float]]:
    """(tokens, value); the largest where each layer has its own."""
    found = [(record.get("num_tokens"), record.get(name)) for record in records]
    return [
        (tokens, max(value) if isinstance(value, list) else value)
        for tokens, value in found
        if tokens is not None and value not in (None, [])
    ]


def samples(records: Records) -> str:
    rows = []
    for record in (record for record in records if "sample" in record):
        bits = f"\n{record['eval_bpb']:.3f} bpb" if "eval_bpb" in record else ""
        rows.append((f"step {record['step']:,}{bits}", record["sample"]))
    return table(rows) if rows else ""


def table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{lines}</table></div>'


def data(metadata: dict[str, Any]) -> str:
    manifest = metadata.get("manifest", {})
    start = metadata.get("from_weight", "")
    rows, made = [("initial weights", "random" if start == "none" else start)], {}
    for title, part in (("training", manifest), ("held out", manifest.get("held_out") or {})):
        if part:
            files = ", ".join(f"{f['file']} ({f['bytes'] / 1e6:,.1f} MB)" for f in part["files"])
            amount = f"{part['documents']:,} documents, {part['tokens']:,} tokens"
            rows.append((title, f"{files}: {amount}, hash {part['hash']}"))
            made |= {f["file"]: f["made"] for f in part["files"] if "made" in f}
    efficiency = metadata.get("packing_efficiency", 0)
    rows.append(("packing efficiency", f"{efficiency:.1%}"))
    return table(rows) + "".join(
        folded(f"how {name} was made", json.dumps(how, indent=1, ensure_ascii=False))
        for name, how in made.items()
    )


def folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def settings(args: Any) -> str:
    """What differs from the defaults, and all of it, folded."""
    names = [field.name for field in fields(args) if "resume" not in field.name]
    values = {name: getattr(args, name) for name in names}
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(args)
    }
    changed = [(f"--{n}", shown(v)) for n, v in values.items() if v != defaults[n]]
    everything = table((f"--{name}", shown(value)) for name, value in values.items())
    return (
        f"<p>What differs from the trainer's defaults:</p>{table(changed)}"
        f"<details><summary>all of them</summary>{everything}</details>"
    )


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


# Everything is inside: no script, no font, no address.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
{parts}
</body>
</html>
"""
STYLE = """
:root { --ink: #1d2430; --soft: #5d6675; --ground: #ffffff; --card: #f4f5f8; --line: #dde1e8;
  --good: #16794a; --bad: #b4371c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --ground: #14171d;
  --card: #1e232c; --line: #323945; --good: #4cc38a; --bad: #ff8a65; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1.2rem; color: var(--ink);
  background: var(--ground); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; }
h2 { margin: 2rem 0 .6rem; font-size: 1.15rem; }
.about { margin: .2rem 0 1.2rem; color: var(--soft); }
.status { margin: 1rem 0; padding: .6rem 1rem; border-left: 5px solid var(--soft);
  background: var(--card); border-radius: 4px; }
.status p { margin: .2rem 0; }
.status p:first-child { font-weight: 600; }
.on-track, .ahead { border-color: var(--good); }
.behind { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; }
.tiles div { padding: .6rem .8rem; background: var(--card); border-radius: 8px; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
  gap: .8rem; margin-top: 1rem; }
.table + .charts { margin-top: 1.5rem; }
figure { margin: 0; padding: .4rem; background: var(--card); border-radius: 8px; }
figure svg { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td { padding: .35rem .8rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top;
  white-space: pre-wrap; }
td:first-child { color: var(--soft); min-width: 6.5rem; }
th { padding: .35rem .8rem .35rem 0; text-align: left; color: var(--soft); font-weight: 500; }
pre { font-size: .85rem; white-space: pre-wrap; }
summary { margin: .8rem 0; cursor: pointer; color: var(--soft); }
"""
