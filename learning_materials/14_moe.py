"""14. Mixture of experts (MoE): routing and load balancing

Question   Can a model have more parameters than it uses for each token?
Concept    Several feed-forward layers, the experts, replace one, and a gate selects the top k of
           them for each token. Without balancing, the gate favours experts that are ahead; these
           learn more and get further ahead. An auxiliary loss or a bias balances the load.
Equation   y = sum over the top k of g_e * expert_e(x) + shared(x),  g = softmax(W x), renormalised
           L_balance = E * sum over e of share_e * mean g_e  (1: balanced)      (arXiv 2401.06066)
           or a bias for selection only: b_e <- b_e + speed * sign(mean - load_e)    (2408.15664)
Predict    What is L_balance when all tokens go to the same 2 of 4 experts?
"""

import torch
from lesson import Language, Lesson, small_model, teach

from model.feed_forward import Routing, load_balancing_loss, moe_layers, update_bias
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters
from trainer.common.optimizers import make_optimizer

EXPERTS = dict(num_hidden_layers=1, use_moe=True, moe_intermediate_size=64, n_routed_experts=8)
# with one expert per token a renormalised weight is always 1, and the gate gets no gradient
EXPERTS |= dict(num_experts_per_tok=1, norm_topk_prob=False, n_shared_experts=0)
BALANCES = {
    "no balancing": dict(aux_loss_alpha=0.0),
    "auxiliary loss, alpha 0.1": dict(aux_loss_alpha=0.1),
    # 50 times the usual speed, because training here takes 60 steps and not 60,000
    "router bias, speed 0.05": dict(scoring_func="sigmoid", bias_update_speed=0.05),
}


