"""Where a training runs: device, precision and ranks, decided once and never changed."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from typing_extensions import TypeVar  # with `default`, as typing's since Python 3.13

from dataset.released import resolve_data_path
from model.errors import UserError
from trainer.common import hardware
from trainer.common.arguments import TrainArgs
from trainer.common.command import end_with_other_ranks

ModelT = TypeVar("ModelT", bound=nn.Module)
# `Context` alone means Context[TrainArgs]. Context[Args] knows a stage's own arguments too, and may
# be given wherever a Context is wanted (covariant).
ArgsT = TypeVar("ArgsT", bound=TrainArgs, default=TrainArgs, covariant=True)
AnyArgs = TypeVar("AnyArgs", bound=TrainArgs)


@dataclass(frozen=True)
class Context(Generic[ArgsT]):
    """What evaluation, estimates, reports, recipes and rewards need to know of a training."""

    args: ArgsT
    device: torch.device
    dtype: torch.dtype  # of the forward pass; the weights are float32
    compile: bool  # whether blocks are compiled
    rank: int = 0
    world_size: int = 1

    @staticmethod
    def create(args: AnyArgs) -> "Context[AnyArgs]":
        """Resolve device and precision, and join the other ranks if torchrun started several."""
        resolve_data_path(args)
        device = hardware.resolve_device(args.device)
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1:
            init_distributed(device, world_size)
        return Context(
            args=args,
            device=device,
            dtype=hardware.resolve_dtype(args.dtype, device),
            compile=hardware.should_compile(device) if args.compile is None else args.compile,
            rank=int(os.environ.get("RANK", 0)),
            world_size=world_size,
        )

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes files."""
        return self.rank == 0

    def print(self, *lines: str) -> None:
        if self.is_main:
            tqdm.write("\n".join(lines))

    def autocast(self) -> AbstractContextManager:
        return hardware.autocast(self.device, self.dtype)

    def compiler_stance(self, stance: str) -> AbstractContextManager:
        """What compiled blocks do inside, as in torch.compiler.set_stance."""
        return torch.compiler.set_stance(stance) if self.compile else nullcontext()

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Each number, summed over all ranks."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, own: Any) -> list[Any]:
        """The object of each rank, in their order."""
        if self.world_size == 1:
            return [own]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, own)
        return gathered

    def broadcast(self, own: Any) -> Any:
        """The object of rank 0."""
        shared = [own]
        if self.world_size > 1:
            dist.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]


def init_distributed(device: torch.device, world_size: int) -> None:
    """Join torchrun's process group: NCCL for GPUs, gloo for CPUs.

    Raises:
        UserError: the processes cannot find each other.
    """
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        end_with_other_ranks()
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the {world_size} processes cannot find each other ({reason}); start them "
                "with torchrun --nproc_per_node N"
            ) from error
    if device.type == "cpu":
        torch.set_num_threads(max(1, hardware.physical_cores() // hardware.ranks_here()))


def without_sync(model: nn.Module) -> AbstractContextManager:
    """Inside, backward passes leave each rank with its own gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def unwrap(model: ModelT) -> ModelT:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model
