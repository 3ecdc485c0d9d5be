"""The microscope page: what a model does with a text (model/inference/microscope.py)."""

import json
import math
from html import escape
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from torch import Tensor

from dataset.lm_dataset import encode_chat, encode_text
from model.inference.microscope import (
    Observation,
    bytes_of_token,
    expert_load,
    logit_lens,
    observe,
    token_losses,
    token_ranks,
    top_tokens,
)
from scripts.web.chat import kept, without_note
from scripts.web.models import Loaded
from scripts.web.texts import Words

MOST_TOKENS = 160  # an attention map has that many rows and columns
MOST_LABELS = 48  # beyond, the names of the tokens would not fit beside it
K = 8  # likeliest tokens
HUES = (210, 28, 140, 350, 265, 48, 180, 310)  # neighbours that can be told apart
BLUE, RED = 215, 5
COLOUR = (49, 120, 198)
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


class Text(NamedTuple):
    """What is looked at."""

    ids: list[int]
    labels: list[str]  # of each token, so that a person can see it
    bytes: list[bytes]


def microscope_page(loaded: Loaded, words: Words) -> None:
    st.html(STYLE)
    st.caption(words("microscope_about"))
    ids = chosen_ids(loaded, words)
    if len(ids) > MOST_TOKENS:
        st.caption(words("cut", most=MOST_TOKENS, tokens=len(ids)))
    ids = ids[: min(MOST_TOKENS, loaded.room)]
    tokenizer = loaded.chat.tokenizer
    parts = [bytes_of_token(tokenizer, token) for token in ids]
    text = Text(ids, [readable(part) for part in parts], parts)
    seen = look(loaded.key, tuple(ids), loaded)
    show_figures(text, seen, words)
    views = {
        "tokens": show_tokens,
        "next": show_next,
        "attention": show_attention,
        "lens": show_lens,
        "experts": show_experts,
        "loss": show_loss,
    }
    chosen = st.segmented_control(
        words("view"),
        list(views),
        default="tokens",
        format_func=words,
        required=True,
        label_visibility="collapsed",
        **kept("view"),
    )
    st.write(words(f"{chosen}_about"))
    views[chosen](loaded, text, seen, words)


def chosen_ids(loaded: Loaded, words: Words) -> list[int]:
    """The tokens of the text that is typed, or of the chat, without system message and tools."""
    tokenizer, messages = loaded.chat.tokenizer, st.session_state.get("messages")
    source = "source_text"
    st.session_state.setdefault("source", source)
    if messages and not loaded.continues:
        source = st.segmented_control(
            words("source"),
            ["source_text", "source_chat"],
            format_func=words,
            required=True,
            label_visibility="collapsed",
            **kept("source"),
        )
    if source == "source_chat":
        return encode_chat(tokenizer, [without_note(message) for message in messages]).ids
    typed = st.text_area(words("text"), words("example"), height=80, **kept("text"))
    return encode_text(tokenizer, typed if typed.strip() else words("example")).ids[:-1]


@st.cache_resource(max_entries=8, show_spinner=False)
def look(key: tuple[str, str, float], ids: tuple[int, ...], _loaded: Loaded) -> Observation:
    """What a model does with a text, between two steps of what it writes meanwhile."""
    return _loaded.thread.call(lambda: observe(_loaded.chat.model, list(ids)))


def readable(part: bytes) -> str:
    """The bytes of a token so that a person can see them: spaces and line breaks marked, a part of
    a character in hexadecimal."""
    try:
        text = part.decode()
    except UnicodeDecodeError:
        return f"‹{part.hex(' ')}›"
    text = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return text if text.isprintable() else f"‹{part.hex(' ')}›"


# -- the views -------------------------------------------------------------------------------------


