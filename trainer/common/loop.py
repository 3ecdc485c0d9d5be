"""What `Run` is made of: global batches and their loader, the stop signal, expert balancing."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import TypeVar

from dataset.packing import Batch, TrainingData
from dataset.sampler import GlobalBatchCollator, GlobalBatchSampler
from model.feed_forward import moe_layers, update_bias
from model.model_minimind import CausalLMOutput, ScoreOutput
from trainer.common.checkpoint import Progress
from trainer.common.context import Context
from trainer.common.metrics import MetricLog

MEASURED_SECONDS = 10  # with --minutes, after which the speed is known; or 10 steps
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Windows' alone
    if hasattr(signal, name)
]
INITIAL_BATCH_TOKENS = 1024  # of the first optimizer step, with --batch_ramp


class MicroBatch(Protocol):
    """What a global batch counts in its micro-batches, of whatever kind of data."""

    @property
    def num_label_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_samples(self) -> int: ...


BatchT = TypeVar("BatchT", bound=MicroBatch, default=Batch)


class GlobalBatch(list[BatchT]):
    """This rank's micro-batches of one optimizer step, and the totals over all ranks."""

    num_label_tokens: int  # tokens that carry loss: what the summed loss is divided by
    num_tokens: int  # without padding
    num_samples: int  # sequences, pairs or prompts

    @classmethod
    def of(cls, ctx: Context, micro_batches: Iterable[BatchT]) -> "GlobalBatch[BatchT]":
        global_batch = cls(micro_batches)
        names = ("num_label_tokens", "num_tokens", "num_samples")
        local = (sum(getattr(batch, name) for batch in global_batch) for name in names)
        labels, tokens, samples = map(int, ctx.all_reduce_sum(*local))
        global_batch.num_label_tokens = max(1, labels)  # no division by 0 where nothing is trained
        global_batch.num_tokens, global_batch.num_samples = tokens, samples
        return global_batch

    def aux_loss(self, batch: BatchT, outputs: CausalLMOutput | ScoreOutput) -> Tensor | float:
        """The micro-batch's share of the load-balancing loss of experts, which is a mean over the
        samples of the global batch."""
        if outputs.aux_loss is None:
            return 0.0
        return outputs.aux_loss * batch.num_samples / self.num_samples


@dataclass
class Plan:
    """What a run is going to do."""

    name: str
    total_steps: int
    total_samples: int  # all epochs together
    first_batch: int  # samples of the first optimizer step, all ranks together
    largest_batch: int

    @classmethod
    def of(
        cls,
        name: str,
        sampler: GlobalBatchSampler,
        progress: Progress,
        max_steps: int,
    ) -> "Plan":
        """The steps that are left from the sampler's position. After resuming with another number
        of ranks their batches may have another size than those before."""
        max_steps = progress.max_steps or max_steps
        limit = max(0, max_steps - progress.step) if max_steps else None
        bounds = list(islice(sampler.bounds(), limit))
        sizes = [after - before for before, after in bounds] or [0]
        return cls(
            name,
            total_steps=progress.step + len(bounds),
            total_samples=bounds[-1][1] if bounds else progress.samples_seen,
            first_batch=sizes[0],
            largest_batch=max(sizes),
        )


def fit_minutes(
    ctx: Context, plan: Plan, sampler: GlobalBatchSampler, progress: Progress, metrics: MetricLog
) -> Plan:
    """With --minutes: once the first steps have shown the speed, the plan of those that fit.

    The very first step is slow and does not count. What a step takes is proportional to its
    samples. Pretraining, whose first steps are smaller, has its --max_steps already
    (compute_optimal.py).
    """
    args = ctx.args
    if not args.minutes or args.max_steps or progress.max_steps:
        return plan
    now = progress.seconds + metrics.accumulator.seconds
    now, first = ctx.all_reduce_sum(now, metrics.history[0]["seconds"])  # ranks must agree
    now, first = now / ctx.world_size, first / ctx.world_size
    if progress.step < 3 or (progress.step < 10 and now - first < MEASURED_SECONDS):
        return plan
    per_sample = (now - first) / (progress.samples_seen - plan.first_batch)
    last = progress.samples_seen + (60 * args.minutes - now) / per_sample
    sampler.start = progress.samples_seen
    steps = sum(1 for _ in takewhile(lambda bounds: bounds[1] <= last, sampler.bounds()))
    progress.max_steps = progress.step + max(1, steps)  # one more at least, which evaluates
    new = Plan.of(plan.name, sampler, progress, 0)
    metrics.bar.total = new.total_steps
    seconds = per_sample * new.total_samples / new.total_steps
    ctx.print(
        f"--minutes {args.minutes:g}: a step takes {seconds:.2g} s here, so {new.total_steps:,} "
        f"steps" + " (the whole data)" * (new.total_samples == plan.total_samples)
    )
    return new


