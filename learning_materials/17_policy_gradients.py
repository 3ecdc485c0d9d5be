"""17. Policy gradients: PPO, GRPO and SPO

Question   A model writes a completion and receives one number, the reward. How does it learn?
Concept    Completions with more reward than expected become more likely. The expected reward, the
           baseline, reduces the variance of the gradient: GRPO uses the mean of a group, SPO the
           past rewards of the prompt, PPO a critic. The clip keeps the policy near pi_old.
Equation   gradient of E[r] = E[(r - b) * gradient of log pi]                          (REINFORCE)
           L = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A), rho = pi / pi_old       (1707.06347)
Predict    All eight completions of a prompt are right. What does GRPO learn from them?
"""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from lesson import Language, Lesson, small_model, teach, train

from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindForScoring
from trainer import train_grpo, train_ppo, train_spo
from trainer.common.context import Context
from trainer.rl.batches import UpdateStats, micro_batches
from trainer.rl.policy import policy_inputs
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import Completion

CHANCES = torch.tensor([0.95, 0.85, 0.75, 0.65])  # of a reward of 1, for the bandit's four arms
TRUE = (CHANCES - CHANCES.mean()) / 4  # the gradient of E[r] for the logits, where all are 0
G = 8  # completions in a group
TRAINERS = {"GRPO": train_grpo, "SPO": train_spo, "PPO": train_ppo}


def main(lesson: Lesson) -> None:
    lesson.predict("Which baselines bias the gradient, and which reduce its variance?")
    arms = torch.randint(4, (4000, G))
    rewards = (torch.rand(4000, G) < CHANCES[arms]).float()
    tracker = train_spo.ValueTracker(1, train_spo.Args())
    tracker.update(np.zeros(40, int), rewards[:5].flatten().numpy())  # one after the other
    advantages = {
        "none": rewards,
        "mean of the group (GRPO)": train_grpo.group_advantages(rewards, scale=False),
        "earlier answers (SPO)": rewards - float(tracker.values[0]),
        "a perfect critic (PPO)": rewards - CHANCES.mean(),
    }
    rows = []
    for name, A in advantages.items():
        estimates = (A[..., None] * (torch.eye(4)[arms] - 1 / 4)).mean(1)  # A * grad log pi, [N, 4]
        length = (estimates.mean(0) @ TRUE / TRUE.square().sum()).item()
        rows.append((name, length, estimates.var(0).sum().item()))
    lesson.table("baseline", "gradient / true one", "variance", rows=rows)
    assert abs(rows[1][1] - 7 / 8) < 0.1 and max(row[2] for row in rows[1:]) < rows[0][2] / 3
    lesson.conclude("None biases its direction. A group mean includes the sample: 7/8 of the size.")

    lesson.predict("8 completions, each right with probability p: what share of groups is useless?")
    p = torch.tensor([0.02, 0.1, 0.5, 0.9, 0.98])
    groups = [(torch.rand(4000, G) < x).float() for x in p]
    flat = [train_grpo.zero_variance_groups(rewards).float().mean() for rewards in groups]
    rows = torch.stack([p, torch.stack(flat), p**G + (1 - p) ** G], 1)
    lesson.table("p", "zero-variance groups", "p^8 + (1 - p)^8", rows=rows.tolist())
    assert torch.allclose(rows[:, 1], rows[:, 2], atol=0.03)
    lesson.conclude("Equal rewards give zero advantages. Prompts solved half the time are best.")

    lesson.predict("A = 1, eps 0.2: what is -dL / dlog pi at rho 0.7, 1, 1.1 and 1.3?")
    rho = torch.linspace(0.4, 1.6, 121)
    rows = torch.cat([rho[:, None], pushed(rho)], 1)[[30, 60, 70, 90]]
    lesson.table("rho", "clip (GRPO)", "simple (SPO)", rows=rows.tolist())
    assert rows[3, 1] == 0 > rows[3, 2] and rows[:3].min() > 0
    lesson.conclude("Above 1.2 the clipped loss has no gradient; the simple loss pulls rho back.")

    lesson.predict("A half-trained model, the reward is the share of possible pairs: who learns?")
    curves = {name: learn(name) for name in TRAINERS}
    rows = [(name, np.mean(c[:3]).item(), np.mean(c[-3:]).item()) for name, c in curves.items()]
    lesson.table("", "reward at first", "at the end", rows=rows)
    assert all(last > first + 0.2 for _, first, last in rows)
    lesson.conclude("All three learn from rewards alone, without a single correct example.")

    figure, (left, right) = lesson.figure(2)
    left.plot(rho, pushed(rho), label=["clip (GRPO)", "simple (SPO)"])
    left.set(title="weight of the gradient of log pi at A = 1", xlabel="pi / pi_old")
    right.plot(torch.tensor(list(curves.values())).T, label=list(curves))
    right.set(title="a tiny language", xlabel="step", ylabel="reward: possible pairs")
    lesson.save(figure)

    lesson.exercise("At which rho does the gradient vanish for A = -1?", solution_1)
    lesson.exercise("With --gae_lambda 1, what is PPO's advantage of each token?", solution_2)


