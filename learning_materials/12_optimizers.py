"""12. Optimizers: AdamW and Muon, on a toy loss and on the model

Question   The negative gradient is the direction of steepest descent. Why not simply follow it?
Concept    A loss is steep in some directions and flat in others. One step size for all is too large
           for the first or too small for the second. AdamW adapts the step of each weight; Muon
           takes equally large steps in all singular directions of a matrix.
Equation   AdamW: w <- w - lr * m / (sqrt(v) + eps)                              (arXiv 1711.05101)
           Muon:  W <- W - lr * sqrt(max(rows, columns)) * U V^T, where U S V^T is the momentum
                                         (Jordan 2024; the root: arXiv 2502.16982)
Predict    A gradient becomes 1,000 times larger. What does AdamW's first step do?
"""

from collections.abc import Callable

import torch
from lesson import Lesson, crops, small_model, teach, textbook, train
from torch import Tensor, nn

from trainer.common.optimizers import Muon, orthogonalize

STEPS = 100
OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda w, lr: torch.optim.SGD([w], lr, momentum=0.9),
    "AdamW": lambda w, lr: torch.optim.AdamW([w], lr, betas=(0.8, 0.99), weight_decay=0.0),
    "Muon": lambda w, lr: Muon([w], lr, weight_decay=0.0),
}


