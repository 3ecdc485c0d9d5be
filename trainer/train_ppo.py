"""PPO: a critic foretells the reward, and what beats its forecast becomes likelier.

Proximal Policy Optimization (arXiv 1707.06347) with generalised advantage estimation (GAE, arXiv
1506.02438), as it is used for language models (arXiv 2203.02155). A token is an action, the tokens
before it the state s_t; the reward comes with the last token of an answer, and each token costs
what it departs from the reference:

    r_t = −kl_coef · (log π_old(o_t) − log π_ref(o_t)) + [t is the last] · reward
    δ_t = r_t + γ · V(s_t+1) − V(s_t)                    V after the last token is 0
    A_t = δ_t + γλ · δ_t+1 + (γλ)² · δ_t+2 + …           GAE; A then whitened over the window
    R_t = A_t + V_old(s_t)                               what the critic is to learn
    ρ_t = π(o_t) / π_old(o_t)

    L = −mean_t min(ρ_t·A_t, clip(ρ_t, 1−ε, 1+ε)·A_t)                                  (eq. 7)
        + vf_coef · ½ · mean_t max((V − R_t)², (clip(V, V_old−ε_v, V_old+ε_v) − R_t)²)

    ε: --clip_epsilon   ε_v: --value_clip   γ: --gamma   λ: --gae_lambda

Each set of answers is gone through --update_epochs times in --num_minibatches updates, and left as
soon as the policy has moved by more than --target_kl from the one that wrote them.

Departures from the paper: actor and critic share no weights; the critic starts as the same blocks
with a head of zeros; no entropy bonus; gradients of both are clipped together.

    python trainer/train_ppo.py --from_weight full_sft --reward answer --data_path FILE
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.command_line import option
from model.errors import UserError
from model.model_minimind import MiniMindForCausalLM, MiniMindForScoring
from model.weights import load_tokenizer
from trainer.common.arguments import LEARNING_RATE_HELP
from trainer.common.command import run_stage
from trainer.common.optimizers import Together, make_optimizer
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import (
    Reference,
    RolloutArgs,
    RolloutBatch,
    Sums,
    evaluate_policy,
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
from trainer.trainer_utils import Run, starting_model, unwrapped


@dataclass
class Args(RolloutArgs):
    reference_flag = "kl_coef"

    learning_rate: float = option(8e-8, LEARNING_RATE_HELP)
    critic_learning_rate: float = option(8e-8, "the same, of the critic")
    num_generations: int = option(1, "answers to each prompt")
    update_epochs: int = option(2, "times to learn from the same answers")
    num_minibatches: int = option(1, "updates in each of these times")
    clip_epsilon: float = option(0.1, "the ratio is clipped this far from 1")
    value_clip: float = option(0.2, "the critic's values, this far from those before")
    vf_coef: float = option(0.5, "weight of the critic's loss")
    kl_coef: float = option(0.02, "what a nat of departure from the starting model costs; 0: none")
    gamma: float = option(1.0, "discount of what comes later")
    gae_lambda: float = option(0.95, "1: whole returns, unbiased; 0: the critic's word alone")
    target_kl: float = option(0.1, "leave these answers when the policy has moved so far; 0: never")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "num_minibatches", "critic_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be more than 0, not {getattr(self, name)}")
        for name in ("clip_epsilon", "value_clip", "vf_coef", "kl_coef", "target_kl"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, as {getattr(self, name)} is")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must be from 0 to 1, not {getattr(self, name)}")


class ActorCritic(nn.Module):
    """Both models as one, so that a forward pass, an update and a checkpoint are of both."""

    def __init__(self, actor: MiniMindForCausalLM, critic: MiniMindForScoring):
        super().__init__()
        self.actor, self.critic = actor, critic
        self.config = actor.config

    def forward(self, **inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and values [B, T − 1], and the balance loss of experts."""
        actor = self.actor(**inputs)
        critic = self.critic(inputs["input_ids"], inputs["position_ids"])
        aux = None if actor.aux_loss is None else actor.aux_loss + critic.aux_loss
        return actor.log_probs, critic.scores[:, :-1], aux


def token_rewards(batch: RolloutBatch, scores: Tensor, kl_coef: float) -> Tensor:
    """r_t, [B, T − 1], from the rewards of whole answers [B]."""
    mask = batch.mask
    rewards = torch.zeros_like(batch.old)
    if batch.reference is not None:
        rewards = -kl_coef * (batch.old - batch.reference) * mask
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * steps).argmax(1)  # the answer's last token
    has_any = mask.any(1)
    rewards[has_any, last[has_any]] += scores[has_any]
    return rewards


