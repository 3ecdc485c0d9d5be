"""The order in which samples are trained: which of them make an optimizer step, on which rank."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dataset.packing import collate


class GlobalBatchSampler(torch.utils.data.Sampler):
    """Which samples this rank reads for each optimizer step, epoch after epoch.

    A global batch is what all ranks together train in one step: batch_size · accumulation_steps ·
    world_size samples, in micro-batches that the ranks take in turn. The order of all samples
    depends on seed and epoch alone, so that any number of ranks goes through the same order. The
    last global batch of an epoch is what is left; a rank left without samples gets an empty one
    (None), since all ranks must take part in each step.

    With `batch_ramp` n (batch-size warmup), a global batch has an n-th of the samples trained so
    far, in whole multiples of `initial_batch_size`, at least one of them and at most a full batch.
    How many samples a gradient should average over grows as the loss falls (arXiv 1812.06162,
    2410.21676): at first a few already agree on the direction.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        epochs: int = 1,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        batch_ramp: int = 0,
        initial_batch_size: int = 1,
    ):
        self.num_samples, self.batch_size = num_samples, batch_size
        self.epochs, self.seed = epochs, seed
        self.global_batch_size = batch_size * accumulation_steps * world_size
        self.rank, self.world_size = rank, world_size
        self.batch_ramp, self.initial_batch_size = batch_ramp, initial_batch_size
        self.start = 0  # samples already trained, all epochs together

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Of each global batch from `start` on: the samples trained before it, and after it."""
        before = self.start
        while before < self.num_samples * self.epochs:
            size = self.global_batch_size
            if self.batch_ramp:
                multiple = max(1, before // self.batch_ramp // self.initial_batch_size)
                size = min(size, multiple * self.initial_batch_size)
            end_of_epoch = (before // self.num_samples + 1) * self.num_samples
            after = min(before + size, end_of_epoch)
            yield before, after
            before = after

    def __len__(self) -> int:
        return sum(1 for _ in self.bounds())

    def __iter__(self) -> Iterator[list[int | None]]:
        epoch = None
        for before, after in self.bounds():
            if before // self.num_samples != epoch:
                epoch = before // self.num_samples
                order = self.order(epoch)
            begin = before - epoch * self.num_samples
            yield self.local_indices(order[begin : begin + after - before].tolist())

    def order(self, epoch: int) -> np.ndarray:
        """[num_samples] the samples in the order in which this epoch trains them."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def local_indices(self, global_batch: list[int]) -> list[int | None]:
        """This rank's samples of a global batch, a micro-batch (or None) for each micro-step."""
        size = min(self.batch_size, -(-len(global_batch) // self.world_size))
        local: list[int | None] = []
        for micro_step in range(0, len(global_batch), size * self.world_size):
            begin = micro_step + self.rank * size
            local += global_batch[begin : begin + size] or [None]
        return local


@dataclass
class GlobalBatchCollator:
    """This rank's samples of a global batch → its micro-batches."""

    batch_size: int
    pad_id: int = 0
    collate: Callable = collate

    def __call__(self, samples: list[Any]) -> list[Any]:
        starts = range(0, len(samples), self.batch_size)
        return [self.collate(samples[at : at + self.batch_size], self.pad_id) for at in starts]
