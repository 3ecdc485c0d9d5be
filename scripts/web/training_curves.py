"""The curves of the training page: several runs laid over each other, a chart for each metric."""

from collections.abc import Iterable
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from scripts.web.controls import persistent
from scripts.web.texts import TEXTS, Translator
from scripts.web.training_runs import WatchedRun
from trainer.common.metrics import CURVES, Curve
from trainer.report.plots import LINES

# What is looked at first; the other curves follow on request, in the report's order.
FIRST = """loss eval_bpb reward eval_reward rewards/accuracies eval_rewards/accuracies accuracy
    eval_accuracy kl learning_rate""".split()
FEW = 40  # points that are drawn as points, too
HEIGHT = 230


def curves_of(runs: Iterable[WatchedRun]) -> dict[str, Curve]:
    """The metrics that the runs log, with titles as in the report; what is looked at first is
    first."""
    known: dict[str, Curve | None] = {name: CURVES.get(name) or Curve(name) for name in FIRST}
    known |= {name: curve for name, curve in CURVES.items() if name not in known}
    there = dict.fromkeys(name for run in runs for name in run.columns)
    known |= {name: Curve(name.replace("_", " ")) for name in there if name not in known}
    return {name: curve for name, curve in known.items() if curve and name in there}


def show_curves(runs: list[WatchedRun], t: Translator) -> None:
    """A chart of each metric with a line for each run, in the runs' colors."""
    curves = curves_of(runs)
    if not curves:
        st.caption(t("no_curves"))
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        axis = st.segmented_control(
            t("x_axis"),
            ["num_tokens", "step", "minutes"],
            default="num_tokens",
            format_func=lambda name: t(f"axis_{name}"),
            required=True,
            label_visibility="collapsed",
            **persistent("training_axis"),
        )
        everything = st.toggle(t("all_curves"), **persistent("all_curves"))
    shown = [name for name in curves if everything or name in FIRST]
    columns = st.columns(min(3, max(1, len(shown))))
    versions = tuple((run.run, run.version) for run in runs)
    for number, name in enumerate(shown):
        with columns[number % len(columns)]:
            spec = chart_spec(versions, name, axis, t.index, runs, curves[name], t)
            st.vega_lite_chart(spec=spec)


@st.cache_resource(max_entries=200, show_spinner=False)
def chart_spec(
    versions: tuple,
    name: str,
    axis: str,
    language: int,
    _runs: list[WatchedRun],
    _curve: Curve,
    _t: Translator,
) -> dict[str, Any]:
    """The Vega-Lite chart of a metric. It is made only when a log has grown: every other look at it
    should cost the training nothing."""
    return curve_chart(_runs, name, _curve, axis, _t).to_dict()


def curve_chart(
    runs: list[WatchedRun], name: str, curve: Curve, axis: str, t: Translator
) -> alt.LayerChart:
    title = t(f"curve_{name}") if f"curve_{name}" in TEXTS else curve.title
    unit = t(f"unit_{curve.unit}") if f"unit_{curve.unit}" in TEXTS else curve.unit
    rows = [
        {"x": x, "y": y, "run": run.run.label} for run in runs for x, y in run.points(name, axis)
    ]
    labels = [run.run.label for run in runs]
    small = 0 < max((abs(row["y"]) for row in rows), default=0) < 0.01
    base = alt.Chart(pd.DataFrame(rows, columns=["x", "y", "run"])).encode(
        x=alt.X("x:Q", title=None, axis=alt.Axis(format="~s", tickCount=5)),
        y=alt.Y(
            "y:Q",
            title=unit or None,
            scale=alt.Scale(zero=curve.from_zero),
            axis=alt.Axis(format=".1e" if small else "~g", tickCount=5),
        ),
        color=alt.Color(
            "run:N", scale=alt.Scale(domain=labels, range=LINES[: len(labels)]), legend=None
        ),
    )
    few = len(rows) <= FEW * len(runs)
    # a wide, invisible point around each point: the tooltip is easy to hit
    hover = base.mark_point(size=200, opacity=0).encode(
        tooltip=[
            alt.Tooltip("run:N", title=t("run")),
            alt.Tooltip("x:Q", title=t(f"axis_{axis}"), format=",.4~g"),
            alt.Tooltip("y:Q", title=title, format=".4~g"),
        ]
    )
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18) if few else False)
    return alt.layer(line, hover).properties(title=title, height=HEIGHT)