def show_figures(text: Text, seen: Observation, words: Words) -> None:
    figures = {"n_tokens": str(len(text.ids))}
    figures["n_bytes"] = f"{sum(map(len, text.bytes[1:])) / max(1, len(text.ids) - 1):.2f}"
    if len(text.ids) > 1:
        losses = token_losses(seen.logits, seen.ids)
        size = sum(map(len, text.bytes[1:]))
        figures["mean_loss"] = f"{losses.mean():.2f}"
        figures["perplexity"] = f"{math.exp(min(losses.mean(), 99)):.1f}"
        figures["bpb"] = f"{losses.sum() / math.log(2) / size:.2f}"
    with st.container(horizontal=True):
        for name, value in figures.items():
            st.metric(words(name), value, width="content")


def show_tokens(loaded: Loaded, text: Text, seen: Observation, words: Words) -> None:
    chips(
        (label, f"{token}<br>{part.hex(' ')}", tint(HUES[n % len(HUES)], 0.3))
        for n, (label, token, part) in enumerate(
            zip(text.labels, text.ids, text.bytes, strict=True)
        )
    )


def show_next(loaded: Loaded, text: Text, seen: Observation, words: Words) -> None:
    tokenizer = loaded.chat.tokenizer
    top = top_tokens(seen.logits, K)
    names = names_of(tokenizer, top.ids)
    at = place(text, words)
    st.write(words("behind", token=code(text.labels[at])))
    shares = top.probabilities[at].tolist()
    bars = pd.DataFrame({"rank": range(len(shares)), "token": names[at], "probability": shares})
    chart = alt.Chart(bars).mark_bar(cornerRadius=3)
    chart = chart.encode(
        x=alt.X("probability", title=words("probability"), axis=alt.Axis(format=".0%")),
        y=alt.Y("rank:O", title=None, axis=named_axis(names[at], labelFontSize=13)),
        tooltip=["token", alt.Tooltip("probability", format=".2%")],
    )
    st.altair_chart(chart.properties(height=60 + 24 * len(bars)))
    if at + 1 < len(text.ids):
        ranks, came = token_ranks(seen.logits, seen.ids), text.labels[at + 1]
        probability = math.exp(-token_losses(seen.logits, seen.ids)[at])
        st.write(words("came", token=code(came), rank=int(ranks[at]) + 1, probability=probability))
    st.caption(words("all_places"))
    rows = []
    for n, label in enumerate(text.labels):
        true = text.ids[n + 1] if n + 1 < len(text.ids) else None
        cells = zip(names[n], top.ids[n].tolist(), top.probabilities[n].tolist(), strict=True)
        rows.append((label, [cell(name, p, p, token == true) for name, token, p in cells]))
    table([str(n + 1) for n in range(top.ids.shape[1])], rows)


def show_attention(loaded: Loaded, text: Text, seen: Observation, words: Words) -> None:
    if seen.attention is None:
        st.info(words("no_attention"))
        return
    layers, heads = seen.attention.shape[:2]
    left, right = st.columns(2)
    layer = left.selectbox(words("layer"), range(1, layers + 1), **kept("layer")) - 1
    head = right.selectbox(
        words("head"),
        [*range(1, heads + 1), 0],
        format_func=lambda each: str(each or words("mean_head")),
        **kept("head"),
    )
    weights = seen.attention[layer]  # [H, T, T]
    chosen = weights[head - 1] if head else weights.mean(0)
    st.altair_chart(heat_map(chosen, text, words))
    at = place(text, words)
    st.write(words("looks_at", token=code(text.labels[at])))
    shares = chosen[at, : at + 1].tolist()
    chips(
        (label, f"{share:.0%}", tint(BLUE, share**0.5 * 0.8), n == at)
        for n, (label, share) in enumerate(zip(text.labels, shares, strict=False))
    )
    st.caption(words("all_heads"))
    with st.container(horizontal=True):
        for number, each in enumerate(weights, start=1):
            st.image(as_image(each), f"{words('head')} {number}", width=132)


