"""What scaling_law.py computes from its runs: the fit, its error, forecasts, the plot."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from dataset.sampler import GlobalBatchSampler
from model.model_minimind import MiniMindConfig
from trainer import train_pretrain
from trainer.common.compute_optimal import SIZES, ScalingLaw, Speed, effective_tokens
from trainer.common.hardware import GPU_TFLOPS, flops_per_token
from trainer.common.loop import INITIAL_BATCH_TOKENS
from trainer.report.plots import save_figure

SEQUENCE = 512
DATA_TOKENS = 17_881_637  # of pretrain.jsonl.gz: longer runs repeat them
BOOTSTRAPS = 200
EXPONENTS = np.arange(0.1, 1.0, 0.01)
# Throughputs of README.md ("On a GPU"): the share of the peak that a width reaches on an H100. No
# 3090 was measured; it is taken to reach the same shares of its smaller peak, at most a quarter.
MFU = {512: 0.141, 768: 0.217}
UNIQUE_TOKENS = 500e6  # of MiniMind's pretraining file of 1.6 GB
Results = list[dict[str, Any]]


def default_sampler() -> GlobalBatchSampler:
    """The batches of train_pretrain.py's defaults on a CPU, as many as one likes."""
    args = train_pretrain.Args()
    return GlobalBatchSampler(
        10**9,
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation_steps,
        batch_ramp=args.batch_ramp,
        initial_batch_size=INITIAL_BATCH_TOKENS // args.max_seq_len,
    )


def parameters_of(width: int, depth: int) -> int:
    config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
    assert config.intermediate_size is not None
    attention = width * config.head_dim * (2 * config.num_attention_heads)
    attention += width * config.head_dim * (2 * config.num_key_value_heads)
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    return width * config.vocab_size + depth * layer + width


def fit(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]
) -> ScalingLaw:
    """The law with the least squares of the relative error.

    For given exponents it is linear in E, A and B: a grid of exponents, and of each pair the
    solution of three linear equations; solutions with a negative term are left out.
    """
    n, d, losses = (np.asarray(each, dtype=float) for each in (parameters, tokens, losses))
    # terms in units of typical sizes, so that the equations are well conditioned
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    alpha, beta = (each.ravel() for each in np.meshgrid(EXPONENTS, EXPONENTS))
    terms = np.stack(  # [grid, points, 3]
        [
            np.broadcast_to(np.ones_like(n), (len(alpha), len(n))),
            (n0 / n) ** alpha[:, None],
            (d0 / d) ** beta[:, None],
        ],
        axis=-1,
    )
    terms = terms / losses[:, None]  # the relative error
    gram = terms.transpose(0, 2, 1) @ terms + 1e-9 * np.eye(3)
    solutions = np.linalg.solve(gram, terms.sum(1)[..., None])[..., 0]
    errors = ((terms @ solutions[..., None])[..., 0] - 1) ** 2
    errors = np.where((solutions < 0).any(-1), np.inf, errors.sum(-1))
    best = int(np.argmin(errors))
    E, A, B = solutions[best]
    return ScalingLaw(
        E=float(E),
        A=float(A * n0 ** alpha[best]),
        alpha=float(alpha[best]),
        B=float(B * d0 ** beta[best]),
        beta=float(beta[best]),
    )


def bootstrap(law: ScalingLaw, runs: Results) -> list[ScalingLaw]:
    """Laws that the same runs might have given: fits to the law with residuals drawn anew. The
    residuals are enlarged, since a fit of five constants to n runs makes them too small."""
    parameters = [run["parameters"] for run in runs]
    tokens = [effective_tokens(run["tokens"], DATA_TOKENS) for run in runs]
    fitted = np.array([law.loss(n, d) for n, d in zip(parameters, tokens, strict=True)])
    residuals = np.array([run["bits_per_byte"] for run in runs]) / fitted - 1
    residuals *= np.sqrt(len(runs) / max(1, len(runs) - 5))
    rng = np.random.default_rng(0)
    return [
        fit(parameters, tokens, fitted * (1 + rng.choice(residuals, len(runs))))
        for _ in range(BOOTSTRAPS)
    ]


