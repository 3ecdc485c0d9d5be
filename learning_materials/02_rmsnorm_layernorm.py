"""2. RMSNorm against LayerNorm

Question   LayerNorm subtracts the mean and divides by the standard deviation; RMSNorm only divides.
           What is lost if the mean is not subtracted?
Concept    Both bound the size of activations. LayerNorm also removes a shift that all numbers of a
           vector share, which is one direction out of C. RMSNorm keeps it, and is cheaper.
Equation   LayerNorm(x) = w * (x - mean(x)) / sqrt(var(x) + eps) + b             (arXiv 1607.06450)
           RMSNorm(x)   = w * x / sqrt(mean(x^2) + eps)                          (arXiv 1910.07467)
Predict    Where does each of the two map the points of a plane?
"""

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import nn

from model.model_minimind import RMSNorm

WIDTH = 512


def main(lesson: Lesson) -> None:
    rms, layer = RMSNorm(WIDTH, 1e-5), nn.LayerNorm(WIDTH, 1e-5)
    x = torch.randn(8, WIDTH)

    lesson.predict("Does RMSNorm compute its equation? Is LayerNorm an RMSNorm of x - mean(x)?")
    by_hand = rms.weight * x / (x.pow(2).mean(-1, keepdim=True) + rms.eps).sqrt()
    centred = rms(x - x.mean(-1, keepdim=True))
    differences = [(rms(x) - by_hand).abs().max().item(), (layer(x) - centred).abs().max().item()]
    rows = [("RMSNorm - its equation", differences[0])]
    rows += [("LayerNorm - RMSNorm of the centred x", differences[1])]
    lesson.table("difference", "largest", rows=rows)
    assert max(differences) < 1e-5
    lesson.conclude("Yes, and yes: the mean is the only difference between the two.")

    lesson.predict("Whose output changes if the input is multiplied by 10? If 10 is added?")
    rows = []
    for name, changed in (("10 x", 10 * x), ("x + 10", x + 10)):
        moved = [(norm(changed) - norm(x)).abs().max().item() for norm in (rms, layer)]
        rows.append((name, *moved))
    lesson.table("input", "RMSNorm moves by", "LayerNorm moves by", rows=rows)
    (_, *scaled), (_, *shifted) = rows
    assert max(scaled) < 1e-3 and shifted[0] > 0.5 and shifted[1] < 1e-3
    lesson.conclude("Both are invariant to scaling; only LayerNorm is invariant to a shift.")

    lesson.predict("Points of a plane (C = 2): what shape do they form after each norm?")
    points = torch.randn(400, 2)
    after = {"RMSNorm": RMSNorm(2, 1e-5)(points), "LayerNorm": nn.LayerNorm(2, 1e-8)(points)}
    figure, axes = lesson.figure(3)
    for panel, (name, moved) in zip(axes, {"before": points, **after}.items(), strict=False):
        moved = moved.detach()
        panel.scatter(*moved.T, s=12, c=points.atan2(points.roll(1, 1))[:, 0], cmap="twilight")
        panel.set(title=f"a plane: {name}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    radius = after["RMSNorm"].norm(dim=-1)
    distinct = len(after["LayerNorm"].sign().unique(dim=0))
    spread = (after["LayerNorm"].abs() - 1).abs().median().item()
    lesson.print(f"RMSNorm: median radius {radius.median():.4f}; LayerNorm: {distinct} points")
    assert abs(radius.median() - 2**0.5) < 1e-3 and distinct == 2 and spread < 1e-2
    lesson.conclude(
        "RMSNorm maps them to a circle of radius sqrt(2). LayerNorm removes one dimension, the "
        "mean, so that only two points are left. One dimension out of 512 is a small loss."
    )

    lesson.predict("Does a model learn better with LayerNorm instead of RMSNorm?")
    ends, seeds = {"RMSNorm": [], "LayerNorm": []}, (0, 1)
    for name, results in ends.items():
        for seed in seeds:
            language, model = Language(seed=seed), small_model(seed)
            if name == "LayerNorm":
                for path, module in list(model.named_modules()):
                    if isinstance(module, RMSNorm):
                        model.set_submodule(path, nn.LayerNorm(64, 1e-5))
            losses = train(model, (language.batch(8) for _ in range(80)))
            results.append(sum(losses[-20:]) / 20 - language.entropy)
    lesson.table("norm", *(f"seed {s}" for s in seeds), rows=[(n, *r) for n, r in ends.items()])
    gap = abs(sum(ends["RMSNorm"]) - sum(ends["LayerNorm"])) / len(seeds)
    assert gap < 0.15 and max(sum(ends.values(), [])) < 0.8
    lesson.conclude(
        f"The losses differ by {gap:.3f} nats: the mean and the bias are not worth their cost."
    )
    lesson.save(figure)

    lesson.exercise(
        "For inference, RMSNorm's w can be merged into the following matrix. Show it. What would "
        "LayerNorm need in addition?",
        solution_1,
    )
    lesson.exercise("What does eps do? Try vectors of size 1, 0.01 and 0.0001.", solution_2)


def solution_1(lesson: Lesson) -> None:
    norm, linear = RMSNorm(WIDTH, 1e-5), nn.Linear(WIDTH, 64, bias=False)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(8, WIDTH)
    before = linear(norm(x))
    linear.weight.data *= norm.weight.data  # column c times w_c
    nn.init.ones_(norm.weight)
    difference = (linear(norm(x)) - before).abs().max().item()
    lesson.print(f"difference {difference:.1e}; LayerNorm's b would need a bias W b in the linear")
    assert difference < 1e-4


def solution_2(lesson: Lesson) -> None:
    norm = RMSNorm(WIDTH, 1e-5)
    direction = nn.functional.normalize(torch.randn(WIDTH), dim=0) * WIDTH**0.5  # of rms 1
    sizes = {size: norm(size * direction).pow(2).mean().sqrt().item() for size in (1, 1e-2, 1e-4)}
    lesson.print(f"rms in: rms out  {sizes}: inputs below sqrt(eps) = 0.003 stay small")
    assert sizes[1] > 0.99 and sizes[1e-4] < 0.1


if __name__ == "__main__":
    teach(main, __file__, __doc__)
