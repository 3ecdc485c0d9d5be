"""Pictures of training runs."""

import io
from pathlib import Path
from typing import Any

import matplotlib

from model.weights import atomic_write

matplotlib.use("Agg")  # no window: the picture goes to a file
from matplotlib import pyplot as plt  # noqa: E402


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path | str) -> None:
    """Training loss and held-out bits per byte (of preference data: accuracy) over the tokens
    trained, a colour for each run; of mixtures of experts also the load of each layer's busiest
    expert.

    Args:
        runs: name → the records of its metrics.jsonl.
        path: the PNG.
    """
    moe = any("expert_load" in record for records in runs.values() for record in records)
    keys = {key for records in runs.values() for record in records for key in record}
    accuracy = next((key for key in ("rewards/accuracies", "accuracy") if key in keys), "")
    of_pairs = f"eval_{accuracy}" in keys
    what, unit = (f"eval_{accuracy}", "accuracy") if of_pairs else ("eval_bpb", "bits per byte")
    figure, (left, right, *more) = plt.subplots(
        1, 2 + moe, figsize=(11 + 4 * moe, 4), layout="constrained"
    )
    for name, records in runs.items():
        losses = [(r["num_tokens"], r["loss"]) for r in records if "loss" in r]
        held_out = [(r["num_tokens"], r[what]) for r in records if what in r]
        seen = [(r["num_tokens"], r[accuracy]) for r in records if accuracy in r]
        if losses:
            left.plot(*zip(*losses, strict=True), label=name)
        if held_out:
            right.plot(*zip(*held_out, strict=True), "o-", markersize=4, label=name)
        if of_pairs and seen:
            right.plot(*zip(*seen, strict=True), alpha=0.4, label=f"{name}, pairs trained on")
        loads = [(r["num_tokens"], r["expert_load"]) for r in records if "expert_load" in r]
        if loads:
            tokens, layers = zip(*loads, strict=True)
            for layer, load in enumerate(zip(*layers, strict=True)):
                more[0].plot(tokens, load, label=f"{name}, layer {layer}")
    left.set(title="training loss", ylabel="nats per token")
    right.set(title="held-out data", ylabel=unit)
    for axes in more:
        axes.set(title="load of the busiest expert", ylabel="multiple of the mean")
    for axes in (left, right, *more):
        axes.set_xlabel("tokens trained")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


INK = "#123456"  # stands for the color of the page's text
LINES = "#3b82f6 #f97316 #22a67a #c04fd0 #d9a514 #e0475b".split()  # on light and dark ground
BASELINE = "#8a93a3"  # the run that a recipe was made from


def curve_svg(
    runs: dict[str, list[tuple[int, float]]],
    title: str,
    unit: str,
    from_zero: bool = False,
    color: str = "",
) -> str:
    """Curves over the tokens trained as an <svg> inside a page, whose text color they take.

    Args:
        runs: name → (tokens, value) of each. The first is drawn in front; a recipe's is grey.
        color: of the first.
    """
    style = {
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "none",  # text stays text
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(4.6, 3), layout="constrained")
        colors = iter([color or LINES[0], *LINES[1:], *LINES * len(runs)])
        for front, (name, points) in zip(range(len(runs), 0, -1), runs.items(), strict=True):
            own = BASELINE if name.startswith("recipe ") else next(colors)
            if points:
                marker = "." if len(points) < 30 else None
                axes.plot(
                    *zip(*points, strict=True),
                    color=own,
                    label=name,
                    marker=marker,
                    linewidth=1.4,
                    zorder=2 + front,
                )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xlabel="tokens trained", ylabel=unit)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.grid(alpha=0.25)
        if from_zero:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
        axes.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=8)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = picture.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def save_figure(figure: Any, path: Path | str) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    with atomic_write(path) as file:
        file.write(picture.getvalue())
