"""GRPO: several completions of each prompt; those better than their group's mean become likelier.

Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, eq. 3). For a group of G
completions o_1 … o_G of one prompt, with rewards r_1 … r_G:

    A_i = (r_i − mean(r)) / (std(r) + 1e-4)          no critic: the group is the baseline
    ρ_t = π(o_t) / π_old(o_t)                        1 before the first step on these samples
    k_t = π_ref(o_t) / π(o_t) − log(π_ref(o_t) / π(o_t)) − 1               an estimate of the KL
    L   = −1/G · Σ_i 1/|o_i| · Σ_t [ min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i) − β·k_t ]

    log π: log_probs   log π_old: batch.old_log_probs   log π_ref: batch.ref_log_probs
    A: advantages      ε: --epsilon                     β: --beta, 0: no reference
    r: rewards         G: --num_generations

--loss_type selects a later variant:

    grpo     as above
    dr_grpo  without 1/|o_i|, which favours long wrong answers, and without 1/std, which favours
             very easy and very hard prompts: Σ over all tokens / (completions · --max_gen_len)
             (arXiv 2503.20783)
    bnpo     Σ over all tokens / tokens of each micro-batch, and the mean over these (as in trl)
    dapo     Σ over all tokens / tokens of all completions; the upper clip is --epsilon_high; a
             group whose rewards are all the same, from which nothing is learnt, is replaced by
             one of another prompt (arXiv 2503.14476)
    cispo    −min(ρ_t, --epsilon_high) · A_i · log π(o_t), the weight without gradient, so that no
             token is left out; normalised as dapo (arXiv 2506.13585)

Departures from the paper:
1. The reference is the policy before training throughout, and is not renewed.
2. By default one optimizer step per set of completions: ρ is 1, and the clip never acts.
3. A completion whose reward could not be computed has advantage 0 and is left out of its group's
   mean.

    python trainer/train_grpo.py --from_weight full_sft --reward answer --data_path FILE
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from trainer.common.command import parse_trainer, run_trainer
from trainer.rl.arguments import GroupArgs as Args

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)

import torch
from torch import Tensor

from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer.common.context import Context
from trainer.common.metrics import Metric
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import add_lora_if_asked, init_model, make_save_fn, prepare_model
from trainer.rl.batches import RolloutBatch, UpdateStats, kl_estimate, micro_batches
from trainer.rl.policy import policy_inputs
from trainer.rl.prompts import (
    Prompt,
    PromptBatch,
    PromptDataset,
    collate_prompts,
    read_prompts,
    sample_prompts,
)
from trainer.rl.reference import ReferenceModel
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    Completion,
    completion_stats,
    evaluate_policy,
    generate_completions,
    print_sample,
)
from trainer.trainer_utils import Run

# -- advantages ------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """(r − mean) / std of each group; [groups, G] → the same. 0 where a group has fewer than two
    rewards, or all are the same, and for a reward that is NaN.

    Args:
        scale: divide by the standard deviation.
    """
    count = (~rewards.isnan()).sum(1, keepdim=True)
    # Centred within the group and not over the batch: the policy is to learn which answer to this
    # prompt is better. Against the batch's mean, all answers to an easy prompt would look good,
    # even the wrong ones.
    advantages = rewards - rewards.nanmean(1, keepdim=True)
    if scale:
        variance = advantages.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    return advantages.nan_to_num(0.0)


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """[groups], bool: whether all rewards of a group are the same. Its advantages are 0 then, and
    nothing is learnt from it."""
    return (group_advantages(rewards, scale=False).abs() < 1e-8).all(1)


# -- loss ------------------------------------------------------------------------------------------


def policy_loss(log_probs: Tensor, batch: RolloutBatch, args: Args) -> Tensor:
    """The loss of each token, [B, T − 1]; 0 outside of completions.

    Args:
        log_probs: [B, T − 1], of the policy that is trained.
        batch: old_log_probs and ref_log_probs (or None), [B, T − 1]; advantages, [B, 1].
    """
    # Every token of a completion has its advantage: the reward does not say which token earned it.
    ratio, advantages = torch.exp(log_probs - batch.old_log_probs), batch.advantages
    # Negative, because the optimizer minimises and good completions are to become likelier. At
    # ratio 1 the gradient is that of −A · log π.
    low, high = args.clip_range
    if args.loss_type == "cispo":
        # The ratio is a constant weight that corrects for sampling from π_old. A clipped token
        # keeps its gradient.
        loss = -ratio.clamp(max=high).detach() * advantages * log_probs
    else:
        # The minimum is the pessimistic choice: nothing is gained beyond the clip, but a token that
        # moved the wrong way is still pulled back.
        clipped = ratio.clamp(1 - low, 1 + high)
        loss = -torch.min(ratio * advantages, clipped * advantages)
    if batch.ref_log_probs is not None:
        loss = loss + args.beta * kl_estimate(log_probs, batch.ref_log_probs)
    return loss * batch.completion_mask


def aggregate_loss(
    token_losses: Tensor, batch: RolloutBatch, args: Args, stats: UpdateStats
) -> Tensor:
    """A micro-batch's part of the step's loss, from the losses of its tokens, [B, T − 1].

    Divided by the counts of all micro-batches on all ranks, so that the parts add up to the same
    loss however completions are split into micro-batches and over ranks. Only bnpo is defined
    otherwise.
    """
    mask = batch.completion_mask
    if args.loss_type == "grpo":
        return (token_losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / stats.num_completions
    if args.loss_type == "dr_grpo":
        return token_losses.sum() / (stats.num_completions * args.max_gen_len)
    if args.loss_type == "bnpo":
        local_mean = token_losses.sum() / mask.sum().clamp(min=1)
        return local_mean * len(mask) / stats.num_completions
    return token_losses.sum() / stats.num_tokens


# -- rollout ---------------------------------------------------------------------------------------


def generate_groups(
    run: Run[Args, PromptBatch],
    model: MiniMindForCausalLM,
    rewards_of: Callable[[Any], tuple[Tensor, dict[str, Metric]]],
    prompts: list[Prompt],
    train_data: PromptDataset,
    generate_fn: Callable = generate_completions,
) -> tuple[list[Completion], Tensor, dict[str, Metric]]:
    """G completions of each prompt, their rewards, [groups, G], and metrics."""
    ctx, args, G = run.ctx, run.ctx.args, run.ctx.args.num_generations
    generate = partial(generate_fn, ctx, model, run.tokenizer, num_generations=G, step=run.step)
    completions = generate(prompts=prompts)
    num_sampled = sum(each.num_sampled for each in completions)
    rewards, metrics = rewards_of(completions)
    rewards = rewards.view(-1, G)  # the completions of a prompt are neighbours
    is_flat = zero_variance_groups(rewards)
    metrics["frac_reward_zero_std"] = (is_flat.sum().item(), len(is_flat))
    # DAPO's dynamic sampling. The log shows the rewards before it, of the prompts as they came.
    for attempt in range(args.resample if args.loss_type == "dapo" else 0):
        groups = zero_variance_groups(rewards).nonzero().flatten().tolist()
        others = sample_prompts(train_data, len(groups), args.seed, run.step, ctx.rank, attempt)
        new_completions = generate(prompts=others, attempt=attempt + 1)
        num_sampled += sum(each.num_sampled for each in new_completions)
        new_rewards, _ = rewards_of(new_completions)
        for n, group in enumerate(groups):
            own = slice(n * G, (n + 1) * G)
            completions[group * G : (group + 1) * G] = new_completions[own]
            rewards[group] = new_rewards[own]
    run.metrics.add_tokens(num_sampled)
    return completions, rewards, metrics


# -- training --------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    # Setup: policy, data, rewards, reference.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = add_lora_if_asked(args, init_model(args, tokenizer))
    rewards_of = Rewards(ctx, tokenizer, model.config.hidden_size)
    train_data, val_data = read_prompts(ctx, tokenizer, rewards_of.can_score)
    stage = args.stage("grpo")
    run = Run(ctx, stage, model, tokenizer, train_data, val_data, collate=collate_prompts)

    # The policy as it is now; without a KL in the loss there is no use for it.
    reference = ReferenceModel(ctx, model) if args.beta else None
    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)

    for global_batch in run.steps():
        # Rollout and rewards: G completions of each prompt, by the policy as it is now.
        prompts = [prompt for batch in global_batch for prompt in batch.prompts]
        completions, rewards, metrics = generate_groups(run, model, rewards_of, prompts, train_data)
        print_sample(ctx, run.step, completions, rewards)

        # Advantages and π_ref: computed once for these completions.
        advantages = group_advantages(rewards, scale=args.loss_type != "dr_grpo").view(-1, 1)
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
                    loss = aggregate_loss(token_losses, batch, args, stats)
                run.backward(loss, stats.aux_loss(batch, outputs.aux_loss))
                stats.accumulate(outputs.log_probs, batch, *args.clip_range)
            run.update(model, optimizer)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            sample, val_metrics = evaluate_policy(ctx, model, tokenizer, val_data, rewards_of)
            run.log_evaluation(sample, **val_metrics)
        metrics |= completion_stats(completions) | stats.metrics()
        run.log(**metrics)
        run.save_every(model, optimizer, save=make_save_fn(args))
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)