def show_lens(loaded: Loaded, text: Text, seen: Observation, words: Words) -> None:
    if not hasattr(loaded.chat.model.base_model, "norm"):
        st.info(words("lens_unknown"))
        return
    top = logit_lens(loaded.chat.model, seen.hidden, 5)
    rows = []
    for layer in reversed(range(len(top.ids))):
        names = names_of(loaded.chat.tokenizer, top.ids[layer])
        cells = []
        for at, (some, shares) in enumerate(
            zip(names, top.probabilities[layer].tolist(), strict=True)
        ):
            came = text.ids[at + 1 : at + 2] == [int(top.ids[layer, at, 0])]
            told = "\n".join(f"{p:6.1%}  {name}" for name, p in zip(some, shares, strict=True))
            cells.append(cell(some[0], shares[0], shares[0], came, told))
        rows.append((f"{words('layer')} {layer}" if layer else words("embedding"), cells))
    table(text.labels, rows)


def show_experts(loaded: Loaded, text: Text, seen: Observation, words: Words) -> None:
    mixtures = [(n, each) for n, each in enumerate(seen.routing, start=1) if each]
    if not mixtures:
        st.info(words("dense"))
        return
    rows, loads = [], []
    for layer, routing in mixtures:
        cells = []
        for chosen, weights in zip(routing.chosen.tolist(), routing.weights.tolist(), strict=True):
            told = " ".join(
                f'<span style="background: {tint(HUES[e % len(HUES)], 0.15 + 0.6 * w)};'
                f'border-radius: 4px; padding: 1px 4px">{e + 1}<small>{w:.0%}</small></span>'
                for e, w in zip(chosen, weights, strict=True)
            )
            cells.append(f'<td style="padding: 2px"><div class="mm-chips">{told}</div></td>')
        rows.append((f"{words('layer')} {layer}", cells))
        loads += [
            {"layer": layer, "expert": str(e + 1), "share": share}
            for e, share in enumerate(expert_load(routing).tolist())
        ]
    table(text.labels, rows)
    st.write(words("load_about"))
    colours = [f"hsl({HUES[e % len(HUES)]}, 60%, 60%)" for e in range(len(expert_load(routing)))]
    chart = alt.Chart(pd.DataFrame(loads)).mark_bar()
    chart = chart.encode(
        x=alt.X("share", title=words("share"), axis=alt.Axis(format=".0%"), stack="normalize"),
        y=alt.Y("layer:O", title=words("layer")),
        color=alt.Color("expert", title=words("expert"), scale=alt.Scale(range=colours), sort=None),
        tooltip=["layer", "expert", alt.Tooltip("share", format=".1%")],
    )
    st.altair_chart(chart.properties(height=60 + 32 * len(mixtures)))


def show_loss(loaded: Loaded, text: Text, seen: Observation, words: Words) -> None:
    losses = token_losses(seen.logits, seen.ids).tolist()
    if not losses:
        return
    most = math.log(seen.logits.shape[-1])  # the loss of pure guessing
    told = [("", tint(RED, 0))] + [(f"{x:.2f}", tint(RED, 0.85 * min(1, x / most))) for x in losses]
    chips((label, *each) for label, each in zip(text.labels, told, strict=True))
    frame = pd.DataFrame(
        {"place": range(1, len(text.ids)), "token": text.labels[1:], "loss": losses}
    )
    chart = alt.Chart(frame).mark_bar()
    chart = chart.encode(
        x=alt.X("place:O", title=None, axis=named_axis(text.labels, labelAngle=-90)),
        y=alt.Y("loss", title=words("loss_axis")),
        color=alt.value(f"hsl({RED}, 70%, 55%)"),
        tooltip=["token", alt.Tooltip("loss", format=".3f")],
    )
    st.altair_chart(chart.properties(height=280))


# -- parts of them ---------------------------------------------------------------------------------


