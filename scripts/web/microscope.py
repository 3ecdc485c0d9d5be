"""The microscope page: what a model computes for a text (model/inference/microscope.py)."""

import math
from typing import NamedTuple

import altair as alt
import pandas as pd
import streamlit as st

from dataset.lm_dataset import encode_chat, encode_text
from model.inference.microscope import (
    Observation,
    expert_load,
    logit_lens,
    observe,
    token_losses,
    token_ranks,
    top_tokens,
)
from model.inference.tokens import decode_token_bytes
from scripts.web.answer import without_note
from scripts.web.controls import persistent
from scripts.web.models import ServedModel
from scripts.web.texts import Translator
from scripts.web.token_display import (
    BLUE,
    HUES,
    RED,
    STYLE,
    as_code,
    heat_map,
    readable,
    show_chips,
    show_table,
    table_cell,
    thumbnail,
    tint,
    token_axis,
    token_labels,
)

MAX_TOKENS = 160  # an attention map has this many rows and columns
TOP_K = 8  # most likely tokens to show
LENS_TOP_K = 5


class Text(NamedTuple):
    """The text under the microscope."""

    ids: list[int]
    labels: list[str]  # readable label of each token
    token_bytes: list[bytes]


def microscope_page(served: ServedModel, t: Translator) -> None:
    st.html(STYLE)
    st.caption(t("microscope_about"))
    ids = choose_ids(served, t)
    if len(ids) > MAX_TOKENS:
        st.caption(t("truncated", maximum=MAX_TOKENS, tokens=len(ids)))
    ids = ids[: min(MAX_TOKENS, served.loaded.max_positions)]
    token_bytes = [decode_token_bytes(served.loaded.tokenizer, token) for token in ids]
    text = Text(ids, [readable(each) for each in token_bytes], token_bytes)
    observation = observe_once(served.key, tuple(ids), served)
    show_statistics(text, observation, t)
    views = {
        "tokens": show_tokens,
        "next": show_next_tokens,
        "attention": show_attention,
        "lens": show_logit_lens,
        "experts": show_experts,
        "loss": show_losses,
    }
    view = st.segmented_control(
        t("view"),
        list(views),
        default="tokens",
        format_func=t,
        required=True,
        label_visibility="collapsed",
        **persistent("view"),
    )
    st.write(t(f"{view}_about"))
    views[view](served, text, observation, t)


def choose_ids(served: ServedModel, t: Translator) -> list[int]:
    """The tokens of the typed text, or of the chat without system message and tools."""
    tokenizer, messages = served.loaded.tokenizer, st.session_state.get("messages")
    source = "source_text"
    st.session_state.setdefault("source", source)
    if messages and not served.loaded.is_base_model:
        source = st.segmented_control(
            t("source"),
            ["source_text", "source_chat"],
            format_func=t,
            required=True,
            label_visibility="collapsed",
            **persistent("source"),
        )
    if source == "source_chat":
        return encode_chat(tokenizer, [without_note(message) for message in messages]).ids
    typed = st.text_area(t("text"), t("example"), height=80, **persistent("text"))
    return encode_text(tokenizer, typed if typed.strip() else t("example")).ids[:-1]


@st.cache_resource(max_entries=8, show_spinner=False)
def observe_once(
    key: tuple[str, str, float], ids: tuple[int, ...], _served: ServedModel
) -> Observation:
    """Run the model on a text, in the engine's thread, between two of its steps."""
    return _served.thread.call(lambda: observe(_served.loaded.model, list(ids)))