def pushed(ratios: torch.Tensor, advantage: float = 1.0) -> torch.Tensor:
    """-dL / dlog pi of GRPO's and SPO's loss for each ratio pi / pi_old, [N, 2]."""
    log_pi = ratios.log()[:, None].repeat(1, 2).requires_grad_()
    batch = SimpleNamespace(
        old_log_probs=0,
        ref_log_probs=None,
        advantages=torch.tensor(advantage),
        completion_mask=1,
    )
    for column, trainer in enumerate((train_grpo, train_spo)):
        trainer.policy_loss(log_pi[:, column], batch, trainer.Args()).sum().backward()
    return 0 - log_pi.grad


def learn(name: str, steps: int = 20) -> list[float]:
    """Mean reward of 64 completions of 8 words at each step, trained with the trainer's loss."""
    language, model = Language(), small_model()
    train(model, (language.batch(8) for _ in range(15)))
    args = TRAINERS[name].Args(update_batch_size=64)
    ctx = Context(args, torch.device("cpu"), torch.float32, compile=False)
    run = SimpleNamespace(ctx=ctx, forward=lambda *_, **__: nullcontext())
    tracker = train_spo.ValueTracker(64, train_spo.Args())
    both = train_ppo.ActorCritic(
        model, MiniMindForScoring.from_language_model(copy.deepcopy(model))
    )
    optimizer, curve = torch.optim.AdamW(both.parameters(), 2e-3), []
    for step in range(steps):
        asked = torch.randint(64, (64 // G,)).repeat_interleave(G).numpy()
        settings = SamplingParams(max_new_tokens=8, stop_ids=(), seed=step)
        texts = torch.tensor(generate(model, asked[:, None].tolist(), settings))
        before = torch.cat([torch.from_numpy(asked)[:, None], texts[:, :-1]], 1)
        scores = (language.next[before, texts] > 0).float().mean(1)
        pairs = zip(asked.tolist(), texts.tolist(), strict=True)
        answers = [Completion(Prompt(0, [], [a], None), text, "", True) for a, text in pairs]
        (batch,) = micro_batches(answers, len(answers), 0, ctx.device)
        if name == "PPO":
            train_ppo.compute_advantages(run, both, None, [batch], scores)
        elif name == "GRPO":
            batch.advantages = train_grpo.group_advantages(scores.view(-1, G), True).view(-1, 1)
        else:
            unexpected = scores - torch.from_numpy(tracker.values[asked])
            batch.advantages = train_spo.normalize(ctx, unexpected).float()[:, None]
            tracker.update(asked, scores.numpy())
        for _ in range(args.update_epochs):
            log_pi, values, _ = both(**policy_inputs(batch, args.temperature))
            batch.set_old_log_probs(log_pi)
            if name == "PPO":
                actor, critic = train_ppo.ppo_loss(log_pi, values, batch, args)
                loss = actor + args.vf_coef * critic
            else:
                loss = TRAINERS[name].policy_loss(log_pi, batch, args).sum()
            (loss / UpdateStats(ctx, [batch]).num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        curve.append(scores.mean().item())
    return curve


def solution_1(lesson: Lesson) -> None:
    push = pushed(torch.tensor([0.7, 1.3]), -1.0)
    lesson.print(f"clip and simple at rho 0.7 and 1.3: {push.tolist()}; it vanishes below 0.8")
    assert push[0, 0] == 0 < push[0, 1] and push[1].max() < 0


def solution_2(lesson: Lesson) -> None:
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.rand(1, 3)
    advantages = train_ppo.compute_gae(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    lesson.print(f"{advantages.tolist()}: final reward minus the critic's values {values.tolist()}")
    assert torch.allclose(advantages, 1 - values)


if __name__ == "__main__":
    teach(main, __file__, __doc__)
