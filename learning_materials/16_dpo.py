"""16. DPO in two parameters

Question   People prefer one of two answers. How does a model learn this without a reward model?
Concept    The policy has an implicit reward, beta * log(pi / pi_ref). DPO makes the reward of the
           chosen answer the larger of the two, by logistic regression. Only the difference counts,
           so both may become less likely. Beta limits the distance to the reference.
Equation   L = -log sigmoid(beta * h),  h = log(pi/pi_ref)(chosen) - log(pi/pi_ref)(rejected)
                                                             (arXiv 2305.18290, eq. 7)
Predict    What is the loss before the first step? Does the chosen answer become more likely?
"""

import copy
import math

import torch
from lesson import Language, Lesson, small_model, teach, train
from torch import Tensor

from trainer.train_dpo import dpo_loss

# Three answers: chosen, rejected, and all others. Their logits are linear in these features. The
# rejected answer has more of the chosen answer's feature than the chosen answer itself.
FEATURES = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]])
ONE = torch.ones(1, 2)  # lengths; only IPO and RPO use them


def log_pi(theta: Tensor) -> Tensor:
    """[..., 2] → log-probabilities of the three answers."""
    return (theta @ FEATURES.T).log_softmax(-1)


def loss_at(theta: Tensor, beta: float = 1.0, **settings) -> Tensor:
    """The project's loss of one pair; the reference is theta = 0."""
    policy, reference = log_pi(theta.view(-1, 2))[:, :2], log_pi(torch.zeros(1, 2))[:, :2]
    return dpo_loss(policy, reference, ONE, beta=beta, **settings)


def descend(steps: int = 60, rate: float = 0.3, **settings) -> Tensor:
    """Theta during gradient descent from 0, [steps + 1, 2]."""
    path = [torch.zeros(2)]
    for _ in range(steps):
        theta = path[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(theta, **settings).sum(), theta)
        path.append(path[-1] - rate * gradient)
    return torch.stack(path)