def best_on_gpu(law: ScalingLaw, gpu: str, most: float) -> tuple[str, float, float]:
    """Size, tokens and loss of the best of SIZES after two hours, at the shares of the peak that
    MFU has, but no more than `most`."""
    best = ("", 0.0, np.inf)
    for width, depth in SIZES:
        config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
        share = min(most, float(np.interp(width, list(MFU), list(MFU.values()))))
        rate = share * GPU_TFLOPS[gpu] * 1e12 / flops_per_token(config, SEQUENCE)
        loss = law.loss(parameters_of(width, depth), 7200 * rate, UNIQUE_TOKENS)
        if loss < best[2]:
            best = (f"{width}x{depth}", 7200 * rate, loss)
    return best


def plot(
    path: str, runs: Results, law: ScalingLaw, speeds: dict[str, Speed], held_out: list[float]
) -> None:
    """Loss against compute, a curve for each size and the lowest of them all; and loss against
    size, a curve for each budget."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    minutes = np.geomspace(0.2, 200, 40)
    losses = np.array(
        [
            [
                law.loss(
                    parameters_of(*map(int, size.split("x"))),
                    SEQUENCE * speeds[size].steps_within(60 * each, default_sampler())[1],
                    DATA_TOKENS,
                )
                for each in minutes
            ]
            for size in speeds
        ]
    )
    colors = plt.colormaps["viridis"](np.linspace(0, 0.95, len(speeds)))
    for size, curve, color in zip(speeds, losses, colors, strict=True):
        left.plot(minutes, curve, color=color, lw=0.8, alpha=0.7)
        own = [run for run in runs if run["size"] == size]
        spent = [minutes_of(run, speeds[size]) for run in own]
        label = f"{parameters_of(*map(int, size.split('x'))) / 1e6:.1f}M ({size})"
        values = [run["bits_per_byte"] for run in own]
        left.plot(spent, values, "o", color=color, ms=5, label=label if own else None)
    left.plot(minutes, losses.min(0), "k--", lw=1.5, label="the law's best size")
    left.set(xscale="log", xlabel="minutes of two CPU cores", ylabel="held-out bits per byte")
    shown = [run["bits_per_byte"] for run in runs]
    left.set_ylim(losses.min() - 0.05, max(shown) + 0.1)
    budgets = sorted({run["minutes"] for run in runs if run["minutes"]})
    sizes = [parameters_of(*map(int, size.split("x"))) / 1e6 for size in speeds]
    shades = plt.colormaps["plasma"](np.linspace(0, 0.85, max(1, len(budgets))))
    for budget, color in zip(budgets, shades, strict=True):
        tried = [run for run in runs if run["minutes"] == budget]
        curve = [
            law.loss(
                n * 1e6,
                SEQUENCE * speed.steps_within(60 * budget, default_sampler())[1],
                DATA_TOKENS,
            )
            for n, speed in zip(sizes, speeds.values(), strict=True)
        ]
        unseen = budget in held_out
        marker, line = ("s", "--") if unseen else ("o", "-")
        label = f"{budget:g} min" + ", not in the fit" * unseen
        right.plot(sizes, curve, line, color=color, lw=1)
        points = [(run["parameters"] / 1e6, run["bits_per_byte"]) for run in tried]
        right.plot(*zip(*points, strict=True), marker, color=color, label=label)
        best = int(np.argmin(curve))
        right.plot(sizes[best], curve[best], "*", color=color, ms=13, mec="k", mew=0.5)
    right.set_ylim(losses.min() - 0.05, max(shown) + 0.1)
    right.set(xscale="log", xlabel="million parameters", ylabel="held-out bits per byte")
    right.set_title("the same time, other sizes (star: the choice of --minutes)", fontsize=10)
    left.set_title("points: runs; lines: the fitted law", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", lw=0.4)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7, loc="upper right")
    save_figure(figure, path)


def minutes_of(run: dict[str, Any], speed: Speed) -> float:
    """Minutes of two cores that a run takes at the measured speed."""
    return (run["steps"] * speed.update + run["tokens"] / SEQUENCE * speed.sample) / 60