def place(text: Text, words: Words) -> int:
    """A token that is chosen with a slider."""
    last = len(text.ids) - 1
    if last == 0:
        return 0
    state = st.session_state
    state.place = min(state.get("place", last // 2), last)  # the text may have become shorter
    return st.select_slider(
        words("place"),
        range(last + 1),
        format_func=lambda n: f"{n + 1} {text.labels[n]}",
        **kept("place"),
    )


def names_of(tokenizer: Any, ids: Tensor) -> list[list[str]]:
    """[T, k] ids as a person can see them."""
    return [[readable(bytes_of_token(tokenizer, token)) for token in row] for row in ids.tolist()]


def code(label: str) -> str:
    """A token in Markdown."""
    return f"`{label.replace('`', 'ˋ')}`"


def tint(hue: int, strength: float) -> str:
    """A colour that can be seen on white and on black."""
    return f"hsla({hue}, 75%, 55%, {strength:.2f})"


def chips(each: Any) -> None:
    """Tokens side by side: label, what stands below it (HTML), its colour, whether it is framed."""
    found = []
    for label, below, colour, *here in each:
        kind = "mm-chip mm-here" if any(here) else "mm-chip"
        below = f"<small>{below}</small>" if below else ""
        found.append(
            f'<div class="{kind}" style="background:{colour}">{escape(label)}{below}</div>'
        )
    st.html(f'<div class="mm-chips">{"".join(found)}</div>')


def cell(label: str, share: float, strength: float, here: bool, title: str = "") -> str:
    """A cell of a table, the darker the likelier."""
    kind = ' class="mm-here"' if here else ""
    return (
        f'<td{kind} style="background:{tint(BLUE, 0.8 * strength**0.5)}" title="{escape(title)}">'
        f"{escape(label)}<small>{share:.0%}</small></td>"
    )


def table(columns: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """A table of cells, which scrolls if it is wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>" for name, cells in rows)
    html = f'<table class="mm-table"><tr><th></th>{head}</tr>{body}</table>'
    st.html(f'<div class="mm-scroll">{html}</div>')


def named_axis(names: list[str], **looks: Any) -> alt.Axis:
    """An axis of numbered places, with a token's name at each if they fit."""
    if len(names) > MOST_LABELS:
        return alt.Axis(labels=False, ticks=False)
    shown = json.dumps([name[:12] for name in names], ensure_ascii=False)
    return alt.Axis(labelExpr=f"{shown}[datum.value]", labelOverlap=False, **looks)


def heat_map(weights: Tensor, text: Text, words: Words) -> alt.Chart:
    """Attention of one head, [T, T]: who looks, at what."""
    labels = text.labels
    cells = [
        {"row": i, "column": j, "from": labels[i], "to": labels[j], "weight": weight}
        for i, line in enumerate(weights.tolist())
        for j, weight in enumerate(line[: i + 1])
    ]
    chart = alt.Chart(pd.DataFrame(cells)).mark_rect()
    return chart.encode(
        x=alt.X("column:O", title=words("to"), axis=named_axis(labels, labelAngle=-90)),
        y=alt.Y("row:O", title=words("from"), axis=named_axis(labels)),
        color=alt.value(f"rgb{COLOUR}"),
        opacity=alt.Opacity(  # not a colour, so that it looks well on white and on black
            "weight",
            scale=alt.Scale(type="sqrt", domain=[0, 1], range=[0.02, 1]),
            legend=alt.Legend(orient="top", format=".0%", values=[0, 0.1, 0.5, 1]),
            title=words("weight"),
        ),
        tooltip=[
            alt.Tooltip("from", title=words("from")),
            alt.Tooltip("to", title=words("to")),
            alt.Tooltip("weight", title=words("weight"), format=".1%"),
        ],
    ).properties(height=max(320, min(620, 18 * len(labels) + 90)))


def as_image(weights: Tensor) -> np.ndarray:
    """A small picture of a head: [T, T] → [side, side, 4], the stronger the less transparent."""
    strong = weights.sqrt().cpu().numpy()  # square roots, so that small weights show
    picture = np.empty((*strong.shape, 4), np.uint8)
    picture[..., :3], picture[..., 3] = COLOUR, strong * 255
    zoom = max(1, 264 // len(strong))
    return picture.repeat(zoom, 0).repeat(zoom, 1)
