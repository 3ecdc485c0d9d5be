"""13. LoRA and its rank

Question   Full fine-tuning changes every weight. Is a low-rank change enough?
Concept    The change of a matrix is a product of two thin matrices, the adapter, with few weights
           to train and to store. B is initialised to 0, so that the adapter changes nothing at
           first. For inference the product is added to the weight and costs nothing.
Equation   W x -> W x + alpha / r * B A x,   A [r, in], B [out, r]               (arXiv 2106.09685)
           the best rank-r matrix leaves the error sum of s_i^2, i > r     (Eckart and Young 1936)
Predict    LoRA learns a change of rank 4. What error remains with rank 1, 2, 4 and 8?
"""

import copy

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor, nn

from model.model_lora import LoraConfig, LoraLinear, add_lora, lora_layers, merge, unmerge
from model.weights import count_parameters

WIDTH = 32


def change(strengths: list[float]) -> Tensor:
    """A random matrix [WIDTH, WIDTH] with these singular values."""
    u, v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q for _ in "uv")
    return u[:, : len(strengths)] * torch.tensor(strengths) @ v[: len(strengths)]


def learn_change(target: Tensor, rank: int, steps: int = 200) -> float:
    """Final squared error of LoRA of this rank that learns `target` as weight change."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    layer = LoraLinear(linear, LoraConfig(r=rank, alpha=rank))
    optimizer = torch.optim.Adam([layer.lora_A.weight, layer.lora_B.weight], 0.03)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        error = (layer.delta_weight - target).pow(2).sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return error.item()


def main(lesson: Lesson) -> None:
    lesson.predict("A model gets LoRA of rank 8. Do its logits change? How many weights train?")
    language = Language()
    base = small_model()
    train(base, (language.batch(8) for _ in range(80)))
    start = language.batch(8)["input_ids"]
    with torch.no_grad():
        before = base(start).logits
        tuned = copy.deepcopy(base)
        add_lora(tuned, LoraConfig(r=8))
        after = tuned(start).logits
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    rows = [("change of logits", (after - before).abs().max().item())]
    rows += [("parameters", count_parameters(base)), ("trainable", trained)]
    lesson.table("what", "value", rows=rows)
    assert torch.equal(before, after)
    share = trained / count_parameters(base)
    lesson.conclude(f"The logits do not change, because B is 0. {share:.0%} of the weights train.")

    lesson.predict("A change has singular values 4, 3, 2, 1. The error with rank 1, 2, 3, 4, 8?")
    strengths = [4.0, 3.0, 2.0, 1.0]
    target, by_rank = change(strengths), []
    for rank in (1, 2, 3, 4, 8):
        floor = sum(s * s for s in strengths[rank:])
        by_rank.append((rank, 2 * WIDTH * rank, learn_change(target, rank), floor))
    lesson.table("rank", "parameters", "error after training", "best possible", rows=by_rank)
    assert all(abs(error - floor) < 0.2 for _, _, error, floor in by_rank)
    lesson.conclude(
        "Training finds the best matrix of its rank: the error is the sum of the squares of the "
        "other singular values. The change has rank 4, so rank 8 gains nothing."
    )

    lesson.predict(
        "The model is fine-tuned on a language in which half of the words have other successors. "
        "Which rank is enough, and does a higher rank hurt?"
    )
    moved = Language()
    moved.next[:32] = Language(seed=1).next[:32]
    figure, (left, right) = lesson.figure(2)
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rows, losses = [], {}
    for rank in (1, 4, 16, None):
        model, language = copy.deepcopy(base), copy.deepcopy(moved)
        if rank:
            add_lora(model, LoraConfig(r=rank, alpha=2 * rank, target_modules=everywhere))
        curve = train(model, (language.batch(8) for _ in range(40)), 5e-3, "adamw")
        name = f"rank {rank}" if rank else "all weights"
        losses[rank] = sum(curve[-15:]) / 15
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append((name, trained, curve[0], losses[rank]))
        left.plot(curve, label=name)
        if rank == 4:
            lora = model
    lesson.table("what is trained", "parameters", "first loss", "last loss", rows=rows)
    assert losses[1] > losses[16] and losses[16] < rows[0][2] - 0.5
    lesson.conclude(
        f"Rank 1 ends at {losses[1]:.2f}, 16 at {losses[16]:.2f}, all weights at "
        f"{losses[None]:.2f}: so many new facts need more than rank 1."
    )

    lesson.predict("Does merging change the logits? Does unmerging restore the weights?")
    with torch.no_grad():
        apart = lora(start).logits
        old = {name: layer.weight.clone() for name, layer in lora_layers(lora)}
        merge(lora)
        together = lora(start).logits
        unmerge(lora)
    back = all(torch.equal(old[name], layer.weight) for name, layer in lora_layers(lora))
    difference = (apart - together).abs().max().item()
    assert difference < 1e-3 and back
    lesson.conclude(f"Logits differ by {difference:.0e}; unmerged weights are identical to before.")

    ranks, _, learnt, floors = zip(*by_rank, strict=True)
    right.plot(ranks, floors, "k--", label="best possible")
    right.plot(ranks, learnt, "o", label="learnt")
    left.set(title="fine-tuning on another language", xlabel="step", ylabel="nats per token")
    right.set(title="a weight change of rank 4", xlabel="rank of LoRA", ylabel="squared error")
    lesson.save(figure)

    lesson.exercise("What is the rank of the change that full fine-tuning makes?", solution_1)
    lesson.exercise("Why not initialise both A and B to 0, or both at random?", solution_2)


def solution_1(lesson: Lesson) -> None:
    language, model = Language(), small_model()
    train(model, (language.batch(8) for _ in range(20)))
    weight = model.model.layers[0].self_attn.q_proj.weight
    old = weight.detach().clone()
    train(model, (Language(seed=1).batch(8) for _ in range(20)), 5e-3, "adamw")
    values = torch.linalg.svdvals(weight.detach() - old)
    needed = int((values.pow(2).cumsum(0) / values.pow(2).sum() < 0.9).sum()) + 1
    lesson.print(f"90% of the squared change is in {needed} of {len(values)} singular directions")
    assert needed < len(values) / 2


def solution_2(lesson: Lesson) -> None:
    layer = LoraLinear(nn.Linear(WIDTH, WIDTH, bias=False), LoraConfig(r=4))
    nn.init.zeros_(layer.lora_A.weight)
    layer(torch.randn(8, WIDTH)).pow(2).sum().backward()
    grads = [layer.lora_A.weight.grad.norm().item(), layer.lora_B.weight.grad.norm().item()]
    lesson.print(f"both 0: gradients {grads}, no learning; both random: the model's outputs change")
    assert grads == [0.0, 0.0]


if __name__ == "__main__":
    teach(main, __file__, __doc__)