def position_slider(text: Text, t: Translator) -> int:
    """The position of the token that the user chooses."""
    last = len(text.ids) - 1
    if last == 0:
        return 0
    state = st.session_state
    state.position = min(state.get("position", last // 2), last)  # the text may be shorter now
    return st.select_slider(
        t("position"),
        range(last + 1),
        format_func=lambda n: f"{n + 1} {text.labels[n]}",
        **persistent("position"),
    )


# -- the views -------------------------------------------------------------------------------------


def show_statistics(text: Text, observation: Observation, t: Translator) -> None:
    # The first token (BOS) is not predicted, so that its bytes do not count.
    num_bytes, num_predicted = sum(map(len, text.token_bytes[1:])), len(text.ids) - 1
    values = {"n_tokens": str(len(text.ids)), "n_bytes": f"{num_bytes / max(1, num_predicted):.2f}"}
    if num_predicted:
        losses = token_losses(observation.logits, observation.ids)
        values["mean_loss"] = f"{losses.mean():.2f}"
        values["perplexity"] = f"{math.exp(min(losses.mean(), 99)):.1f}"
        values["bpb"] = f"{losses.sum() / math.log(2) / num_bytes:.2f}"
    with st.container(horizontal=True):
        for name, value in values.items():
            st.metric(t(name), value, width="content")


def show_tokens(served: ServedModel, text: Text, observation: Observation, t: Translator) -> None:
    tokens = zip(text.labels, text.ids, text.token_bytes, strict=True)
    show_chips(
        (label, f"{token}<br>{token_bytes.hex(' ')}", tint(HUES[n % len(HUES)], 0.3))
        for n, (label, token, token_bytes) in enumerate(tokens)
    )


def show_next_tokens(
    served: ServedModel, text: Text, observation: Observation, t: Translator
) -> None:
    top = top_tokens(observation.logits, TOP_K)
    labels = token_labels(served.loaded.tokenizer, top.ids)
    at = position_slider(text, t)
    st.write(t("next_after", token=as_code(text.labels[at])))
    probabilities = top.probabilities[at].tolist()
    bars = pd.DataFrame(
        {
            "rank": range(len(probabilities)),
            "token": labels[at],
            "probability": probabilities,
        }
    )
    chart = alt.Chart(bars).mark_bar(cornerRadius=3)
    chart = chart.encode(
        x=alt.X("probability", title=t("probability"), axis=alt.Axis(format=".0%")),
        y=alt.Y("rank:O", title=None, axis=token_axis(labels[at], labelFontSize=13)),
        tooltip=["token", alt.Tooltip("probability", format=".2%")],
    )
    st.altair_chart(chart.properties(height=60 + 24 * len(bars)))
    if at + 1 < len(text.ids):
        rank = int(token_ranks(observation.logits, observation.ids)[at]) + 1
        probability = math.exp(-token_losses(observation.logits, observation.ids)[at])
        token = as_code(text.labels[at + 1])
        st.write(t("actual_next", token=token, rank=rank, probability=probability))
    st.caption(t("all_positions"))
    rows = []
    for n, label in enumerate(text.labels):
        actual = text.ids[n + 1] if n + 1 < len(text.ids) else None
        predicted = zip(labels[n], top.ids[n].tolist(), top.probabilities[n].tolist(), strict=True)
        rows.append((label, [table_cell(name, p, token == actual) for name, token, p in predicted]))
    show_table([str(n + 1) for n in range(top.ids.shape[1])], rows)


def show_attention(
    served: ServedModel, text: Text, observation: Observation, t: Translator
) -> None:
    if observation.attention is None:
        st.info(t("no_attention"))
        return
    num_layers, num_heads = observation.attention.shape[:2]
    left, right = st.columns(2)
    layer = left.selectbox(t("layer"), range(1, num_layers + 1), **persistent("layer")) - 1
    head = right.selectbox(
        t("head"),
        [*range(1, num_heads + 1), 0],
        format_func=lambda number: str(number or t("mean_head")),
        **persistent("head"),
    )
    heads = observation.attention[layer]  # [H, T, T]
    weights = heads[head - 1] if head else heads.mean(0)  # [T, T]
    st.altair_chart(heat_map(weights, text.labels, t))
    at = position_slider(text, t)
    st.write(t("attends_to", token=as_code(text.labels[at])))
    row = weights[at, : at + 1].tolist()
    show_chips(
        (label, f"{weight:.0%}", tint(BLUE, weight**0.5 * 0.8), n == at)
        for n, (label, weight) in enumerate(zip(text.labels, row, strict=False))
    )
    st.caption(t("all_heads"))
    with st.container(horizontal=True):
        for number, each in enumerate(heads, start=1):
            st.image(thumbnail(each), f"{t('head')} {number}", width=132)


def show_logit_lens(
    served: ServedModel, text: Text, observation: Observation, t: Translator
) -> None:
    model = served.loaded.model
    if not hasattr(model.base_model, "norm"):
        st.info(t("lens_unknown"))
        return
    top = logit_lens(model, observation.hidden, LENS_TOP_K)
    rows = []
    for layer in reversed(range(len(top.ids))):  # the last layer on top
        labels = token_labels(served.loaded.tokenizer, top.ids[layer])
        probabilities = top.probabilities[layer].tolist()
        cells = []
        for at, (names, values) in enumerate(zip(labels, probabilities, strict=True)):
            correct = text.ids[at + 1 : at + 2] == [int(top.ids[layer, at, 0])]
            tooltip = "\n".join(f"{p:6.1%}  {name}" for name, p in zip(names, values, strict=True))
            cells.append(table_cell(names[0], values[0], correct, tooltip))
        rows.append((f"{t('layer')} {layer}" if layer else t("embedding"), cells))
    show_table(text.labels, rows)


def show_experts(served: ServedModel, text: Text, observation: Observation, t: Translator) -> None:
    moe_layers = [(n, each) for n, each in enumerate(observation.routing, start=1) if each]
    if not moe_layers:
        st.info(t("dense"))
        return
    rows, loads = [], []
    for layer, routing in moe_layers:
        cells = []
        for experts, weights in zip(
            routing.experts.tolist(), routing.weights.tolist(), strict=True
        ):
            chips = " ".join(
                f'<span style="background: {tint(HUES[e % len(HUES)], 0.15 + 0.6 * w)};'
                f'border-radius: 4px; padding: 1px 4px">{e + 1}<small>{w:.0%}</small></span>'
                for e, w in zip(experts, weights, strict=True)
            )
            cells.append(f'<td style="padding: 2px"><div class="mm-chips">{chips}</div></td>')
        rows.append((f"{t('layer')} {layer}", cells))
        loads += [
            {"layer": layer, "expert": str(e + 1), "share": share}
            for e, share in enumerate(expert_load(routing).tolist())
        ]
    show_table(text.labels, rows)
    st.write(t("load_about"))
    colours = [f"hsl({HUES[e % len(HUES)]}, 60%, 60%)" for e in range(len(expert_load(routing)))]
    chart = alt.Chart(pd.DataFrame(loads)).mark_bar()
    chart = chart.encode(
        x=alt.X("share", title=t("share"), axis=alt.Axis(format=".0%"), stack="normalize"),
        y=alt.Y("layer:O", title=t("layer")),
        color=alt.Color("expert", title=t("expert"), scale=alt.Scale(range=colours), sort=None),
        tooltip=["layer", "expert", alt.Tooltip("share", format=".1%")],
    )
    st.altair_chart(chart.properties(height=60 + 32 * len(moe_layers)))


def show_losses(served: ServedModel, text: Text, observation: Observation, t: Translator) -> None:
    losses = token_losses(observation.logits, observation.ids).tolist()
    if not losses:
        return
    uniform = math.log(observation.logits.shape[-1])  # the loss of guessing uniformly
    below = [("", tint(RED, 0))]  # the first token is not predicted
    below += [(f"{x:.2f}", tint(RED, 0.85 * min(1, x / uniform))) for x in losses]
    show_chips((label, *each) for label, each in zip(text.labels, below, strict=True))
    bars = pd.DataFrame(
        {"position": range(1, len(text.ids)), "token": text.labels[1:], "loss": losses}
    )
    chart = alt.Chart(bars).mark_bar()
    chart = chart.encode(
        x=alt.X("position:O", title=None, axis=token_axis(text.labels, labelAngle=-90)),
        y=alt.Y("loss", title=t("loss_axis")),
        color=alt.value(f"hsl({RED}, 70%, 55%)"),
        tooltip=["token", alt.Tooltip("loss", format=".3f")],
    )
    st.altair_chart(chart.properties(height=280))