def walk(name: str, lr: float, start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """[STEPS + 1, ...]: the weights during training, with linear decay of the rate to 0."""
    place = nn.Parameter(start.clone())
    optimizer, places = OPTIMIZERS[name](place, lr), [start.clone()]
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
        optimizer.zero_grad()
        loss(place).backward()
        optimizer.step()
        places.append(place.detach().clone())
    return torch.stack(places)


def main(lesson: Lesson) -> None:
    lesson.predict("The gradient is (3, -0.002), or 1,000 times larger. What is the first step?")
    rows = []
    for scale in (1.0, 1000.0):
        for name in ("SGD", "AdamW"):
            w = nn.Parameter(torch.zeros(2))
            w.grad = scale * torch.tensor([3.0, -0.002])
            OPTIMIZERS[name](w, 0.1).step()
            rows.append((name, scale, *w.tolist()))
    lesson.table("optimizer", "gradient times", "1st weight", "2nd weight", rows=rows)
    assert all(abs(abs(x) - 0.1) < 1e-4 for row in rows if row[0] == "AdamW" for x in row[2:])
    lesson.conclude(
        "AdamW's first step is lr * sign(g): it does not depend on the gradient's size."
    )

    lesson.predict("A valley 50 times steeper across than along: which optimizer is fastest?")
    valley = lambda w: (0.5 * w**2 * torch.tensor([1.0, 50.0])).sum(-1)  # noqa: E731
    figure, (left, middle, right) = lesson.figure(3)
    x, y = torch.meshgrid(torch.linspace(-0.5, 2.2, 80), torch.linspace(-1, 1.1, 80), indexing="xy")
    levels = torch.logspace(-1.5, 1.5, 9).tolist()
    left.contour(x, y, valley(torch.stack((x, y), -1)), levels, colors="grey", linewidths=0.5)
    rows = []
    for name, lr in (("SGD", 0.002), ("SGD", 0.02), ("AdamW", 0.1)):
        places = walk(name, lr, torch.tensor([2.0, 1.0]), valley)
        heights = valley(places)
        rows.append((name, lr, heights[10].item(), heights[30].item(), heights[-1].item()))
        left.plot(*places.T, ".-", linewidth=0.8, markersize=3, label=f"{name}, lr {lr}")
    lesson.table("optimizer", "lr", "loss after 10", "after 30", f"after {STEPS}", rows=rows)
    assert rows[2][3] < min(rows[0][3], rows[1][3]) and valley(torch.tensor([2.0, 1.0])) == 27
    lesson.conclude("SGD is slow along the flat direction; AdamW takes equal steps in both.")

    lesson.predict("A gradient has singular values 1, 0.3, 0.1, 0.03. Which has Muon's step?")
    u, v = (torch.linalg.qr(torch.randn(4, 4)).Q for _ in "uv")
    strengths = torch.tensor([1.0, 0.3, 0.1, 0.03])
    after = torch.linalg.svdvals(orthogonalize((u * strengths @ v)[None])[0])
    lesson.table("before", "after", rows=zip(strengths.tolist(), after.tolist(), strict=True))
    assert ((after - 1).abs() < 0.3).all()
    lesson.conclude("All near 1: weak directions are learnt as fast as strong ones.")

    lesson.predict(
        "Learn a matrix W* from inputs that are large in few directions, which are not aligned "
        "with the axes. With the best of several learning rates, which optimizer comes nearest?"
    )
    size = 24
    mix = torch.linalg.qr(torch.randn(size, size)).Q * torch.logspace(0, -2, size)
    target = torch.randn(size, size) / size**0.5
    distance = lambda w: ((w - target) @ mix).pow(2).sum((-2, -1))  # noqa: E731
    rates = {"SGD": [0.3, 1.0, 3.0], "AdamW": [0.1, 0.3, 1.0], "Muon": [0.01, 0.03, 0.1]}
    ends = {}
    for name in OPTIMIZERS:
        walks = {lr: walk(name, lr, torch.zeros(size, size), distance) for lr in rates[name]}
        lr, places = min(walks.items(), key=lambda item: distance(item[1][-1]).nan_to_num(1e9))
        ends[name] = (lr, distance(places[-1]).item(), (places[-1] - target).norm().item())
        middle.semilogy(distance(places), label=f"{name}, lr {lr}")
    headers = ("optimizer", "best lr", "loss", "distance to W*")
    lesson.table(*headers, rows=[(name, *end) for name, end in ends.items()])
    assert all(end[1] > 2 * ends["Muon"][1] for name, end in ends.items() if name != "Muon")
    lesson.conclude(
        f"Muon's loss is {ends['AdamW'][1] / ends['Muon'][1]:.0f} times smaller than AdamW's: a "
        "step size per weight does not help if flat directions combine many weights."
    )

    lesson.predict("And on the model itself, 60 steps on the textbook's bytes?")
    ids, losses = list("\n".join(textbook()).encode()), {}
    for name, rates in (("adamw", (1e-3, 3e-3)), ("muon", (3e-3, 1e-2))):
        for lr in rates:
            model = small_model(vocab_size=256)
            curve = train(model, crops(ids, 60), lr, name)
            losses[name, lr] = sum(curve[-10:]) / 10
            colour, line = "C1" if name == "adamw" else "C2", "-" if lr == max(rates) else ":"
            right.plot(curve, color=colour, linestyle=line, label=f"{name}, lr {lr}")
    rows = [(*key, loss) for key, loss in losses.items()]
    lesson.table("optimizer", "lr", "last loss", rows=rows)
    best = {name: min(v for (n, _), v in losses.items() if n == name) for name in ("adamw", "muon")}
    assert best["muon"] < best["adamw"]
    lesson.conclude(
        f"With the better of two rates AdamW reaches {best['adamw']:.2f}, Muon {best['muon']:.2f}. "
        "benchmarks/RECIPE_LOG.md has measurements with the real model."
    )
    left.set(title="a valley", xlabel="flat", ylabel="steep")
    middle.set(title="learning a matrix", xlabel="step", ylabel="loss")
    right.set(title="MiniMind on text", xlabel="step", ylabel="nats per byte")
    lesson.save(figure)

    lesson.exercise("Above which learning rate does plain SGD diverge in the valley?", solution_1)
    lesson.exercise("How does weight decay 0.1 change weights without gradient?", solution_2)


def solution_1(lesson: Lesson) -> None:
    for lr in (0.039, 0.041):  # each step multiplies y by 1 - 50 lr: stable below 2 / 50
        y = 1.0
        for _ in range(500):
            y -= lr * 50 * y
        lesson.print(f"lr {lr}: {abs(y):.1e} after 500 steps")
        assert (abs(y) < 1) == (lr < 2 / 50)


def solution_2(lesson: Lesson) -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1)
    for _ in range(1000):
        w.grad = torch.zeros(1)
        optimizer.step()
    lesson.print(f"{w.item():.4f} = (1 - lr * decay)^1000: it does not depend on the gradient")
    assert abs(w.item() - (1 - 0.001) ** 1000) < 1e-3


if __name__ == "__main__":
    teach(main, __file__, __doc__)
