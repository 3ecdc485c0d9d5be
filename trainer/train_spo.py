"""SPO: one answer to each prompt; the baseline is what this prompt has brought before.

Single-stream Policy Optimization (arXiv 2509.13232). Groups waste answers on prompts that always or
never succeed. Instead a tracker keeps, for each prompt, a Beta distribution of its success:

    v = a / (a + b)                                      the tracker's value, before the answer
    A = (r − v),  then (A − mean(A)) / std(A)            over the batch
    a ← ρ·a + r,  b ← ρ·b + (1 − r)                      after it
    ρ = 2^(−D / --kl_half_life)  within [--rho_min, --rho_max]

D is how far the policy has moved (KL) since the prompt was last asked: what was learnt of an old
policy is forgotten. New values begin with --first_value, worth 1/(1 − ρ_min) answers. Prompts are
drawn with probability ∝ √(v·(1 − v)) + --exploration: most often those that succeed now and then.

--loss_type, with ρ_t = π(o_t) / π_old(o_t), per token:

    simple   −(ρ_t·A − |A| / (2ε) · (ρ_t − 1)²)       Simple Policy Optimization, arXiv 2401.16025
    clip     −min(ρ_t·A, clip(ρ_t, 1−ε, 1+ε)·A)       PPO's
    plain    −A · log π(o_t)                          REINFORCE

and --beta · KL to the starting model (k3) is added.

Departures from the papers: D is the mean KL per token of the updates since, added up, and measured
on each update's own answers, for the paper's needs the old policy; rewards beyond [0, 1] (those of
reward models) go through the logistic function for the tracker; the first values are not estimated
from answers drawn beforehand.

    python trainer/train_spo.py --from_weight full_sft --reward answer --data_path FILE
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.command_line import option
from model.errors import UserError
from model.weights import load_tokenizer
from trainer.common.arguments import LEARNING_RATE_HELP
from trainer.common.command import run_stage
from trainer.common.optimizers import make_optimizer
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    Reference,
    RolloutArgs,
    RolloutBatch,
    Sums,
    evaluate_policy,
    kl_estimate,
    lengths_and_ends,
    log_probs,
    mean_and_deviation,
    micro_batches,
    policy_inputs,
    prompt_batch,
    prompts_of,
    read_prompts,
    roll_out,
    saver,
    shares,
    with_addition,
)
from trainer.trainer_utils import Run, Window, starting_model


@dataclass
class Args(RolloutArgs):
    learning_rate: float = option(1e-7, LEARNING_RATE_HELP)
    accumulation_steps: int = option(4, "batches of prompts added up for one update")
    beta: float = option(0.02, "weight of the KL to the starting model; 0: none, and no reference")
    epsilon: float = option(0.2, "how far from 1 the ratio may go, for simple and clip")
    loss_type: Literal["simple", "clip", "plain"] = option("simple", "see above")
    first_value: float = option(0.5, "what a prompt is thought to bring at first")
    kl_half_life: float = option(0.06, "nats of movement after which half of the past is forgotten")
    rho_min: float = option(0.875, "the most that is forgotten at a time is 1 less this")
    rho_max: float = option(0.96, "the least, likewise")
    exploration: float = option(0.05, "chance that certain prompts have too; 0.5: nearly all alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "exploration"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, as {getattr(self, name)} is")
        for name in ("epsilon", "kl_half_life"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be more than 0, not {getattr(self, name)}")
        if not 0 <= self.first_value <= 1:
            raise UserError(f"--first_value must be from 0 to 1, not {self.first_value}")
        if not 0 < self.rho_min <= self.rho_max < 1:
            raise UserError("--rho_min and --rho_max must be between 0 and 1, the first not larger")


class ValueTracker:
    """For each prompt the evidence of success and failure, a and b, which fades as the policy
    moves."""

    def __init__(self, prompts: int, args: Args):
        self.args = args
        worth = 1 / (1 - args.rho_min)  # so many answers are remembered if the most is forgotten
        self.successes = np.full(prompts, worth * args.first_value)
        self.failures = worth - self.successes
        self.moved = 0.0  # how far the policy has come
        self.asked_at = np.zeros(prompts)  # where it was when each prompt was last asked

    @property
    def values(self) -> np.ndarray:
        return self.successes / (self.successes + self.failures)

    def draw(self, count: int, seed: list[int]) -> np.ndarray:
        """Places of prompts, none twice as long as there are enough."""
        values = self.values
        chances = np.sqrt(values * (1 - values)) + self.args.exploration
        chances = chances / chances.sum()
        again = count > np.count_nonzero(chances)
        return np.random.default_rng(seed).choice(len(chances), count, again, chances)

    def learn(self, places: np.ndarray, rewards: np.ndarray) -> None:
        """Take note of the rewards, from 0 to 1, of some prompts' answers."""
        args = self.args
        kept = 2 ** (-(self.moved - self.asked_at[places]) / args.kl_half_life)
        kept = np.clip(kept, args.rho_min, args.rho_max)
        for place, reward, rho in zip(places, rewards, kept, strict=True):
            self.successes[place] = rho * self.successes[place] + reward
            self.failures[place] = rho * self.failures[place] + 1 - reward
        self.asked_at[places] = self.moved

    def state_dict(self) -> dict[str, Any]:
        arrays = ("successes", "failures", "asked_at")
        return {"moved": self.moved, **{n: torch.from_numpy(getattr(self, n)) for n in arrays}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moved = state["moved"]
        for name in ("successes", "failures", "asked_at"):
            setattr(self, name, state[name].numpy().copy())


def policy_loss(log_probs: Tensor, batch: RolloutBatch, args: Args) -> Tensor:
    """The loss of each token; all [B, T − 1], but the advantages [B, 1]. 0 where there is none."""
    old = log_probs.detach() if batch.old is None else batch.old
    ratio, advantages = torch.exp(log_probs - old), batch.advantages
    if args.loss_type == "simple":
        penalty = advantages.abs() / (2 * args.epsilon) * (ratio - 1).square()
        loss = -(ratio * advantages - penalty)
    elif args.loss_type == "clip":
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        loss = -torch.min(ratio * advantages, clipped * advantages)
    else:
        loss = -advantages * log_probs
    if batch.reference is not None:
        loss = loss + args.beta * kl_estimate(log_probs, batch.reference)
    return loss * batch.mask


def normalised(run: Run, advantages: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the answers of all ranks; what is NaN becomes 0 and does not
    count."""
    mean, deviation = mean_and_deviation(run, advantages[~advantages.isnan()])
    return ((advantages - mean) / (deviation + 1e-8)).nan_to_num(0.0)


def share_of(run: Run, window: Window, tracker: ValueTracker) -> np.ndarray:
    """Places of as many prompts as this rank's part of the window has, drawn by the tracker's
    chances: the same draw on all ranks, each with its stretch of it."""
    counts = gathered(run, len(prompts_of(window)))
    drawn = tracker.draw(sum(counts), [run.args.seed, run.step])
    first = sum(counts[: run.rank])
    return drawn[first : first + counts[run.rank]]


def gathered(run: Run, own: Any) -> list[Any]:
    """What each rank has."""
    if run.ranks == 1:
        return [own]
    every: list[Any] = [None] * run.ranks
    dist.all_gather_object(every, own)
    return every


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = with_addition(args, starting_model(args, tokenizer))
    run = Run(args, args.stage("spo"), model.config, tokenizer)
    prompts, held_out = read_prompts(run)
    rewards = Rewards(run, prompts)
    tracker = ValueTracker(len(prompts), args)
    loader = run.loader(prompts, prompt_batch)
    run.announce(model, prompts, held_out)

    reference = Reference(run, model) if args.beta else None
    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer, beside=tracker)

    for window in run.steps(loader):
        places = share_of(run, window, tracker)
        completions = roll_out(run, model, [prompts.prompts[place] for place in places])
        scores, figures = rewards(completions)
        values = torch.from_numpy(tracker.values[places])
        unit = scores.clamp(0, 1) if rewards.of_rules else scores.sigmoid()
        advantages = normalised(run, unit - values).float()[:, None]
        batches = micro_batches(run, completions)
        sums = Sums(run, batches)
        for batch in batches:
            batch.advantages = advantages[batch.members.cpu()].to(run.device)
            if reference:
                batch.reference = reference.log_probs(model, batch)
        for _ in range(args.update_epochs):
            for batch in batches:
                with run.forward(model, sync=batch is batches[-1]):
                    outputs = model(**policy_inputs(run, batch))
                    loss = policy_loss(outputs.log_probs, batch, args).sum() / sums.tokens
                run.backward(loss, sums.balance_loss(batch, outputs.aux_loss))
                if batch.old is None:  # the first update is made from the policy that sampled
                    batch.old = outputs.log_probs.detach()
                sums.watch(outputs.log_probs, batch, args.epsilon, args.epsilon)
            run.update(model, optimizer)
        for theirs, rewarded in gathered(run, (places, unit.numpy())):
            tracker.learn(theirs[~np.isnan(rewarded)], rewarded[~np.isnan(rewarded)])
        tracker.moved += distance(run, model, batches, sums)
        if held_out and run.due(args.eval_interval):
            sample, val_figures = evaluate_policy(run, model, held_out, rewards)
            run.log_evaluation(sample, **val_figures)
        figures |= {"value": values.mean().item(), **lengths_and_ends(completions)}
        run.log(**shares(run, len(completions), figures), **sums.figures())
        run.save_every(model, optimizer, save=saver(args), beside=tracker)
    return run.finish()


@torch.no_grad()
def distance(run: Run, model, batches: list[RolloutBatch], sums: Sums) -> float:
    """How far the update has moved the policy, as a KL per token of its own answers."""
    own = sum(
        (kl_estimate(log_probs(run, model, batch), batch.old) * batch.mask).sum().item()
        for batch in batches
    )
    return run.sum_over_ranks(own)[0] / sums.tokens


if __name__ == "__main__":
    run_stage(main, Args, __doc__)
