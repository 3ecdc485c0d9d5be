"""7. SwiGLU

Question   Two thirds of the parameters are in feed-forward layers. Why do these layers now have
           three matrices instead of two?
Concept    A gate: one projection decides, with a smooth weight, how much of another one passes. It
           multiplies two functions of the input, which a linear layer with a nonlinearity
           approximates badly.
Equation   SwiGLU(x) = W_down (SiLU(W_gate x) * (W_up x)),  SiLU(z) = z * sigmoid(z)
                                                                                 (arXiv 2002.05202)
Predict    Which learns the product of two inputs better, with equally many parameters?
"""

import torch
import torch.nn.functional as F
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor, nn

from model.feed_forward import SwiGLU
from model.model_minimind import MiniMindConfig
from model.weights import count_parameters

WIDTH = 48


class TwoMatrices(nn.Module):
    """The layer of the first transformers: W_down ReLU(W_up x), inner width 4 times the width."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(hidden)))


def gated(width: int) -> SwiGLU:
    """SwiGLU of inner width 8/3 * width: as many parameters as TwoMatrices."""
    config = MiniMindConfig(hidden_size=width, num_attention_heads=4, num_key_value_heads=2)
    return SwiGLU(config, intermediate_size=8 * width // 3)


def learn_products(layer: nn.Module, steps: int = 300) -> list[float]:
    """Mean squared error while learning x_i * x_(i+1) from random x."""
    noise = torch.Generator().manual_seed(0)
    optimizer, errors = torch.optim.Adam(layer.parameters(), 1e-2), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        x = torch.randn(256, WIDTH, generator=noise)
        error = (layer(x) - x * x.roll(-1, 1)).pow(2).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return errors


def main(lesson: Lesson) -> None:
    lesson.predict("Does the module compute the equation?")
    layer, x = gated(WIDTH), torch.randn(4, WIDTH)
    z, up = layer.gate_proj(x), layer.up_proj(x)
    by_hand = (z * torch.sigmoid(z) * up) @ layer.down_proj.weight.T
    difference = (by_hand - layer(x)).abs().max().item()
    assert difference < 1e-5
    lesson.conclude(f"Yes; the largest difference is {difference:.0e}.")

    lesson.predict("What are SiLU, ReLU and the slope of SiLU at z = -2, -1, 0, 1, 2?")
    z = torch.tensor([-2.0, -1, 0, 1, 2], requires_grad=True)
    slope = torch.autograd.grad(F.silu(z).sum(), z)[0]
    rows = zip(*(v.tolist() for v in (z, F.relu(z), F.silu(z), slope)), strict=True)
    lesson.table("z", "ReLU", "SiLU", "slope of SiLU", rows=rows)
    assert (slope[[0, 1]] != 0).all() and slope[2] == 0.5
    lesson.conclude(
        "ReLU has slope 0 for negative z: a unit whose input is always negative never learns "
        f"again. SiLU is smooth, and its slope is {slope[1]:.2f} at -1."
    )

    lesson.predict("Three matrices with inner width 8/3, or two with 4: which has more parameters?")
    sizes = {"two matrices, ReLU": TwoMatrices(WIDTH), "SwiGLU": gated(WIDTH)}
    counts = {name: count_parameters(layer) for name, layer in sizes.items()}
    lesson.table("layer", "parameters", rows=counts.items())
    assert len(set(counts.values())) == 1
    lesson.conclude(
        "Both have the same number. Our config rounds 8/3 up to a multiple of 64 for speed."
    )

    lesson.predict("Both learn y_i = x_i * x_(i+1). What is the final error, if guessing 0 has 1?")
    errors = {name: learn_products(layer) for name, layer in sizes.items()}
    ends = {name: sum(e[-20:]) / 20 for name, e in errors.items()}
    lesson.table("layer", "error", rows=ends.items())
    ratio = ends["two matrices, ReLU"] / ends["SwiGLU"]
    assert ratio > 1.5
    lesson.conclude(f"SwiGLU's error is {ratio:.1f} times smaller, because a gate is a product.")

    lesson.predict("And in a language model on a simple language that needs no products?")
    losses = {}
    for name in sizes:
        language, model = Language(), small_model()
        for block in model.model.layers:
            block.mlp = gated(64) if name == "SwiGLU" else TwoMatrices(64)
        curve = train(model, (language.batch(8) for _ in range(80)))
        losses[name] = sum(curve[-20:]) / 20 - language.entropy
    lesson.table("layer", "loss above the best possible", rows=losses.items())
    gap = abs(losses["SwiGLU"] - losses["two matrices, ReLU"])
    assert gap < 0.2
    lesson.conclude(
        f"{gap:.2f} nats apart: no clear difference on a toy. On real text Shazeer measured SwiGLU "
        "0.04 to 0.05 nats ahead of ReLU; he gives no explanation but 'divine benevolence'."
    )

    figure, (left, right) = lesson.figure(2)
    z = torch.linspace(-5, 5, 201)
    for name, function in (("ReLU", F.relu), ("GELU", F.gelu), ("SiLU", F.silu)):
        left.plot(z, function(z), label=name)
    left.set(title="activation functions", xlabel="z", ylim=(-0.6, 3), xlim=(-5, 3.2))
    for name, curve in errors.items():
        right.semilogy(curve, label=name)
    right.set(title="learning a product of inputs", xlabel="step", ylabel="mean squared error")
    lesson.save(figure)

    lesson.exercise("Build x_1 * x_2 exactly from SiLU gates with weights set by hand.", solution_1)
    lesson.exercise(
        "Try other gates: sigmoid (GLU), GELU (GEGLU), none (bilinear). Which of them learn "
        "products well?",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    a, b = torch.randn(5), torch.randn(5)
    product = F.silu(a) * b - F.silu(-a) * b  # SiLU(a) - SiLU(-a) = a (s(a) + s(-a)) = a
    error = (product - a * b).abs().max()
    lesson.print(f"two gates with down weights +1 and -1: largest error {error:.0e}")
    assert torch.allclose(product, a * b, atol=1e-5)


def solution_2(lesson: Lesson) -> None:
    gates = {"GLU": torch.sigmoid, "GEGLU": F.gelu, "bilinear": lambda z: z}
    ends = {}
    for name, gate in gates.items():
        layer = gated(WIDTH)
        layer.forward = lambda x, m=layer, g=gate: m.down_proj(g(m.gate_proj(x)) * m.up_proj(x))
        ends[name] = sum(learn_products(layer)[-20:]) / 20
    lesson.table("gate", "error", rows=ends.items())
    assert ends["bilinear"] < ends["GLU"]  # a pure product needs no nonlinearity


if __name__ == "__main__":
    teach(main, __file__, __doc__)
