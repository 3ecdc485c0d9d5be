"""The log of a run: metrics accumulated between log lines, metrics.jsonl, the progress bar and the
tracker."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.jsonl import as_line
from model.model_minimind import MiniMindConfig
from model.weights import atomic_write
from trainer.common import hardware
from trainer.common.context import Context
from trainer.common.trackers import start_tracker

# What a rank knows of a metric: a sum and the number of things summed. The ranks' sums and counts
# are added up, and divided once.
Metric = tuple[float | Tensor, float]


class Curve(NamedTuple):
    """How a report draws a metric over the tokens trained."""

    title: str
    unit: str = ""
    from_zero: bool = False


# The keys that every stage logs, in the report's order; None: no curve. The algorithm's own metrics
# have curves too, after these.
CURVES = {
    "step": None,
    "num_tokens": None,
    "seconds": None,
    "loss": Curve("training loss", "nats"),
    "eval_loss": None,  # eval_bpb has the same curve in another unit
    "eval_bpb": Curve("held-out text", "bits per byte"),
    "recipe_eval_bpb": None,  # the baseline has a line in the same picture
    "learning_rate": Curve("learning rate"),
    "grad_norm": Curve("gradient norm before clipping"),
    "tokens_per_second": Curve("speed", "tokens per second", from_zero=True),
    "memory_gb": Curve("memory", "GB", from_zero=True),
    "mfu": Curve("share of the machine's peak (MFU)", from_zero=True),
    "skipped": None,
    "changed_fraction": None,
}
IN_BAR = ("reward", "accuracy", "margin", "rewards/accuracies", "rewards/margins")


@dataclass
class Accumulator:
    """Sums over the optimizer steps since the last log line."""

    steps: int = 0  # with a finite loss
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # (sum, count) of a metric
    expert_load: Tensor | None = None  # [layers, experts], tokens of each expert


class MetricLog:
    """Metrics since the last log line, and all lines so far."""

    bar: tqdm  # the progress bar; Run.steps makes it

    def __init__(self, ctx: Context, path: Path, config: MiniMindConfig):
        self.ctx, self.path = ctx, path
        # for MFU, the share of the machine's peak that the training reaches
        self.flops_per_token = hardware.flops_per_token(config, ctx.args.max_seq_len)
        self.peak_flops = hardware.peak_flops(ctx.device, ctx.dtype)
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.tracker: Any = None
        self.step_loss = torch.zeros((), device=ctx.device)  # of this step, summed by backward
        self.loss = self.learning_rate = self.grad_norm = 0.0  # of the last optimizer step
        self.clock = 0.0
        self.accumulator = Accumulator()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.accumulator))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accumulator = Accumulator(**state)

    # -- accumulating

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def end_step(self, loss: float) -> None:
        """Add the loss over all ranks and the time of an optimizer step. A loss that is NaN or
        infinite is left out of the mean."""
        self.loss = loss
        self.step_loss.zero_()
        if math.isfinite(loss):
            self.accumulator.steps += 1
            self.accumulator.loss_sum += loss
        now = time.perf_counter()
        self.accumulator.seconds += now - self.clock
        self.clock = now  # PPO makes several steps of one global batch

    def add(self, metrics: dict[str, Metric]) -> dict[str, float]:
        """Add this step's metrics over all ranks; returns their values in this step."""
        sums = self.accumulator.sums
        flat = [float(number) for pair in metrics.values() for number in pair]
        totals = iter(self.ctx.all_reduce_sum(*flat) if flat else [])
        values = {}
        for name in metrics:
            total, count = next(totals), next(totals)
            before, counted = sums.get(name, (0.0, 0.0))
            sums[name] = before + total, counted + count
            values[name] = total / count if count else math.nan
        return values

    def add_tokens(self, count: int) -> None:
        """Count tokens that this rank generated."""
        self.accumulator.tokens += int(self.ctx.all_reduce_sum(count)[0])

    def add_expert_load(self, load: Tensor | None) -> None:
        if load is None:
            return
        load, before = load.cpu(), self.accumulator.expert_load
        self.accumulator.expert_load = load if before is None else before + load

    # -- reading

    @property
    def tokens_per_second(self) -> float:
        return self.accumulator.tokens / max(1e-9, self.accumulator.seconds)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the share of the peak of all ranks; None if it is unknown."""
        if not self.peak_flops:
            return None
        achieved = self.flops_per_token * self.tokens_per_second
        return achieved / (self.peak_flops * self.ctx.world_size)

    def in_bar(self, values: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows of the last step."""
        shown = {
            "loss": f"{self.loss:.3f}",
            **{name: f"{value:.3f}" for name, value in values.items() if name in IN_BAR},
            "lr": f"{self.learning_rate:.1e}",
            "tok/s": f"{self.tokens_per_second:,.0f}",
            "GB": f"{hardware.memory_in_use(self.ctx.device) / 1e9:.1f}",
        }
        return shown | ({"mfu": f"{self.mfu:.0%}"} if self.mfu is not None else {})

    def means(self) -> dict[str, Any]:
        """Metrics since the last log line."""
        found = self.accumulator
        means: dict[str, Any] = {
            "loss": finite(found.loss_sum / found.steps) if found.steps else None,
            "learning_rate": self.learning_rate,
            "grad_norm": finite(self.grad_norm),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "mfu": self.mfu and round(self.mfu, 4),
            "memory_gb": round(hardware.memory_in_use(self.ctx.device) / 1e9, 2),
        }
        for name, (total, count) in found.sums.items():
            means[name] = finite(total / count) if count else None
        if (load := found.expert_load) is not None:
            # per layer, the busiest expert as a multiple of the mean
            busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
            means["expert_load"] = [round(each, 3) for each in busiest.tolist()]
        return means

    # -- writing

    def open(self, name: str, tracker_id: str | None) -> str | None:
        """Begin the log, or go on with `history`; returns the tracker's id of the run."""
        if not self.ctx.is_main:
            return tracker_id
        with atomic_write(self.path) as file:
            file.write("".join(map(as_line, self.history)).encode())
        if self.ctx.args.use_wandb:
            self.tracker, tracker_id = start_tracker(self.ctx.args, name, tracker_id)
        return tracker_id

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the tracker."""
        self.history.append(record)
        if not self.ctx.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(as_line(record))
        if self.tracker:
            loads = {f"expert_load_{n}": v for n, v in enumerate(record.get("expert_load", []))}
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)} | loads
            step = numbers.pop("step")
            self.tracker.log(numbers, step=step)


def pair_metrics(values: Tensor, prefix: str = "") -> dict[str, Metric]:
    """How often and by how much the chosen side has the higher value.

    Args:
        values: [N, 2] rewards or scores of chosen and rejected.
        prefix: "rewards/" gives trl's names of DPO's implicit rewards.
    """
    chosen, rejected = values.unbind(1)
    each = {
        "accuracies" if prefix else "accuracy": (chosen > rejected).float(),
        "margins" if prefix else "margin": chosen - rejected,
        "chosen" if prefix else "chosen_reward": chosen,
        "rejected" if prefix else "rejected_reward": rejected,
    }
    return {f"{prefix}{name}": (value.sum(), len(value)) for name, value in each.items()}


def mean_of(metric: Metric) -> float:
    """A metric that one rank knows whole; NaN if it counts nothing."""
    total, count = metric
    return float(total) / count if count else math.nan


def finite(number: float) -> float | None:
    """Rounded for the log; None, which JSON knows, for NaN and infinity, which it does not."""
    return round(number, 4) if math.isfinite(number) else None
