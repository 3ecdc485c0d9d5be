"""What turns gradients into better weights: AdamW or Muon, and the learning rate over time."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

# How much faster than the matrices norms learn, each of which a batch moves by little (measured, as
# what embedding_multiple says: benchmarks/RECIPE_LOG.md).
VECTORS = 20


def embedding_multiple(width: int) -> float:
    """How much faster than the matrices the embedding learns: 30 times, for a batch has each token
    but seldom, and less beyond a width of 256.

    The embedding is the head too. A step that moves all its elements by lr moves a logit, which is
    a sum over the width, by up to lr · width, so lr ∝ 1/width (μP, arXiv 2203.03466). A little less
    than that was better with 768×16, and no worse with 512×8.
    """
    return 30 * min(1, 256 / width) ** 1.5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A gradient matrix has a few strong directions and many weak ones, and a step along it learns
    little but the strong. Muon makes all singular values of the step 1, so that every direction is
    learnt at the same speed:

        M ← momentum · M + (1 − momentum) · G               (G the gradient)
        U·S·Vᵀ = momentum · M + (1 − momentum) · G          (Nesterov's look ahead)
        W ← (1 − lr · decay) · W − lr · √max(rows, columns) · U·Vᵀ

    The root makes each element of W move by about lr, as with AdamW (arXiv 2502.16982). Matrices
    of one shape are worked on together, in few large operations instead of many small ones.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=0.8))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self.step_together(matrices, group)

    def step_together(self, matrices: list[nn.Parameter], group: dict) -> None:
        """One update of matrices of the same shape."""
        momentum = group["momentum"]
        gradients = [matrix.grad for matrix in matrices]
        averages = [self.average(matrix) for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        updates = orthogonal(torch.stack(ahead))
        size = math.sqrt(max(matrices[0].shape))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * size)

    def average(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        return state["average"]


# Coefficients a, b, c. Each polynomial is the best approximation of 1 on the interval that the one
# before leaves, beginning with 0.01 to 1 (Polar Express, arXiv 2505.16932).
POLYNOMIALS = [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)]


def orthogonal(matrices: Tensor) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ, nearly. [N, rows, columns] → the same.

    An odd polynomial of a matrix, a·X + b·(XXᵀ)X + c·(XXᵀ)²X, is the same polynomial of its
    singular values. Three in a row bring values from 0.01 to 1, of a matrix whose norm is 1, to
    1 ± 0.27, which serves as well as exactly 1; smaller ones grow 78-fold.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # XXᵀ is smaller
    if x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        x = x.bfloat16()  # many times faster there, and exact enough for ± 0.27
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)  # no singular value beyond 1
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by role: "matrices" inside the blocks, the "embedding" (also the heads, where they
    are tied), and "vectors" (norms)."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embedding": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            groups["vectors"].append(parameter)
        elif any(role in name for role in ("embed_tokens", "lm_head", "score")):
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

    `learning_rate` is that of the matrices, about what an element moves by in an update, whatever
    the optimizer; norms have a multiple of it that is fixed, and the embedding one that depends on
    the width. Weight decay is decoupled and for the matrices only: norms and embeddings have no
    reason to shrink.
    """
    roles = split_parameters(model)
    matrices, embedding, vectors = roles["matrices"], roles["embedding"], roles["vectors"]
    optimizers, rest = [], []
    if embedding:
        multiple = embedding_multiple(width=embedding[0].shape[1])
        rest.append(dict(params=embedding, lr=multiple * learning_rate, weight_decay=0.0))
    if vectors:
        rest.append(dict(params=vectors, lr=VECTORS * learning_rate, weight_decay=0.0))
    if name == "muon" and matrices:
        optimizers.append(Muon(matrices, learning_rate, weight_decay))
    elif matrices:
        rest.append(dict(params=matrices, lr=learning_rate, weight_decay=weight_decay))
    if rest:
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        # a shorter memory of gradients than the usual 0.9, a longer one of their size than 0.95
        optimizers.append(torch.optim.AdamW(rest, betas=(0.8, 0.99), fused=fused))
    return Together(*optimizers)


def learning_rate_factor(schedule: str, step: int, done: float, warmup_steps: int) -> float:
    """What the peak learning rate is multiplied with at update `step` (from 0), before which the
    run has trained the share `done` of its rows.

    A linear warm-up, then: "linear" down to 0 (arXiv 2502.15938), "cosine" down to a tenth,
    "trapezoid" constant and over the second half linearly to 0, or "constant".
    """
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "linear":
        return min(warmup, 1 - done)
    if schedule == "trapezoid":
        return min(warmup, 2 * (1 - done))
    if schedule == "cosine":
        return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    return warmup
