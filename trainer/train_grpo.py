"""GRPO: several answers to each prompt; those better than their group's mean become likelier.

Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, eq. 3). For a group of G answers
o_1 … o_G to one prompt, with rewards r_1 … r_G:

    A_i = (r_i − mean(r)) / (std(r) + 1e-4)          no critic: the group is the baseline
    ρ_t = π(o_t) / π_old(o_t)                        1 before the first update from these answers
    k_t = π_ref(o_t) / π(o_t) − log(π_ref(o_t) / π(o_t)) − 1               an estimate of the KL
    L   = −1/G · Σ_i 1/|o_i| · Σ_t [ min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i) − β·k_t ]

    ρ: exp(log_probs − old)   π_ref: reference   ε: --epsilon   β: --beta, 0: no reference   G:
    --num_generations

--loss_type: what became of it.

    grpo     as above
    dr_grpo  no 1/|o_i|, which favours long wrong answers, and no 1/std, which favours easy and hard
             prompts: Σ over all tokens / (answers · --max_gen_len)           (arXiv 2503.20783)
    bnpo     Σ over all tokens / tokens of each micro-batch (and mean over these)     (in trl)
    dapo     Σ over all tokens / tokens of the window; the upper clip is --epsilon_high; a group
             whose rewards are all alike, from which nothing is learnt, gives its place to another
             prompt                                                           (arXiv 2503.14476)
    cispo    −min(ρ_t, --epsilon_high) · A_i · log π(o_t), the weight without gradient, so that no
             token is left out; normalised as dapo                            (arXiv 2506.13585)

Departures from the paper: the reference is the starting model throughout, not renewed; by default
one update from each set of answers, for which ρ is 1 and the clip never acts.

    python trainer/train_grpo.py --from_weight full_sft --reward answer --data_path FILE
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.command_line import option
from model.errors import UserError
from model.weights import load_tokenizer
from trainer.common.arguments import LEARNING_RATE_HELP
from trainer.common.command import run_stage
from trainer.common.optimizers import make_optimizer
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    Completion,
    Prompt,
    Prompts,
    Reference,
    RolloutArgs,
    RolloutBatch,
    Sums,
    draw,
    evaluate_policy,
    kl_estimate,
    lengths_and_ends,
    log_probs,
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
from trainer.trainer_utils import Run, starting_model


@dataclass
class Args(RolloutArgs):
    learning_rate: float = option(8e-8, LEARNING_RATE_HELP)
    num_generations: int = option(8, "answers to each prompt, a group")
    beta: float = option(0.02, "weight of the KL to the starting model; 0: none, and no reference")
    epsilon: float = option(0.2, "the ratio is clipped this far from 1")
    epsilon_high: float | None = option(
        None, "upward; default: as epsilon, with dapo 0.28, with cispo the largest weight, 5"
    )
    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo"] = option(
        "grpo", "see above; dapo and cispo weigh each token alike"
    )
    resample: int = option(2, "dapo: times to ask other prompts instead of groups without signal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise UserError("--num_generations must be at least 2: a group is its own baseline")
        if self.epsilon_high is None:
            self.epsilon_high = {"dapo": 0.28, "cispo": 5.0}.get(self.loss_type, self.epsilon)
        for name in ("beta", "epsilon", "epsilon_high", "resample"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative")


def group_advantages(rewards: Tensor, scaled: bool) -> Tensor:
    """(r − mean) / std of each group; [groups, G] → the same. 0 where a group has no two rewards,
    or all are alike, and for a reward that is NaN."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if scaled:
        variance = centred.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    return centred.nan_to_num(0.0)


def policy_loss(log_probs: Tensor, batch: RolloutBatch, args: Args) -> Tensor:
    """The loss of each token; all [B, T − 1], but the advantages [B, 1]. 0 where there is none."""
    old = log_probs.detach() if batch.old is None else batch.old
    ratio, advantages = torch.exp(log_probs - old), batch.advantages
    if args.loss_type == "cispo":
        loss = -ratio.clamp(max=args.epsilon_high).detach() * advantages * log_probs
    else:
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
        loss = -torch.min(ratio * advantages, clipped * advantages)
    if batch.reference is not None:
        loss = loss + args.beta * kl_estimate(log_probs, batch.reference)
    return loss * batch.mask


