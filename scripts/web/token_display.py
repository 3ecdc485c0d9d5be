"""How the microscope shows tokens: as coloured chips, tables, heat maps and small pictures."""

import json
from collections.abc import Iterable
from html import escape
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from torch import Tensor

from model.inference.tokens import decode_token_bytes
from scripts.web.texts import Translator

MAX_AXIS_LABELS = 48  # more token labels would not fit along an axis
HUES = (210, 28, 140, 350, 265, 48, 180, 310)  # neighbours are easy to tell apart
BLUE, RED = 215, 5
RGB = (49, 120, 198)
STYLE = """<style>
.mm-chips {display: flex; flex-wrap: wrap; gap: 3px; line-height: 1.25}
.mm-chip {border-radius: 5px; padding: 2px 5px; text-align: center; white-space: pre;
  font-family: "Source Code Pro", monospace; font-size: .95rem; border: 1px solid transparent}
.mm-chip small {display: block; opacity: .75; font-size: .68rem}
.mm-here {border-color: currentColor; font-weight: 700}
.mm-scroll {overflow: auto; max-height: 34rem}
.mm-table {border-collapse: separate; border-spacing: 2px; font-size: .85rem}
.mm-table td, .mm-table th {padding: 3px 7px; border-radius: 4px; white-space: pre; text-align: center;
  font-family: "Source Code Pro", monospace; font-weight: 400; border: 1px solid transparent}
.mm-table th {opacity: .8}
.mm-table th:first-child {position: sticky; left: 0; text-align: right; opacity: 1; z-index: 1;
  background: light-dark(#fff, #0e1117)}
.mm-table td.mm-here {border-color: currentColor}
.mm-table small {opacity: .75; display: block; font-size: .7rem}
</style>"""  # noqa: E501


# -- labels ----------------------------------------------------------------------------------------


def readable(part: bytes) -> str:
    """The bytes of a token as visible text: spaces and line breaks as signs, incomplete characters
    as hexadecimal."""
    try:
        text = part.decode()
    except UnicodeDecodeError:
        return f"‹{part.hex(' ')}›"
    text = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return text if text.isprintable() else f"‹{part.hex(' ')}›"


def token_labels(tokenizer: Any, ids: Tensor) -> list[list[str]]:
    """Readable labels of [T, k] token ids."""
    return [
        [readable(decode_token_bytes(tokenizer, token)) for token in row] for row in ids.tolist()
    ]


def as_code(label: str) -> str:
    """A token as inline code in Markdown."""
    return f"`{label.replace('`', 'ˋ')}`"


def tint(hue: int, alpha: float) -> str:
    """A colour that is visible on white and on black."""
    return f"hsla({hue}, 75%, 55%, {alpha:.2f})"


# -- HTML ------------------------------------------------------------------------------------------


def show_chips(chips: Iterable[tuple]) -> None:
    """Tokens side by side: (label, HTML below it, colour[, whether it is framed])."""
    parts = []
    for label, below, colour, *framed in chips:
        css_class = "mm-chip mm-here" if any(framed) else "mm-chip"
        below = f"<small>{below}</small>" if below else ""
        parts.append(
            f'<div class="{css_class}" style="background:{colour}">{escape(label)}{below}</div>'
        )
    st.html(f'<div class="mm-chips">{"".join(parts)}</div>')


def table_cell(label: str, probability: float, framed: bool, title: str = "") -> str:
    """A table cell, darker for a higher probability."""
    css_class = ' class="mm-here"' if framed else ""
    # the square root keeps small probabilities visible
    background = tint(BLUE, 0.8 * probability**0.5)
    return (
        f'<td{css_class} style="background:{background}" title="{escape(title)}">'
        f"{escape(label)}<small>{probability:.0%}</small></td>"
    )


def show_table(columns: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """A scrolling table of HTML cells; each row has a label."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>" for name, cells in rows)
    html = f'<table class="mm-table"><tr><th></th>{head}</tr>{body}</table>'
    st.html(f'<div class="mm-scroll">{html}</div>')


# -- charts ----------------------------------------------------------------------------------------


def token_axis(labels: list[str], **options: Any) -> alt.Axis:
    """An axis over token positions, with the tokens as labels if they fit."""
    if len(labels) > MAX_AXIS_LABELS:
        return alt.Axis(labels=False, ticks=False)
    shown = json.dumps([label[:12] for label in labels], ensure_ascii=False)
    return alt.Axis(
        labelExpr=f"{shown}[datum.value]", labelOverlap=False, labelFlush=False, **options
    )


def heat_map(weights: Tensor, labels: list[str], t: Translator) -> alt.Chart:
    """Attention weights of one head, [T, T]: queries down, keys across, the causal half only."""
    cells = [
        {"row": i, "column": j, "query": labels[i], "key": labels[j], "weight": weight}
        for i, row in enumerate(weights.tolist())
        for j, weight in enumerate(row[: i + 1])
    ]
    chart = alt.Chart(pd.DataFrame(cells)).mark_rect()
    return chart.encode(
        x=alt.X("column:O", title=t("key"), axis=token_axis(labels, labelAngle=-90)),
        y=alt.Y("row:O", title=t("query"), axis=token_axis(labels)),
        color=alt.value(f"rgb{RGB}"),
        opacity=alt.Opacity(  # opacity, not a colour scale: it looks well on white and on black
            "weight",
            scale=alt.Scale(type="sqrt", domain=[0, 1], range=[0.02, 1]),
            legend=alt.Legend(orient="top", format=".0%", values=[0, 0.1, 0.5, 1]),
            title=t("weight"),
        ),
        tooltip=[
            alt.Tooltip("query", title=t("query")),
            alt.Tooltip("key", title=t("key")),
            alt.Tooltip("weight", title=t("weight"), format=".1%"),
        ],
    ).properties(height=max(320, min(620, 18 * len(labels) + 90)))


def thumbnail(weights: Tensor) -> np.ndarray:
    """A small picture of a head's weights: [T, T] → [side, side, 4] (RGBA)."""
    alpha = weights.sqrt().cpu().numpy()  # the square root keeps small weights visible
    picture = np.empty((*alpha.shape, 4), np.uint8)
    picture[..., :3], picture[..., 3] = RGB, alpha * 255
    zoom = max(1, 264 // len(alpha))
    return picture.repeat(zoom, 0).repeat(zoom, 1)
