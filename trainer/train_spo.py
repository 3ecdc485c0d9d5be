"""SPO: one completion of each prompt; the baseline is the prompt's own success rate so far.

Single-stream Policy Optimization (arXiv 2509.13232). A group of completions is wasted on prompts
that always or never succeed. Instead a tracker keeps a Beta distribution of success for each
prompt:

    v = a / (a + b)                                      the tracker's value, before the completion
    A = r − v,  then (A − mean(A)) / std(A)              over the batch
    a ← ρ·a + r,  b ← ρ·b + (1 − r)                      after it
    ρ = 2^(−D / --kl_half_life)  within [--rho_min, --rho_max]

D is the KL by which the policy has moved since the prompt was last sampled: what was observed of an
old policy is forgotten. Values start at --first_value, with the weight of 1/(1 − ρ_min)
completions. Prompts are sampled with probability ∝ √(v·(1 − v)) + --exploration: mostly those that
succeed now and then.

--loss_type, for each token, with ρ_t = π(o_t) / π_old(o_t):

    simple   −(ρ_t·A − |A| / (2ε) · (ρ_t − 1)²)       Simple Policy Optimization, arXiv 2401.16025
    clip     −min(ρ_t·A, clip(ρ_t, 1−ε, 1+ε)·A)       PPO's
    plain    −A · log π(o_t)                          REINFORCE

plus --beta · KL to the policy before training (k3), summed over tokens and divided by their number.

    v: tracker.values   a, b: successes, failures   log π: log_probs   ε: --epsilon
    r: scores in [0, 1] A: advantages               log π_old: batch.old_log_probs

Departures from the papers:
1. D is the sum of the mean KL per token of every optimizer step since, each measured on the step's
   own completions; the paper's D needs the old policy.
2. Rewards outside [0, 1] (reward models) go through the logistic function for the tracker.
3. The first values are not estimated from completions sampled beforehand.

    python trainer/train_spo.py --from_weight full_sft --reward answer --data_path FILE
"""

from dataclasses import dataclass
from typing import Any, Literal

from model.command_line import option, setting
from model.errors import UserError
from trainer.common.arguments import STAGE
from trainer.common.command import parse_trainer, run_trainer
from trainer.rl.arguments import RL_RATE_HELP, RolloutArgs


@dataclass
class Args(RolloutArgs):
    learning_rate: float = option(2e-5, RL_RATE_HELP)
    accumulation_steps: int = option(4, "batches of prompts of an optimizer step")
    beta: float = setting(
        0.02, "weight of the KL to the reference; 0: no reference", group=STAGE, at_least=0
    )
    loss_type: Literal["simple", "clip", "plain"] = setting("simple", "see above", group=STAGE)
    epsilon: float = setting(
        0.2,
        "range of the ratio around 1",
        group=STAGE,
        needs="loss_type=simple|clip",
        above=0,
    )
    first_value: float = setting(
        0.5, "prior success rate of a prompt", group=STAGE, at_least=0, at_most=1
    )
    kl_half_life: float = setting(
        0.06, "KL of the policy, in nats, that halves the evidence", group=STAGE, above=0
    )
    rho_min: float = setting(0.875, "lower bound of the decay ρ", group=STAGE, above=0, below=1)
    rho_max: float = setting(0.96, "upper bound of the decay ρ", group=STAGE, above=0, below=1)
    exploration: float = setting(
        0.05, "added to every prompt's sampling weight", group=STAGE, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho_min > self.rho_max:
            raise UserError("--rho_min must not be larger than --rho_max")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)

import numpy as np
import torch
from torch import Tensor

from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer.common.context import Context
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import add_lora_if_asked, init_model, make_save_fn, prepare_model
from trainer.rl.batches import RolloutBatch, UpdateStats, kl_estimate, mean_std, micro_batches
from trainer.rl.policy import log_probs, policy_inputs
from trainer.rl.prompts import PromptBatch, collate_prompts, read_prompts
from trainer.rl.reference import ReferenceModel
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    completion_stats,
    evaluate_policy,
    generate_completions,
    print_sample,
)
from trainer.trainer_utils import Run

# -- baseline --------------------------------------------------------------------------------------


