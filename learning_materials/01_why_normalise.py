"""1. Why normalise?

Question   How do activations and gradients change through many layers, with and without
           normalisation between the layers?
Concept    Each layer scales its input by a factor, its gain. Fifty factors of 0.8 make 0.00001,
           fifty of 1.25 make 70,000, and the gradient is scaled by the same factors on its way
           back. RMSNorm divides by the size of its input, so that the gain cancels.
Equation   RMSNorm(x) = w * x / sqrt(mean(x^2) + eps)                            (arXiv 1910.07467)
           h <- h + layer(RMSNorm(h)), "pre-norm", as in our blocks              (arXiv 2002.04745)
Predict    Does the norm only help large activations, or small ones too?
"""

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor, nn

from model.model_minimind import MiniMindForCausalLM, RMSNorm

DEPTH, WIDTH = 48, 64
GAINS = (0.8, 1.0, 1.25)  # the factor by which a layer scales its input, on average


def chain(gain: float, norm: nn.Module) -> list[float]:
    """Gradient norm at each input of a chain of random matrices; the last layer first."""
    torch.manual_seed(0)
    inputs = [torch.randn(8, WIDTH, requires_grad=True)]
    for _ in range(DEPTH):
        weight = torch.randn(WIDTH, WIDTH) * gain / WIDTH**0.5
        inputs.append(norm(inputs[-1]) @ weight)
    target = torch.randn(8, WIDTH)
    gradients = torch.autograd.grad((inputs[-1] * target).sum(), inputs[:-1])
    return [gradient.norm().item() for gradient in gradients][::-1]


def without_norms(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    for name, module in list(model.named_modules()):
        if isinstance(module, RMSNorm):
            model.set_submodule(name, nn.Identity())
    return model


def block_gradients(model: MiniMindForCausalLM, batch: dict[str, Tensor]) -> list[float]:
    """Gradient norm of each block's first feed-forward matrix."""
    model(**batch).loss.backward()
    return [layer.mlp.gate_proj.weight.grad.norm().item() for layer in model.model.layers]


def main(lesson: Lesson) -> None:
    figure, (left, right) = lesson.figure(2)

    lesson.predict(
        f"{DEPTH} random matrices in a row, of gain 0.8, 1 and 1.25. By how much does the "
        "gradient change from the last layer to the first? And with RMSNorm before each?"
    )
    ratios = {}
    for gain, colour in zip(GAINS, ("C0", "C1", "C2"), strict=True):
        for name, norm in (("without", nn.Identity()), ("with", RMSNorm(WIDTH, 1e-5))):
            gradients = chain(gain, norm)
            ratios[gain, name] = gradients[-1] / gradients[0]
            style = dict(color=colour, linestyle="-" if name == "with" else ":")
            left.semilogy(gradients, **style, label=f"gain {gain}, {name} norm")
    rows = [(g, ratios[g, "without"], g**DEPTH, ratios[g, "with"]) for g in GAINS]
    headers = ("gain", "first / last, without", "gain^48", "first / last, with RMSNorm")
    lesson.table(*headers, rows=rows)
    spread = max(ratios[g, "with"] for g in GAINS) / min(ratios[g, "with"] for g in GAINS)
    assert spread < 2 and ratios[0.8, "without"] < 1e-3 and ratios[1.25, "without"] > 1e3
    lesson.conclude(
        "Without a norm the gain is raised to the power of the depth. With RMSNorm the results "
        f"for the three gains differ only by a factor of {spread:.2f}."
    )

    lesson.predict(
        "Our model with 24 layers and initial weights of std 0.02, 0.1 and 0.2. Which of these "
        "could be trained without the norms?"
    )
    batch = Language().batch(8)
    rows = []
    for std, colour in zip((0.02, 0.1, 0.2), ("C0", "C1", "C2"), strict=True):
        sizes = dict(num_hidden_layers=24, initializer_range=std)
        normal = block_gradients(small_model(**sizes), batch)
        bare = block_gradients(without_norms(small_model(**sizes)), batch)
        rows.append((std, normal[0], normal[-1], bare[0], bare[-1]))
        right.semilogy(normal, color=colour, label=f"std {std}, with norms")
        right.semilogy(bare, color=colour, linestyle=":", label=f"std {std}, without")
    lesson.table("std", "with: layer 1", "layer 24", "without: layer 1", "layer 24", rows=rows)
    small, _, large = (row[3] for row in rows)
    assert small < 1e-5 and not large < 1e6  # "not less" is true of NaN too
    assert all(1e-3 < g < 1e2 for row in rows for g in row[1:3])
    lesson.conclude(
        f"Without norms, the first block has a gradient of {small:.0e} with std 0.02, and {large} "
        "with 0.2: SwiGLU multiplies two projections of its input, so each layer squares its scale."
    )

    lesson.predict("12 layers of std 0.2, 40 steps. What is the loss with norms, and without?")
    ends = {}
    for name, change in (("with", lambda model: model), ("without", without_norms)):
        language = Language()  # the same sentences for both
        model = change(small_model(num_hidden_layers=12, initializer_range=0.2))
        losses = train(model, (language.batch(8) for _ in range(40)), 1e-3, "adamw")
        ends[name] = (losses[0], losses[1], losses[-1])
    headers = ("norms", "first loss", "after 1 step", "after 39")
    lesson.table(*headers, rows=[(name, *losses) for name, losses in ends.items()])
    assert ends["with"][2] < 4.0 and not ends["without"][1] < 100
    lesson.conclude(
        f"Uniform guessing has ln 64 = 4.2. With norms the loss falls to {ends['with'][2]:.2f}. "
        f"Without, it starts at {ends['without'][0]:.0f}, and such large gradients lead to nan."
    )

    left.set(title=f"a chain of {DEPTH} matrices", xlabel="layers back from the output")
    right.set(title="MiniMind, 24 layers (std 0.2 without: nan)", xlabel="layer", ylim=(1e-8, 1e3))
    for axes in (left, right):
        axes.set_ylabel("norm of the gradient")
    lesson.save(figure)

    lesson.exercise("Which of 3x, -x, x + 3 changes the output of RMSNorm?", solution_1)
    lesson.exercise(
        "How large is the gradient of RMSNorm itself for inputs of size 0.1, 1 and 10? (It "
        "cancels the gain in the backward pass.)",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    norm, x = RMSNorm(WIDTH, eps=0.0), torch.randn(WIDTH)
    same = {n: torch.allclose(norm(y), norm(x)) for n, y in (("3x", 3 * x), ("x + 3", x + 3))}
    lesson.print(f"the same output: {same}; -x only changes the sign")
    assert same == {"3x": True, "x + 3": False} and torch.allclose(norm(-x), -norm(x))


def solution_2(lesson: Lesson) -> None:
    for size in (0.1, 1.0, 10.0):
        x = (size * torch.nn.functional.normalize(torch.ones(4), dim=0) * 2).requires_grad_()
        jacobian = torch.autograd.functional.jacobian(RMSNorm(4, 0.0), x)
        largest = torch.linalg.matrix_norm(jacobian, 2).item()
        lesson.print(f"size {size}: the gradient is multiplied by {largest:.2f}")
        assert abs(largest * size - 1) < 1e-4  # inversely proportional to the size


if __name__ == "__main__":
    teach(main, __file__, __doc__)
