"""Optimizers, AdamW and Muon, and the learning-rate schedule."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

# Learning-rate multiplier for norm weights, relative to matrices (tuned: benchmarks/RECIPE_LOG.md).
NORM_LR_SCALE = 20


def embedding_lr_scale(width: int) -> float:
    """Learning-rate multiplier for the embedding, relative to matrices: 30, because each token's
    row rarely gets a gradient, and less for models wider than 256.

    The embedding is the output head too. A step that moves all its elements by lr moves a logit,
    which is a sum over the width, by up to lr · width; hence lr ∝ 1/width (μP, arXiv 2203.03466).
    The exponent 1.5 instead of 1 was better for 768×16 and no worse for 512×8 (RECIPE_LOG.md).
    """
    return 30 * min(1, 256 / width) ** 1.5


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A gradient matrix has a few large singular values and many small ones, so that a plain step
    learns little besides the dominant directions. Muon sets all singular values of the step to 1,
    and every direction is learnt at the same speed:

        M ← momentum · M + (1 − momentum) · G               (G the gradient)
        U·S·Vᵀ = momentum · M + (1 − momentum) · G          (Nesterov momentum)
        W ← (1 − lr · decay) · W − lr · √max(rows, columns) · U·Vᵀ

    The root makes each element of W move by about lr, as with AdamW (arXiv 2502.16982). Matrices
    of one shape are stacked: few large operations instead of many small ones.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=0.8))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            alike: dict[tuple, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self.step_stacked(matrices, group)

    def step_stacked(self, matrices: list[Tensor], group: dict) -> None:
        """One step of matrices of the same shape, all with a gradient."""
        momentum = group["momentum"]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers = [self.momentum_buffer(matrix) for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, buffers, momentum)
        updates = orthogonalize(torch.stack(nesterov).to(self.dtype))
        # an orthogonal matrix has elements of size 1/√max(rows, columns): this makes them about 1
        scale = math.sqrt(max(matrices[0].shape))
        # decoupled decay: it shrinks the weights, and never enters the momentum
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            matrices, updates.to(matrices[0].dtype).unbind(), alpha=-group["lr"] * scale
        )

    def momentum_buffer(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


# Coefficients a, b, c. Each polynomial is the best approximation of 1 on the interval that the
# previous one maps to, starting with 0.01 to 1 (Polar Express, arXiv 2505.16932).
POLYNOMIALS = [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately U·Vᵀ of each matrix U·S·Vᵀ; [N, rows, columns] → the same shape.

    An odd polynomial of a matrix, a·X + b·(XXᵀ)X + c·(XXᵀ)²X, is the same polynomial of its
    singular values. Three in a row bring values from 0.01 to 1, of a matrix whose norm is 1, to
    1 ± 0.27, which trains as well as exactly 1; smaller ones grow 78-fold.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # the smaller of XXᵀ and XᵀX
    # a Frobenius norm of 1 leaves no singular value above 1
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by role: "matrices" inside the blocks, "embedding" (and the heads that
    are tied to it) and "norms"."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embedding": [], "norms": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            groups["norms"].append(parameter)
        elif any(role in name for role in ("embed_tokens", "lm_head", "score")):
            groups["embedding"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    return groups


class MultiOptimizer:
    """Several optimizers behind the interface of one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]  # the schedule multiplies this

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        """ValueError for states of parameters of other shapes, which a step would stumble over."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
            for parameter, own in optimizer.state.items():
                for name, each in own.items():
                    if isinstance(each, Tensor) and each.ndim and each.shape != parameter.shape:
                        raise ValueError(
                            f"{name} is {list(each.shape)} for a parameter of "
                            f"{list(parameter.shape)}"
                        )


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> MultiOptimizer:
    """AdamW for everything, or Muon for the matrices and AdamW for the rest.

    `learning_rate` is the matrices': about what an element moves by in one step, with either
    optimizer. Norms have a fixed multiple of it, the embedding one that depends on the width.
    Weight decay is decoupled, and for the matrices only: there is no reason to shrink norms and
    embeddings.

    With `dtype` bfloat16 Muon orthogonalises in it, which is several times faster where forward
    passes are, and precise enough for ± 0.27; moments and weights are float32 always.
    """
    roles = split_parameters(model)
    matrices, embedding, norms = roles["matrices"], roles["embedding"], roles["norms"]
    optimizers: list[torch.optim.Optimizer] = []
    rest: list[dict[str, Any]] = []  # groups of AdamW
    if embedding:
        scale = embedding_lr_scale(width=embedding[0].shape[1])
        rest.append(dict(params=embedding, lr=scale * learning_rate, weight_decay=0.0))
    if norms:
        rest.append(dict(params=norms, lr=NORM_LR_SCALE * learning_rate, weight_decay=0.0))
    if name == "muon" and matrices:
        half = dtype == torch.bfloat16  # float16 would underflow
        products = torch.bfloat16 if half else torch.float32
        optimizers.append(Muon(matrices, learning_rate, weight_decay, products))
    elif matrices:
        rest.append(dict(params=matrices, lr=learning_rate, weight_decay=weight_decay))
    if rest:
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        # tuned (RECIPE_LOG.md): β1 below the usual 0.9, β2 above the usual 0.95
        optimizers.append(torch.optim.AdamW(rest, betas=(0.8, 0.99), fused=fused))
    return MultiOptimizer(*optimizers)


def set_learning_rates(optimizer: MultiOptimizer, factor: float) -> None:
    """Every group's peak learning rate, times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rate_factor(schedule: str, step: int, progress: float, warmup_steps: int) -> float:
    """The schedule's factor of the peak learning rate at `step` (from 0), before which the run has
    trained the share `progress` of its samples.

    A linear warm-up, then: "linear" down to 0 (arXiv 2502.15938), "cosine" down to a tenth,
    "trapezoid" constant and over the second half linearly to 0, or "constant".
    """
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "linear":
        return min(warmup, 1 - progress)
    if schedule == "trapezoid":
        return min(warmup, 2 * (1 - progress))
    if schedule == "cosine":
        return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    return warmup