class ValueTracker:
    """For each prompt the evidence of success and of failure, a and b, which fades as the policy
    moves."""

    def __init__(self, num_prompts: int, args: Args):
        self.args = args
        # If each sampling keeps the share ρ_min, evidence sums to at most Σ ρ_min^n = 1/(1 − ρ_min)
        # completions. The prior has exactly this weight.
        evidence = 1 / (1 - args.rho_min)
        self.successes = np.full(num_prompts, evidence * args.first_value)
        self.failures = evidence - self.successes
        self.total_kl = 0.0  # how far the policy has moved since the start
        self.kl_at_sampling = np.zeros(num_prompts)  # total_kl when each prompt was last sampled

    @property
    def values(self) -> np.ndarray:
        """v of each prompt, [prompts]."""
        return self.successes / (self.successes + self.failures)

    def sample(self, count: int, seed: list[int]) -> np.ndarray:
        """Indices of prompts; none twice, unless there are too few."""
        values = self.values
        # √(v·(1 − v)) is the standard deviation of a success: where it is 0, the outcome is certain
        # and the advantage is 0.
        chances = np.sqrt(values * (1 - values)) + self.args.exploration
        chances = chances / chances.sum()
        replace = bool(count > np.count_nonzero(chances))
        return np.random.default_rng(seed).choice(len(chances), count, replace, chances)

    def update(self, indices: np.ndarray, scores: np.ndarray) -> None:
        """Add the scores, from 0 to 1, of completions of these prompts."""
        args = self.args
        moved = self.total_kl - self.kl_at_sampling[indices]
        rhos = np.clip(2 ** (-moved / args.kl_half_life), args.rho_min, args.rho_max)
        for index, score, rho in zip(indices, scores, rhos, strict=True):
            self.successes[index] = rho * self.successes[index] + score
            self.failures[index] = rho * self.failures[index] + 1 - score
        self.kl_at_sampling[indices] = self.total_kl

    ARRAYS = ("successes", "failures", "kl_at_sampling")
    # Names of the first version's checkpoints, which are read for one version more.
    OLD_NAMES = {"moved": "total_kl", "asked_at": "kl_at_sampling"}

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in self.ARRAYS}
        return {"total_kl": self.total_kl, **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = {self.OLD_NAMES.get(name, name): value for name, value in state.items()}
        self.total_kl = state["total_kl"]
        for name in self.ARRAYS:
            setattr(self, name, state[name].numpy().copy())


def local_prompts(ctx: Context, num_prompts: int, tracker: ValueTracker, step: int) -> np.ndarray:
    """Indices of this rank's `num_prompts` prompts. All ranks make the same draw of as many as they
    need together, and each takes its stretch of it, so that no prompt is sampled twice."""
    counts = ctx.all_gather(num_prompts)
    drawn = tracker.sample(sum(counts), [ctx.args.seed, step])
    start = sum(counts[: ctx.rank])
    return drawn[start : start + num_prompts]


def normalize(ctx: Context, advantages: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the completions of all ranks; [N] → the same. NaN
    becomes 0 and does not count."""
    mean, std = mean_std(ctx, advantages[~advantages.isnan()])
    return ((advantages - mean) / (std + 1e-8)).nan_to_num(0.0)


# -- loss ------------------------------------------------------------------------------------------


def policy_loss(log_probs: Tensor, batch: RolloutBatch, args: Args) -> Tensor:
    """The loss of each token, [B, T − 1]; 0 outside of completions.

    Args:
        log_probs: [B, T − 1], of the policy that is trained.
        batch: old_log_probs and ref_log_probs (or None), [B, T − 1]; advantages, [B, 1].
    """
    # Negative in each of them, because the optimizer minimises and completions with A > 0 are to
    # become likelier. At ratio 1 all three have the gradient of −A · log π.
    ratio, advantages = torch.exp(log_probs - batch.old_log_probs), batch.advantages
    if args.loss_type == "simple":
        # beyond 1 ± ε, where the clip has no gradient, the penalty pulls the ratio back
        penalty = advantages.abs() / (2 * args.epsilon) * (ratio - 1).square()
        loss = -(ratio * advantages - penalty)
    elif args.loss_type == "clip":
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        loss = -torch.min(ratio * advantages, clipped * advantages)
    else:
        loss = -advantages * log_probs
    if batch.ref_log_probs is not None:
        loss = loss + args.beta * kl_estimate(log_probs, batch.ref_log_probs)
    return loss * batch.completion_mask


@torch.no_grad()
def update_kl(
    run: Run[Args, PromptBatch],
    model: MiniMindForCausalLM,
    batches: list[RolloutBatch],
    stats: UpdateStats,
) -> float:
    """D of this step: KL(π ‖ π_old) per token of its completions, over all ranks."""
    own = sum(
        (kl_estimate(log_probs(run, model, batch), batch.old_log_probs) * batch.completion_mask)
        .sum()
        .item()
        for batch in batches
    )
    return run.ctx.all_reduce_sum(own)[0] / stats.num_tokens


# -- training --------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    # Setup: policy, data, rewards, value tracker, reference.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = add_lora_if_asked(args, init_model(args, tokenizer))
    rewards_of = Rewards(ctx, tokenizer, model.config.hidden_size)
    train_data, val_data = read_prompts(ctx, tokenizer, rewards_of.can_score)
    tracker = ValueTracker(len(train_data), args)
    stage = args.stage("spo")
    run = Run(ctx, stage, model, tokenizer, train_data, val_data, collate=collate_prompts)

    # The policy as it is now; without a KL in the loss there is no use for it.
    reference = ReferenceModel(ctx, model) if args.beta else None
    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer, extra_state=tracker)

    for global_batch in run.steps():
        # Rollout: one completion of each prompt. Of the loader's prompts only the number counts;
        # the tracker chooses which ones to sample.
        num_prompts = sum(len(batch.prompts) for batch in global_batch)
        indices = local_prompts(ctx, num_prompts, tracker, run.step)
        prompts = [train_data.prompts[index] for index in indices]
        completions = generate_completions(ctx, model, tokenizer, prompts, step=run.step)
        # the loader has counted the tokens of its own prompts, which nobody reads
        unread = sum(batch.num_tokens for batch in global_batch)
        read = sum(len(each.prompt.ids) + each.num_sampled for each in completions)
        run.metrics.add_tokens(read - unread)

        # Rewards and advantages.
        rewards, metrics = rewards_of(completions)  # [N]
        print_sample(ctx, run.step, completions, rewards)
        scores = rewards.clamp(0, 1) if rewards_of.are_bounded else rewards.sigmoid()
        # The value from before this completion: if it included the completion's own reward, the
        # baseline would depend on the action, and the gradient would be biased.
        values = torch.from_numpy(tracker.values[indices])
        # Over the batch of all ranks, and not over a group: the baseline has already removed the
        # prompt's difficulty, so what is left can be compared between prompts.
        advantages = normalize(ctx, scores - values).float()[:, None]
        pad_id = tokenizer.pad_token_id
        batches = micro_batches(completions, args.update_batch_size, pad_id, ctx.device)
        for batch in batches:
            batch.advantages = advantages[batch.indices.cpu()].to(ctx.device)  # [B, 1]
            if reference:
                batch.ref_log_probs = reference.log_probs(run, model, batch)

        # Policy loss: one optimizer step per epoch, on all completions.
        stats = UpdateStats(ctx, batches)
        for _ in range(args.update_epochs):
            for batch in batches:
                with run.forward(model, sync=batch is batches[-1]):
                    outputs = model(**policy_inputs(batch, args.temperature))
                    # in the first epoch the policy is still the one that sampled
                    batch.set_old_log_probs(outputs.log_probs)
                    token_losses = policy_loss(outputs.log_probs, batch, args)
                    # of all ranks: with a local mean, a token's weight would depend on its rank
                    loss = token_losses.sum() / stats.num_tokens
                run.backward(loss, stats.aux_loss(batch, outputs.aux_loss))
                stats.accumulate(outputs.log_probs, batch, args.epsilon, args.epsilon)
            run.update(model, optimizer)

        # Value tracker: every rank adds all ranks' scores, so that all draw the same prompts.
        for rank_indices, rank_scores in ctx.all_gather((indices, scores.numpy())):
            known = ~np.isnan(rank_scores)
            tracker.update(rank_indices[known], rank_scores[known])
        tracker.total_kl += update_kl(run, model, batches, stats)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            sample, val_metrics = evaluate_policy(ctx, model, tokenizer, val_data, rewards_of)
            run.log_evaluation(sample, **val_metrics)
        metrics["tracker_value"] = (values.sum().item(), len(values))
        metrics |= completion_stats(completions) | stats.metrics()
        run.log(**metrics)
        run.save_every(model, optimizer, save=make_save_fn(args), extra_state=tracker)
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)
