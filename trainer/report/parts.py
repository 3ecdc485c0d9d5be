"""What pages of trainings are made of: sections, tables, tiles, charts. No script, no font, no
address is needed to look at them: everything is inside the one file.
"""

import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from model.weights import atomic_write
from trainer.common.metrics import CURVES, Curve
from trainer.report.plots import curve_svg

Records = list[dict[str, Any]]


def write_page(path: Path, title: str, about: str, parts: Iterable[str], style: str = "") -> None:
    """A page of its own in a file. `style` is CSS after that of all pages."""
    page = PAGE.format(
        title=escape(title),
        about=escape(about),
        style=STYLE + style,
        parts="\n".join(filter(None, parts)),
    )
    with atomic_write(path) as file:
        file.write(page.encode())


def section(title: str, content: str) -> str:
    if not content:
        return ""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>\n{content}</section>'


def anchor(title: str) -> str:
    """The part of a section's address after #."""
    return "-".join(re.findall(r"[a-z]+", title.lower()))


def tile_grid(shown: Iterable[tuple[str, str]]) -> str:
    """(name, value) of each number that is worth a tile; those without a value are left out."""
    cells = (f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown if value)
    return f'<div class="tiles">{"".join(cells)}</div>'


def charts(
    runs: dict[str, Records],
    only: Callable[[str], bool] = lambda metric: True,
    color: str = "",
) -> str:
    """A chart of each metric in the logs, with all runs in it, over the tokens trained.

    Args:
        only: whether a metric is drawn.
        color: of the first run.
    """
    curves = dict(CURVES)
    for record in (record for records in runs.values() for record in records):
        for name, value in record.items():
            if isinstance(value, int | float | list):
                curves.setdefault(name, Curve(name.replace("_", " ")))
    drawn = []
    for name, curve in curves.items():
        lines = {run: points(records, name) for run, records in runs.items()}
        if curve and only(name) and any(lines.values()):
            drawn.append(f"<figure>{curve_svg(lines, *curve, color=color)}</figure>")
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def points(records: Records, name: str) -> list[tuple[int, float]]:
    """(tokens, value); the largest where each layer has its own."""
    found = [(record.get("num_tokens"), record.get(name)) for record in records]
    return [
        (tokens, max(value) if isinstance(value, list) else value)
        for tokens, value in found
        if tokens is not None and isinstance(value, int | float | list) and value != []
    ]


def table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{lines}</table></div>'


def folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


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
