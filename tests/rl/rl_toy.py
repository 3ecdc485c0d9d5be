"""Toy batches, prompts and settings for the tests of reinforcement learning."""

import json

import torch

from dataset.grading import Truth
from dataset.lm_dataset import encode_chat
from model.losses import IGNORE_INDEX
from trainer import train_agent, train_grpo, train_ppo, train_spo
from trainer.rl.batches import RolloutBatch, micro_batches
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import Completion, generate_completions
from trainer.trainer_utils import Run

STAGES = [train_ppo, train_grpo, train_spo, train_agent]
B, P, T = 6, 5, 7  # completions, tokens of the prompts, of the completions


def batch_of(seed: int = 0, **more) -> tuple[RolloutBatch, torch.Tensor]:
    """Random completions of different length with everything a step needs, and new log-probs;
    as double, [B, P + T − 1], the completions on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (B, P + T), generator=g)
    labels = ids.clone()
    labels[:, :P] = IGNORE_INDEX
    for row, length in enumerate([7, 3, 1, 5, 7, 2]):
        labels[row, P + length :] = IGNORE_INDEX
    shape = (B, P + T - 1)

    def some(scale: float = 1.0, centre: float = 0.0) -> torch.Tensor:
        return centre + scale * torch.randn(shape, generator=g, dtype=torch.float64)

    old = some(0.5, -2.0)
    batch = RolloutBatch(
        ids,
        labels,
        torch.arange(P + T).expand(B, -1),
        B * T,
        int((labels != IGNORE_INDEX).sum()),
        B,
        torch.arange(B),
    )
    batch.old_log_probs, batch.ref_log_probs = old, old + some(0.3)
    batch.advantages = torch.randn(B, 1, generator=g, dtype=torch.float64)
    batch.values, batch.returns = some(0.5), some(0.5)
    for name, value in more.items():
        setattr(batch, name, value)
    return batch, old + some(0.2)


def batches_of(run: Run, completions: list[Completion]) -> list[RolloutBatch]:
    size, pad_id = run.ctx.args.update_batch_size, run.tokenizer.pad_token_id
    return micro_batches(completions, size, pad_id, run.ctx.device)


def sample(run: Run, model, prompts: list[Prompt], count: int = 1) -> list[Completion]:
    step = run.step
    return generate_completions(run.ctx, model, run.tokenizer, prompts, count, step=step)


def some_prompts(tokenizer, count: int = 3) -> list[Prompt]:
    found = []
    for n in range(count):
        messages = [{"role": "user", "content": "why " * (1 + 3 * n) + str(n)}]
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
        found.append(Prompt(n, messages, ids, Truth((str(n),))))
    return found


ASKED = [f"{n} + 1 =" + " please" * (n % 3) for n in range(9)]


def prompt_file(path, prompts=ASKED) -> str:
    def row(n: int, prompt: str) -> dict:
        turns = (("user", prompt), ("assistant", "ignored"))
        chat = [{"role": role, "content": content} for role, content in turns]
        return {"conversations": chat, "answer": str(n + 1)}

    path.write_text("".join(json.dumps(row(*each)) + "\n" for each in enumerate(prompts)))
    return str(path)


# Random weights write tokens of every language, so this reward differs from answer to answer.
RL = dict(from_weight="none", max_gen_len=5, reward=["language"], batch_size=3, update_batch_size=4)
MORE = {
    train_ppo: dict(num_generations=2, num_minibatches=2, critic_learning_rate=1e-3),
    train_grpo: dict(num_generations=3, update_epochs=2),
    train_spo: dict(update_epochs=2),
    train_agent: dict(num_generations=3, update_epochs=2),
}
