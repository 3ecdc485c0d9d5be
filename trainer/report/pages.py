"""The report card of a training: one HTML page with everything in it, to look at or to pass on.

out/{name}.report.html has the curves, samples of the model's text over time, settings and data, and
with --recipe how the run compares with the recipe's baseline. It is made from the log, so that a
run that was stopped and resumed has the same page. scripts/compare_runs.py draws several runs in
the same charts.
"""

import json
from contextlib import suppress
from dataclasses import MISSING, fields
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.packing import TrainingData
from model.weights import count_parameters
from trainer.common import hardware
from trainer.common.context import Context
from trainer.report.forecast import duration
from trainer.report.parts import Records, charts, folded, section, table, tile_grid, write_page
from trainer.report.recipe_comparison import RecipeComparison


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


# -- parts of a page -------------------------------------------------------------------------------


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
    return tile_grid(shown)


def samples(records: Records) -> str:
    rows = []
    for record in (record for record in records if "sample" in record):
        bits = f"\n{record['eval_bpb']:.3f} bpb" if "eval_bpb" in record else ""
        rows.append((f"step {record['step']:,}{bits}", record["sample"]))
    return table(rows) if rows else ""


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
