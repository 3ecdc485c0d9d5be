"""Other layouts of MoE weights: experts as one tensor instead of one module each."""

from collections.abc import Iterable

import torch
from torch import Tensor

PROJECTIONS = ("gate", "up", "down")


def join_experts(
    state: dict[str, Tensor], source: str, count: int, target: str, wide: bool = False
) -> None:
    """Replace experts `source`.0, `source`.1, … of a state dict by joint tensors under `target`.

    Args:
        wide: join them to one wide SwiGLU: the sum of experts that are all used is one expert whose
            hidden dimension is theirs side by side. False: stack them to [E, out, in].
    """
    for part in PROJECTIONS:
        weights = [state.pop(f"{source}.{n}.{part}_proj.weight") for n in range(count)]
        hidden_dim = 1 if part == "down" else 0  # down is [C, I], gate and up are [I, C]
        joined = torch.cat(weights, hidden_dim) if wide else torch.stack(weights)
        state[f"{target}.{part}_proj.weight"] = joined


def put_experts(
    state: dict[str, Tensor], target: str, experts: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Add experts, each as (gate, up, down), under `target`.0, `target`.1, …: the inverse."""
    for n, weights in enumerate(experts):
        for part, weight in zip(PROJECTIONS, weights, strict=True):
            state[f"{target}.{n}.{part}_proj.weight"] = weight
