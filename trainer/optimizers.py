"""What turns gradients into better weights: AdamW or Muon, and the learning rate over time."""

import math

import torch
from torch import nn


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by role: "matrices" inside the blocks, the "embedding" (also the head, where they
    are tied), and "vectors" (norms)."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embedding": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            groups["vectors"].append(parameter)
        elif "embed_tokens" in name or "lm_head" in name:
            groups["embedding"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    return groups


class Together:
    """Several optimizers that behave as one: what the training loop needs of an optimizer."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups = [group for each in optimizers for group in each.param_groups]
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]  # the schedule multiplies this

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]


def make_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> Together:
    """AdamW for everything, or Muon for the matrices and AdamW for the rest.

    `learning_rate` means the same for both: Muon's update is an orthogonal matrix, scaled to the
    size of AdamW's (0.2·√max(rows, columns), arXiv 2502.16982). Weight decay is decoupled and for
    the matrices only: norms and embeddings have no reason to shrink.
    """
    groups = split_parameters(model)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    adamw_groups = [
        {"params": groups["embedding"], "weight_decay": 0.0},
        {"params": groups["vectors"], "weight_decay": 0.0},
    ]
    if name == "adamw":
        adamw_groups.insert(0, {"params": groups["matrices"], "weight_decay": weight_decay})
    adamw_groups = [group for group in adamw_groups if group["params"]]
    adamw = torch.optim.AdamW(adamw_groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)
    if name == "adamw":
        return Together(adamw)
    muon = torch.optim.Muon(
        groups["matrices"],
        lr=learning_rate,
        weight_decay=weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(muon, adamw)


def learning_rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """What the peak learning rate is multiplied with at update `step` of `steps` (from 0).

    A linear warm-up, then: "cosine" down to a tenth, "trapezoid" constant and over the second
    half linearly to 0, or "constant".
    """
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    done = step / max(1, steps)
    if schedule == "constant":
        return warmup
    if schedule == "trapezoid":
        return min(warmup, 2 * (1 - done))
    return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