class StopSignal:
    """Ctrl-C and SIGTERM let the step in progress end, save it and leave; a second one is
    immediate."""

    requested = False  # this rank got a signal
    agreed = False  # all ranks know of it: this step is the last

    @contextmanager
    def catch(self) -> Iterator[None]:
        before = {}

        def request(number: int, frame: Any) -> None:
            self.requested = True
            for each in before:
                signal.signal(each, before[each])

        if threading.current_thread() is threading.main_thread():
            before = {each: signal.signal(each, request) for each in STOP_SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def make_sampler(ctx: Context, train_data: TrainingData) -> GlobalBatchSampler:
    """Which samples make each global batch; their order depends on seed and epoch alone."""
    args = ctx.args
    return GlobalBatchSampler(
        len(train_data),
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation_steps,
        epochs=args.epochs,
        seed=args.seed,
        rank=ctx.rank,
        world_size=ctx.world_size,
        batch_ramp=args.batch_ramp,
        initial_batch_size=initial_batch_size(ctx, train_data.num_tokens / len(train_data)),
    )


def make_loader(
    ctx: Context,
    train_data: TrainingData,
    sampler: GlobalBatchSampler,
    pad_id: int,
    collate: Callable,
) -> DataLoader:
    """Global batches as lists of this rank's micro-batches."""
    args = ctx.args
    return DataLoader(
        cast(Dataset, train_data),  # has all that a loader uses of one: its length and its samples
        batch_sampler=sampler,
        collate_fn=GlobalBatchCollator(args.batch_size, pad_id, collate),
        num_workers=args.num_workers,
        worker_init_fn=partial(begin_worker, os.getpid()),
        generator=torch.Generator(),  # not the global one, whose state a resumed run restores
        prefetch_factor=4 if args.num_workers else None,
        pin_memory=ctx.device.type == "cuda",
    )


def initial_batch_size(ctx: Context, tokens_per_sample: float = 0.0) -> int:
    """Samples of the first step with --batch_ramp: 1,024 tokens. On a GPU a full micro-batch of
    each rank, which takes it no longer than a few samples."""
    if ctx.device.type == "cuda":
        return ctx.args.batch_size * ctx.world_size
    return max(1, round(INITIAL_BATCH_TOKENS / (tokens_per_sample or ctx.args.max_seq_len)))


def begin_worker(parent: int, worker: int) -> None:
    """A signal to the whole process group must not end the workers before the run has saved.

    A worker ends when its parent has died, but PyTorch takes the parent that it finds at the start
    for the right one: a run that is killed at that moment would leave a process behind for ever.
    With the start method "forkserver", Python 3.14's on Linux, the parent is that server, and ends
    with the run.
    """
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if os.getppid() != parent and multiprocessing.get_start_method() != "forkserver":
        os._exit(1)


def update_router_biases(ctx: Context, model: nn.Module) -> Tensor | None:
    """Balance the experts after an optimizer step: with --scoring_func sigmoid, move each router
    bias by the load of its expert.

    Returns:
        [layers, experts] tokens that each expert got in this step on all ranks; None without
        experts.
    """
    layers = moe_layers(model)
    if not layers:
        return None
    load = torch.stack([layer.tokens_per_expert for layer in layers])
    if ctx.world_size > 1:
        dist.all_reduce(load)
    for layer, of_layer in zip(layers, load, strict=True):
        update_bias(layer, of_layer)
        layer.tokens_per_expert.zero_()
    return load