def learn(model: MiniMindForCausalLM, steps: int = 60) -> tuple[list[float], list[float]]:
    """The loss, and the load of the busiest expert divided by the mean load, at each step."""
    language, losses, busiest = Language(), [], []
    optimizer = make_optimizer(model.train(), "muon", 5e-3, 0.0)
    (mixture,) = moe_layers(model)
    for _ in range(steps):
        outputs = model(**language.batch(8), return_logits=False)
        (outputs.loss + outputs.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
        busiest.append((mixture.tokens_per_expert.max() / mixture.tokens_per_expert.mean()).item())
        update_bias(mixture, mixture.tokens_per_expert)  # as a trainer does after every step
        mixture.tokens_per_expert.zero_()
    return losses, busiest


def main(lesson: Lesson) -> None:
    lesson.predict("Gate logits 2, 1, 0, -1, top 2. What are the weights of the two experts?")
    logits = torch.tensor([2.0, 1, 0, -1])
    chances = logits.softmax(-1)
    weights = chances[:2] / chances[:2].sum()
    mixture = moe_layers(small_model(use_moe=True))[0].eval()
    with torch.no_grad():
        mixture.gate.weight.zero_()[:, 0] = logits
        token = torch.zeros(1, 1, 64)
        token[..., 0] = 1
        by_hand = sum(w * mixture.experts[e](token) for e, w in enumerate(weights))
        by_hand = by_hand + mixture.shared_experts[0](token)
        difference = (mixture(token)[0] - by_hand).abs().max().item()
    rows = [(e, chances[e].item(), weights[e].item() if e < 2 else 0.0) for e in range(4)]
    lesson.table("expert", "softmax", "weight", rows=rows)
    assert difference < 1e-6 and abs(weights[0] / weights[1] - torch.tensor(1.0).exp()) < 1e-4
    lesson.conclude(
        f"{weights[0]:.3f} and {weights[1]:.3f}: their ratio is e to the difference of the "
        "logits. The layer's output is this weighted sum plus the shared expert (largest "
        f"difference {difference:.0e})."
    )

    lesson.predict("What is L_balance for uniform routing, and if all tokens use the same 2 of 4?")
    even = Routing(torch.full((1, 6, 4), 0.25), torch.tensor([[[0, 1], [2, 3]] * 3]), None)
    favoured = torch.tensor([0.5, 0.5, 0, 0]).expand(1, 6, 4)
    collapsed = Routing(favoured, torch.tensor([[[0, 1]] * 6]), None)
    values = [load_balancing_loss(r, torch.ones(1, 6), True).item() for r in (even, collapsed)]
    lesson.table("routing", "L_balance", rows=zip(("uniform", "collapsed"), values, strict=True))
    assert values == [1.0, 2.0]
    lesson.conclude(
        "1 and 2 = E / k. The gradient flows only through the mean g; the shares are counts."
    )

    lesson.predict("60 steps, 8 experts, one per token: what load has the busiest expert?")
    figure, (left, right) = lesson.figure(2)
    rows, models = [], {}
    for name, fields in BALANCES.items():
        models[name] = small_model(**EXPERTS, **fields)
        losses, busiest = learn(models[name])
        rows.append((name, busiest[0], sum(busiest[-20:]) / 20, sum(losses[-10:]) / 10))
        left.plot(busiest, label=name)
    lesson.table("balanced by", "busiest at first", "at the end", "loss", rows=rows)
    alone, by_loss, by_bias = (row[2] for row in rows)
    assert alone > 1.5 * max(by_loss, by_bias) and alone > 1.5 * rows[0][1]
    lesson.conclude(
        f"Without balancing, the busiest expert gets {alone:.1f} times the mean load: selected "
        "experts learn, and experts that have learnt are selected. With the auxiliary loss it is "
        f"{by_loss:.1f}, with the bias {by_bias:.1f}. In this short training idle experts do not "
        "raise the loss yet."
    )

    lesson.predict("Do experts specialise in certain words?")
    model, inputs = models["auxiliary loss, alpha 0.1"].eval(), []
    (mixture,) = moe_layers(model)
    mixture.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ids = Language().batch(64)["input_ids"]
    with torch.no_grad():
        model(ids)
        chosen = mixture.route(inputs[0]).experts[..., 0]  # [B, T]
    counts = torch.zeros(64, 8).index_put_((ids, chosen), torch.tensor(1.0), accumulate=True)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)  # [words, experts]
    favourite = shares.amax(-1).mean().item()
    assert favourite > 0.4
    lesson.conclude(f"A word goes to its most frequent expert in {favourite:.0%}, by chance 12%.")
    order = shares.argmax(-1).argsort()
    figure.colorbar(right.imshow(shares[order].T, aspect="auto", cmap="Blues"))
    right.set(title="experts of each word", xlabel="word (sorted)", ylabel="expert")
    right.grid(False)
    left.set(title="load of the busiest expert", xlabel="step", ylabel="load / mean load")
    lesson.save(figure)

    lesson.exercise("Show that k = E gives a dense weighted sum of all experts.", solution_1)
    lesson.exercise(
        "MiniMind-MoE has 4 experts, top 2, and a shared one. How many of its 145M parameters are "
        "active for a token?",
        solution_2,
    )


def solution_1(lesson: Lesson) -> None:
    model = small_model(use_moe=True, num_experts_per_tok=4, n_shared_experts=0)
    mixture, x = moe_layers(model)[0].eval(), torch.randn(1, 5, 64)
    with torch.no_grad():
        g = mixture.gate(x).softmax(-1)
        dense = sum(g[..., e : e + 1] * mixture.experts[e](x) for e in range(4))
        difference = (mixture(x)[0] - dense).abs().max().item()
    lesson.print(f"largest difference {difference:.0e}")
    assert difference < 1e-6


def solution_2(lesson: Lesson) -> None:
    with torch.device("meta"):  # shapes without data
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=640, use_moe=True))
    idle = sum(2 * count_parameters(mixture.experts[0]) for mixture in moe_layers(model))
    whole = count_parameters(model)
    lesson.print(f"{whole:,} in total, {whole - idle:,} ({1 - idle / whole:.0%}) active per token")
    assert round(whole / 1e6) == 145 and round((whole - idle) / 1e6) == 92


if __name__ == "__main__":
    teach(main, __file__, __doc__)