def main(lesson: Lesson) -> None:
    lesson.predict("What is the loss for h = -4, 0, 4 at beta 1? Which has the largest gradient?")
    h = torch.tensor([-4.0, -1, 0, 1, 4], requires_grad=True)
    losses = dpo_loss(torch.stack([h, 0 * h], 1), torch.zeros(1, 2), ONE, beta=1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), h)
    lesson.table("h", "loss", "gradient", rows=torch.stack([h, losses, gradient], 1).tolist())
    assert torch.allclose(gradient, -(-h).sigmoid()) and abs(losses[2] - math.log(2)) < 1e-6
    lesson.conclude(
        "ln 2 = 0.693 if policy and reference are equal. The gradient is -sigmoid(-h): near -1 for "
        "pairs in the wrong order, near 0 for pairs that are learnt."
    )

    lesson.predict("After 60 steps: does the chosen, the rejected or another answer gain?")
    paths = {"DPO": descend(), "with sft_weight 1": descend(sft_weight=1.0)}
    rows = [(name, *log_pi(path[-1]).exp().tolist()) for name, path in paths.items()]
    lesson.table("", "chosen", "rejected", "others", rows=rows)
    (_, chosen, _, others), (_, kept, *_) = rows
    assert chosen < 0.2 and others > 0.8 and kept > 0.5
    lesson.conclude(
        f"The others gain; the chosen answer falls from 33% to {chosen:.0%}. The two answers share "
        "a feature, so lowering the rejected answer lowers both, and the loss only asks for a "
        f"difference. With the SFT loss of the chosen answer (--sft_weight) it has {kept:.0%}."
    )

    lesson.predict("10% of the labels are wrong. Where does h stop for beta 0.1, 0.5 and 2?")
    rows = []
    for beta in (0.1, 0.5, 2.0):
        p = log_pi(descend(1000, 0.3 / beta**2, beta=beta, label_smoothing=0.1)[-1])
        h, kl = p[0] - p[1], (p.exp() * (p - log_pi(torch.zeros(2)))).sum()
        rows.append((beta, h.item(), math.log(9) / beta, kl.item()))
        assert abs(h - math.log(9) / beta) < 0.02 * h
    lesson.table("beta", "h", "ln 9 / beta", "KL to the reference", rows=rows)
    assert rows[0][3] > rows[1][3] > rows[2][3]
    lesson.conclude("At sigmoid(beta * h) = 0.9, h = ln 9 / beta. A small beta allows a large KL.")

    lesson.predict("A language model with possible (chosen) and impossible next words: what gains?")
    log = teach_preferences()
    lesson.table("step", "loss", "accuracy", "chosen gains", "rejected gains", rows=log[::7])
    accuracy, chosen, rejected = torch.tensor(log[-6:]).mean(0)[2:].tolist()
    assert abs(log[0][1] - math.log(2)) < 1e-6 and accuracy > 0.8 and rejected < -0.8 < -chosen
    lesson.conclude(
        f"In {accuracy:.0%} of new pairs the possible word gains more ({chosen:+.2f} nats on "
        f"average), because the impossible one loses ({rejected:+.2f})."
    )

    figure, (left, right) = lesson.figure(2)
    x, y = torch.linspace(-3, 1.5, 60), torch.linspace(-4.5, 1.5, 60)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    left.contourf(x, y, loss_at(grid).reshape(60, 60), 20, cmap="Blues")
    left.clabel(left.contour(x, y, log_pi(grid)[..., 0].exp(), colors="k", linewidths=0.7))
    for name, path in paths.items():
        left.plot(*path.T, "o-", markersize=2, label=name)
    left.set(title="the loss (blue) and p(chosen) (lines)", xlabel="theta 1", ylabel="theta 2")
    right.plot(torch.tensor(log)[:, 3:], label=["chosen", "rejected"])
    right.set(title="a language model: log(pi / pi_ref)", xlabel="step")
    lesson.save(figure)

    lesson.exercise("At which h does IPO stop, with beta 0.1 and correct labels?", solution_1)
    lesson.exercise("Show that a reward that depends only on the prompt cancels.", solution_2)


def teach_preferences(steps: int = 36, beta: float = 0.5) -> list[tuple]:
    """DPO of a half-trained model: step, loss, accuracy, gains of new pairs' two answers."""
    language, policy = Language(), small_model()
    train(policy, (language.batch(8) for _ in range(15)))
    reference, log = copy.deepcopy(policy).requires_grad_(False), []
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    for step in range(steps):
        ids = language.batch(64, 8)["input_ids"].repeat(2, 1)  # 64 chosen, then 64 rejected
        ids[64:, -1] = (language.next[ids[64:, -2]] == 0).float().multinomial(1)[:, 0]
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        new, old = (
            model(ids, labels=labels, return_log_probs=True).log_probs.sum(1).view(2, 64).T
            for model in (policy, reference)
        )
        loss = dpo_loss(new, old, ONE, beta=beta).mean()
        gained = (new - old)[:, 0] > (new - old)[:, 1]
        log.append((step, loss.item(), gained.float().mean().item(), *(new - old).mean(0).tolist()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return log


def solution_1(lesson: Lesson) -> None:
    chosen, rejected, _ = log_pi(descend(1000, 0.02, beta=0.1, loss_type="ipo")[-1])
    lesson.print(f"{chosen - rejected:.3f} = 1 / (2 * beta); DPO's h would grow without bound")
    assert abs(chosen - rejected - 5) < 0.05


def solution_2(lesson: Lesson) -> None:
    policy, reference = torch.randn(4, 2), torch.randn(4, 2)
    first = dpo_loss(policy, reference, ONE, beta=0.1)
    shifted = dpo_loss(policy + torch.randn(4, 1), reference, ONE, beta=0.1)
    lesson.print(f"largest difference {(first - shifted).abs().max():.0e}: the reward cancels in h")
    assert torch.allclose(first, shifted, atol=1e-6)


if __name__ == "__main__":
    teach(main, __file__, __doc__)
