"""How good each stage is, as cards with bars: part of the page of a run."""

import math
from html import escape
from typing import Any, NamedTuple

from scripts.runs.stages import STAGES
from trainer.report.plots import LINES

COLORS = dict(zip(STAGES, [*LINES, "#5b8c2a", "#8a6de9", "#c2703d", "#2a9fb0"], strict=True))


class Bar(NamedTuple):
    """A value of a stage, to be drawn."""

    stage: str
    value: float
    error: float | None = None


def measures(origins: dict[str, dict[str, Any]], results: dict[str, Any]) -> str:
    """A card of each measure, with a bar for each stage.

    Args:
        origins: of each stage, what its weights' .json says of its training.
        results: of evaluate.py.
    """
    texts = {name: found["text"] for name, found in results.items() if "text" in found}
    cards = [card("Bits per byte, all held-out text", of_texts(texts), lower=True)]
    for language, title in (("en", "English"), ("zh", "Chinese")):
        own = {n: t["languages"][language] for n, t in texts.items() if language in t["languages"]}
        cards.append(card(f"Bits per byte, {title}", of_texts(own), lower=True))
    for name, title, chance in (
        ("preferences", "The chosen answer is likelier, per token", 0.5),
        ("reward", "Score by the run's reward model (RL was trained against it)", None),
    ):
        found = {stage: each[name] for stage, each in results.items() if name in each}
        bars = [Bar(s, each["mean"], each["standard_error"]) for s, each in found.items()]
        cards.append(card(title, bars, chance=chance, percent=chance is not None))
    for stage, metric, title in (
        ("dpo", "eval_rewards/accuracies", "DPO: the implicit reward orders held-out pairs"),
        ("reward", "eval_accuracy", "Reward model: orders held-out pairs"),
    ):
        origin = origins.get(stage, {})
        if metric in origin:
            count = (origin.get("manifest", {}).get("held_out") or {}).get("documents", 0)
            p = origin[metric]
            error = math.sqrt(p * (1 - p) / count) if count else None
            cards.append(card(title, [Bar(stage, p, error)], chance=0.5, percent=True))
    return f'<div class="cards">{"".join(cards)}</div>'


def of_texts(texts: dict[str, dict[str, Any]]) -> list[Bar]:
    return [Bar(n, each["bits_per_byte"], each["standard_error"]) for n, each in texts.items()]


def benchmark_cards(report: dict[str, Any]) -> str:
    """A card of each benchmark, guessing marked."""
    models = report.get("models", [])
    tasks = dict.fromkeys(task for model in models for task in model["results"])
    cards = []
    for task in tasks:
        rows = {m["name"]: m["results"][task] for m in models if task in m["results"]}
        bars = [Bar(n, row["accuracy"], row["standard_error"]) for n, row in rows.items()]
        first = next(iter(rows.values()))
        title = f"{first['title']}, {first['questions']:,} questions"
        cards.append(card(title, bars, chance=first["chance"], percent=True))
    if not cards:
        return "<p>Benchmarks: their questions could not be had, so they were left out.</p>"
    return (
        "<p>Benchmarks, with the accuracy of guessing as a mark. A model of this size guesses most "
        f'of them.</p><div class="cards">{"".join(cards)}</div>'
    )


def card(
    title: str,
    bars: list[Bar],
    *,
    lower: bool = False,
    chance: float | None = None,
    percent: bool = False,
) -> str:
    """Bars from zero to the largest value, with the standard error as a light end.

    Args:
        lower: lower is better.
        chance: what guessing reaches, drawn as a mark.
        percent: the values are shares.
    """
    if not bars:
        return ""
    largest = max([abs(bar.value) + (bar.error or 0) for bar in bars] + [chance or 0]) or 1
    rows = []
    for bar in bars:
        width = max(0.0, 100 * bar.value / largest)
        error = 100 * (bar.error or 0) / largest
        mark = f'<u style="left:{100 * chance / largest:.1f}%"></u>' if chance else ""
        scale, form = (100, ".1f") if percent else (1, ".3f")
        text = f"{scale * bar.value:{form}}" + "%" * percent
        text += f" <small>± {scale * bar.error:{form}}</small>" if bar.error is not None else ""
        style = f"width:{width:.1f}%;background:{color_of(bar.stage)}"
        whisker = f"left:{max(0.0, width - error):.1f}%;width:{2 * error:.1f}%"
        rows.append(
            f"<div><span>{escape(name_of(bar.stage))}</span><b>{text}</b></div>"
            f'<p><i style="{style}"></i><s style="{whisker}"></s>{mark}</p>'
        )
    notes = [note for note in ("lower is better" * lower, "mark: guessing" * bool(chance)) if note]
    note = f"<small>{'; '.join(notes)}</small>" if notes else ""
    return f'<div class="card"><h3>{escape(title)}</h3>{"".join(rows)}{note}</div>'


def color_of(stage: str) -> str:
    return COLORS.get(stage, LINES[0])


def name_of(stage: str) -> str:
    return STAGES[stage].title if stage in STAGES else stage


def dot(stage: str) -> str:
    return f'<i class="dot" style="background:{color_of(stage)}"></i>'


CARD_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: .8rem; margin: .8rem 0; }
.card { padding: .8rem 1rem; background: var(--card); border-radius: 10px; }
.card h3 { margin: 0 0 .6rem; font-size: .95rem; }
.card div { display: flex; justify-content: space-between; gap: .6rem; font-size: .88rem; }
.card div b { font-variant-numeric: tabular-nums; white-space: nowrap; }
.card small { color: var(--soft); font-weight: 400; }
.card p { position: relative; height: .55rem; margin: .15rem 0 .6rem; background: var(--line);
  border-radius: 4px; }
.card p i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; }
.card p s { position: absolute; top: 25%; height: 50%; background: var(--ink); opacity: .35; }
.card p u { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: var(--ink); }
"""