def advantage_estimates(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """GAE, all [B, T − 1]; from the end backwards: A_t = δ_t + γλ·A_t+1."""
    advantages = torch.zeros_like(rewards)
    after = value_after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = (delta + gamma * gae_lambda * after) * mask[:, t]
        value_after = values[:, t] * mask[:, t]
        advantages[:, t] = after
    return advantages


def ppo_loss(
    log_probs: Tensor, values: Tensor, batch: RolloutBatch, args: Args
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of the actor's and the critic's loss; inputs [B, T − 1]."""
    mask, advantages = batch.mask, batch.advantages
    ratio = torch.exp(log_probs - batch.old)
    clipped = ratio.clamp(1 - args.clip_epsilon, 1 + args.clip_epsilon)
    actor = -torch.min(ratio * advantages, clipped * advantages)
    near = batch.values + (values - batch.values).clamp(-args.value_clip, args.value_clip)
    critic = torch.max((values - batch.returns).square(), (near - batch.returns).square()) / 2
    return (actor * mask).sum(), (critic * mask).sum()


def judge(
    run: Run,
    model: ActorCritic,
    reference: Reference | None,
    batches: list[RolloutBatch],
    scores: Tensor,
) -> dict[str, float]:
    """Give each batch what the update needs: old log-probs, values, returns and advantages, these
    whitened over the tokens of all ranks. Returns figures for the log."""
    args = run.args
    for batch in batches:
        batch.old = log_probs(run, model.actor, batch)
        if reference:
            batch.reference = reference.log_probs(model.actor, batch)
        with torch.no_grad(), run.forward(model, sync=False):
            values = model.critic(batch.input_ids, batch.position_ids).scores
        batch.values = values[:, :-1] * batch.mask
        own = scores[batch.members.cpu()].to(run.device)
        rewards = token_rewards(batch, own, args.kl_coef)
        batch.advantages = advantage_estimates(
            rewards, batch.values, batch.mask, args.gamma, args.gae_lambda
        )
        batch.returns = batch.advantages + batch.values
    whiten(run, batches)
    returns = torch.cat([batch.returns[batch.mask] for batch in batches])
    errors = returns - torch.cat([batch.values[batch.mask] for batch in batches])
    explained = 1 - (errors.var() / returns.var()).item() if len(returns) > 1 else math.nan
    return {"explained_variance": explained, "value": (returns - errors).mean().item()}


def whiten(run: Run, batches: list[RolloutBatch]) -> None:
    """Advantages of mean 0 and deviation 1 over the tokens of all ranks."""
    own = torch.cat([batch.advantages[batch.mask] for batch in batches])
    mean, deviation = mean_and_deviation(run, own)
    for batch in batches:
        batch.advantages = (batch.advantages - mean) / (deviation + 1e-8) * batch.mask


def minibatches(run: Run, batches: list[RolloutBatch]) -> Iterator[list[RolloutBatch]]:
    """The batches of each update, in another order each time; on every rank as many."""
    for epoch in range(run.args.update_epochs):
        order = torch.Generator().manual_seed(run.args.seed * 1000 + run.step * 10 + epoch)
        places = torch.randperm(len(batches), generator=order).tolist()
        for n in range(run.args.num_minibatches):
            some = [batches[place] for place in places[n :: run.args.num_minibatches]]
            yield some or micro_batches(run, [])


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    policy = starting_model(args, tokenizer)
    critic = MiniMindForScoring.on(copy.deepcopy(policy))  # at first it foretells nothing
    model = ActorCritic(with_addition(args, policy), critic)
    run = Run(args, args.stage("ppo"), policy.config, tokenizer)
    prompts, held_out = read_prompts(run)
    rewards = Rewards(run, prompts)
    loader = run.loader(prompts, prompt_batch)
    run.announce(model, prompts, held_out)

    reference = Reference(run, policy) if args.kl_coef else None
    model = run.distribute(model)
    optimizer = Together(
        *make_optimizer(policy, args.optimizer, args.learning_rate, args.weight_decay).optimizers,
        *make_optimizer(
            critic, args.optimizer, args.critic_learning_rate, args.weight_decay
        ).optimizers,
    )
    run.resume(model, optimizer)

    for window in run.steps(loader):
        completions = roll_out(run, policy, prompts_of(window), args.num_generations)
        scores, figures = rewards(completions)
        batches = micro_batches(run, completions)
        figures |= judge(run, unwrapped(model), reference, batches, known(scores))
        for minibatch in minibatches(run, batches):
            sums = Sums(run, minibatch)
            for batch in minibatch:
                with run.forward(model, sync=batch is minibatch[-1]):
                    new, values, aux_loss = model(**policy_inputs(run, batch))
                    actor_loss, critic_loss = ppo_loss(new, values, batch, args)
                loss = (actor_loss + args.vf_coef * critic_loss) / sums.tokens
                run.backward(loss, sums.balance_loss(batch, aux_loss))
                sums.watch(new, batch, args.clip_epsilon, args.clip_epsilon)
                sums.watched["critic_loss"] += critic_loss.item()
            run.update(model, optimizer)
            if args.target_kl and sums.moved() > args.target_kl:
                break
        if held_out and run.due(args.eval_interval):
            sample, val_figures = evaluate_policy(run, policy, held_out, rewards)
            run.log_evaluation(sample, **val_figures)
        figures |= lengths_and_ends(completions)
        run.log(**shares(run, len(completions), figures), **sums.figures())
        run.save_every(model, optimizer, save=saver(args, lambda both: both.actor))
    return run.finish()


def known(scores: Tensor) -> Tensor:
    """Rewards [N], with the mean of the others in the place of those that failed."""
    return scores.nan_to_num(scores.nanmean().item() if len(scores) else 0.0)


if __name__ == "__main__":
    run_stage(main, Args, __doc__)
