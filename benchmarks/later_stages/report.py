"""Results of single trainings → a row for each stage and setting with its targets; curves."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learning.trainings import Curves, plot_curves
from rich.console import Console
from rich.table import Table

from later_stages.metrics import TOOL_COUNTS, binomial_se
from later_stages.stages import STAGES

Metrics = dict[str, float]


def combine(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of a stage from those of its folds or seeds.

    Counts of folds are added up. Other metrics are means; a standard error has the error over the
    seeds added to that of the held-out data, which are the same for every seed.
    """
    if "right" in parts[0]:
        metrics = combine_pairs(parts)
    elif "calls" in parts[0]:
        metrics = combine_calls(parts)
    else:
        metrics = combine_means(parts, parts[0].keys())
    for name in [each for each in metrics if f"{each}_se" in metrics]:
        offset = 0.5 if name == "accuracy" else 0.0
        if error := metrics[f"{name}_se"]:
            metrics[f"{name}_sigmas"] = (metrics[name] - offset) / error
    return metrics


def combine_pairs(parts: Sequence[Metrics]) -> Metrics:
    count, right = (sum(part[name] for part in parts) for name in ("pairs", "right"))
    accuracies = [part["right"] / part["pairs"] for part in parts]
    metrics = {
        "pairs": count,
        "accuracy": right / count,
        "accuracy_se": binomial_se(right / count, count),
        "accuracy_by_length": sum(part["right_by_length"] for part in parts) / count,
        "loss": sum(part["loss_sum"] for part in parts) / count,
    }
    if len(parts) > 1:
        metrics["accuracy_sd_of_folds"] = float(np.std(accuracies, ddof=1))
    chats = [name for name in parts[0] if name.startswith("chats_")]
    return metrics | combine_means(parts, chats)


def combine_calls(parts: Sequence[Metrics]) -> Metrics:
    totals = {name: sum(part[name] for part in parts) for name in TOOL_COUNTS}
    count, metrics = totals["calls"], {"calls": totals["calls"]}
    for name in ("well_formed", "right_name", "right_arguments", "seen_name"):
        metrics[name] = totals[name] / max(1, count)
        metrics[f"{name}_se"] = binomial_se(metrics[name], count)
    metrics["right_if_seen"] = totals["right_seen_name"] / max(1, totals["seen_name"])
    metrics["needless"] = totals["needless"] / max(1, totals["other_turns"])
    for name in ("well_formed", "right_name"):
        metrics[f"{name}_before"] = sum(part[f"{name}_before"] for part in parts) / max(1, count)
    return metrics


def combine_means(parts: Sequence[Metrics], names: Iterable[str]) -> Metrics:
    metrics = {}
    for name in names:
        values = np.array([part[name] for part in parts])
        metrics[name] = float(values.mean())
        if name.endswith("_se"):
            base = np.array([part[name.removesuffix("_se")] for part in parts])
            over_parts = base.var(ddof=1) / len(base) if len(base) > 1 else 0.0
            metrics[name] = math.sqrt(float(np.square(values).mean()) + over_parts)
    return metrics


def make_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each stage, setting and length, of the results of its folds or seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for each in sorted(results, key=lambda each: list(STAGES).index(each["stage"])):
        groups.setdefault((each["stage"], each["variant"], each["steps"]), []).append(each)
    return [
        {
            "stage": stage,
            "flags": variant,
            "parts": sorted(each["part"] for each in group),
            "steps": steps,
            "num_tokens": sum(each["num_tokens"] for each in group) // len(group),
            "changed_fraction": min(each["changed_fraction"] for each in group),
            "metrics": (metrics := combine([each["metrics"] for each in group])),
            "targets": judge(stage, metrics),
        }
        for (stage, variant, steps), group in groups.items()
    ]


def judge(stage: str, metrics: Metrics) -> list[dict[str, Any]]:
    """Each target of the stage, with what was reached."""
    found = []
    for name, (sign, target) in STAGES[stage].targets.items():
        value = metrics.get(name)  # None: of a few rows that are all alike, nothing follows
        met = value is not None and (value >= target if sign == ">=" else value <= target)
        found.append(dict(metric=name, value=value, target=f"{sign} {target:g}", met=met))
        if f"{name}_se" in metrics:
            found[-1]["se"] = metrics[f"{name}_se"]
    return found


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="held out (± standard error)", title_justify="left")
    for name in ("stage", "flags", "steps", "float16", "metric", "value", "target", ""):
        table.add_column(name, justify="right" if name in ("steps", "float16", "value") else "left")
    for row in rows:
        first = [row["stage"], row["flags"], str(row["steps"]), f"{row['changed_fraction']:.0%}"]
        for target in row["targets"]:
            error = f" ± {target['se']:.4f}" if "se" in target else ""
            status = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
            value = "" if target["value"] is None else f"{target['value']:.4f}{error}"
            table.add_row(*first, target["metric"], value, target["target"], status)
            first = [""] * 4
    Console(highlight=False, width=max(console.width, 120)).print(table)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves of the trainings by their default flags, a picture a stage."""
    curves: Curves = {}
    for each in results:
        if not each["variant"]:
            curves.setdefault(each["stage"], {})[each["part"]] = each["history"]
    if curves:
        plot_curves(curves, {name: STAGES[name].curve for name in curves}, path, "part")