def total(loss: Tensor, batch: RolloutBatch, args: Args, sums: Sums) -> Tensor:
    """A micro-batch's share of the window's loss, from its losses [B, T − 1]."""
    mask = batch.mask
    if args.loss_type == "grpo":
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / sums.answers
    if args.loss_type == "dr_grpo":
        return loss.sum() / (sums.answers * args.max_gen_len)
    if args.loss_type == "bnpo":
        return loss.sum() / mask.sum().clamp(min=1) * len(mask) / sums.answers
    return loss.sum() / sums.tokens


def answer_groups(
    run: Run,
    model: nn.Module,
    rewards: Rewards,
    prompts: list[Prompt],
    data: Prompts,
    answer: Callable = roll_out,
) -> tuple[list[Completion], Tensor, dict[str, float]]:
    """Answers to each prompt, [groups, G] rewards, and figures for the log."""
    args = run.args
    completions = answer(run, model, prompts, args.num_generations)
    scores, figures = rewards(completions)
    scores = scores.view(-1, args.num_generations)
    figures["flat_groups"] = flat(scores).float().mean().item() if len(scores) else math.nan
    for attempt in range(args.resample if args.loss_type == "dapo" else 0):
        places = flat(scores).nonzero().flatten().tolist()
        others = draw(data, len(places), args.seed, run.step, run.rank, attempt)
        new = answer(run, model, others, args.num_generations, attempt + 1)
        theirs, _ = rewards(new)
        for n, place in enumerate(places):
            group = slice(n * args.num_generations, (n + 1) * args.num_generations)
            at = place * args.num_generations
            completions[at : at + args.num_generations] = new[group]
            scores[place] = theirs[group]
    return completions, scores, figures


def flat(scores: Tensor) -> Tensor:
    """[groups]: whether all rewards of a group are alike, so that it teaches nothing."""
    return (group_advantages(scores, scaled=False).abs() < 1e-8).all(1)


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = with_addition(args, starting_model(args, tokenizer))
    run = Run(args, args.stage("grpo"), model.config, tokenizer)
    prompts, held_out = read_prompts(run)
    rewards = Rewards(run, prompts)
    loader = run.loader(prompts, prompt_batch)
    run.announce(model, prompts, held_out)

    reference = Reference(run, model) if args.beta else None
    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)

    for window in run.steps(loader):
        completions, scores, figures = answer_groups(
            run, model, rewards, prompts_of(window), prompts
        )
        advantages = group_advantages(scores, args.loss_type != "dr_grpo").view(-1, 1)
        batches = micro_batches(run, completions)
        sums = Sums(run, batches)
        for batch in batches:
            batch.advantages = advantages[batch.members.cpu()].to(run.device)
            if args.update_epochs > 1:  # else they are those of the update itself
                batch.old = log_probs(run, model, batch)
            if reference:
                batch.reference = reference.log_probs(model, batch)
        for _ in range(args.update_epochs):
            for batch in batches:
                with run.forward(model, sync=batch is batches[-1]):
                    outputs = model(**policy_inputs(run, batch))
                    loss = policy_loss(outputs.log_probs, batch, args)
                    loss = total(loss, batch, args, sums)
                run.backward(loss, sums.balance_loss(batch, outputs.aux_loss))
                sums.watch(outputs.log_probs, batch, args.epsilon, args.epsilon_high)
            run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            sample, val_figures = evaluate_policy(run, model, held_out, rewards)
            run.log_evaluation(sample, **val_figures)
        figures |= lengths_and_ends(completions)
        run.log(**shares(run, len(completions), figures), **sums.figures())
        run.save_every(model, optimizer, save=saver(args))
    return run.finish()


if __name__ == "__main__":
    run_stage(main, Args, __doc__)
