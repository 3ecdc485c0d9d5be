"""PPO: policy gradient with a learned value baseline and a clipped ratio.

Proximal Policy Optimization (arXiv 1707.06347) with generalised advantage estimation (GAE, arXiv
1506.02438), as it is used for language models (arXiv 2203.02155). A token o_t is an action, and the
tokens before it are the state s_t. The reward of a completion comes with its last token, and each
token pays for its distance from the reference:

    r_t = −kl_coef · (log π_old(o_t) − log π_ref(o_t)) + [t is the last] · reward
    δ_t = r_t + γ · V(s_t+1) − V(s_t)                    V after the last token is 0
    A_t = δ_t + γλ · δ_t+1 + (γλ)² · δ_t+2 + …           GAE; A is then whitened
    R_t = A_t + V_old(s_t)                               the critic's target, before whitening
    ρ_t = π(o_t) / π_old(o_t)                            1 before the first step

    L = −mean_t min(ρ_t·A_t, clip(ρ_t, 1−ε, 1+ε)·A_t)                                  (eq. 7)
        + vf_coef · ½ · mean_t max((V − R_t)², (clip(V, V_old−ε_v, V_old+ε_v) − R_t)²)

    log π: log_probs     log π_old: batch.old_log_probs   log π_ref: batch.ref_log_probs
    V: values            V_old: batch.values              R: batch.returns   A: batch.advantages
    ε: --clip_epsilon    ε_v: --value_clip                γ: --gamma         λ: --gae_lambda

Each set of completions is used for --update_epochs epochs of --num_minibatches optimizer steps; no
more steps follow once KL(π ‖ π_old) exceeds --target_kl.

Departures from the paper:
1. Actor and critic share no weights. The critic starts as a copy of the policy's blocks with a head
   of zeros, so V = 0 at first.
2. No entropy bonus.
3. The gradients of both models are clipped by their common norm.
4. Values are clipped too, as in OpenAI's code (arXiv 2005.12729, §3).

    python trainer/train_ppo.py --from_weight full_sft --reward answer --data_path FILE
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.command_line import Ignored, Refused, option, setting
from trainer.common.arguments import OPTIMIZER, ROLLOUT, STAGE
from trainer.common.command import parse_trainer, run_trainer
from trainer.rl.arguments import RL_RATE_HELP, RolloutArgs


@dataclass
class Args(RolloutArgs):
    reference_flag = "kl_coef"
    legacy_flags = {
        "mini_batch_size": Refused(
            "--num_minibatches says into how many optimizer steps a pass through the completions "
            "is divided; a mini-batch has --batch_size x --num_generations / --num_minibatches"
        ),
        "update_old_actor_freq": Ignored(
            "the old policy is always the one that sampled the completions"
        ),
    }

    learning_rate: float = option(1e-5, RL_RATE_HELP)
    critic_learning_rate: float = setting(1e-5, "the critic's", group=OPTIMIZER, above=0)
    num_generations: int = setting(1, "completions of each prompt", group=ROLLOUT, above=0)
    update_epochs: int = option(
        2, "passes through the same completions", alias=("ppo_update_iters",)
    )
    num_minibatches: int = setting(1, "optimizer steps of each pass", group=ROLLOUT, above=0)
    clip_epsilon: float = setting(
        0.1, "range of the ratio's clip around 1", group=STAGE, at_least=0
    )
    value_clip: float = setting(
        0.2,
        "range of the value clip around the old value",
        group=STAGE,
        at_least=0,
        alias=("cliprange_value",),
    )
    vf_coef: float = setting(0.5, "weight of the critic's loss", group=STAGE, at_least=0)
    kl_coef: float = setting(
        0.02, "weight of the KL to the reference in the reward; 0: none", group=STAGE, at_least=0
    )
    gamma: float = setting(1.0, "discount factor", group=STAGE, at_least=0, at_most=1)
    gae_lambda: float = setting(
        0.95,
        "1: whole returns, unbiased; 0: one step, then the critic",
        group=STAGE,
        alias=("lam",),
        at_least=0,
        at_most=1,
    )
    target_kl: float = setting(
        0.1,
        "KL to the old policy that ends the passes early; 0: never",
        group=STAGE,
        at_least=0,
        alias=("early_stop_kl",),
    )


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)

import torch
from torch import Tensor, nn

from model.model_minimind import MiniMindForCausalLM, MiniMindForScoring
from model.weights import load_tokenizer
from trainer.common.context import Context, unwrap
from trainer.common.metrics import Metric
from trainer.common.optimizers import MultiOptimizer, make_optimizer
from trainer.common.setup import add_lora_if_asked, init_model, make_save_fn, prepare_model
from trainer.rl.batches import RolloutBatch, UpdateStats, mean_std, micro_batches
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


class ActorCritic(nn.Module):
    """Both models in one module, so that one forward pass, one step and one checkpoint cover
    both, and DistributedDataParallel exchanges the gradients of both."""

    def __init__(self, actor: MiniMindForCausalLM, critic: MiniMindForScoring):
        super().__init__()
        self.actor, self.critic = actor, critic
        self.config = actor.config

    def forward(self, **inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and values, [B, T − 1], and the experts' balance loss."""
        actor = self.actor(**inputs)
        critic = self.critic(inputs["input_ids"], inputs["position_ids"])
        aux_loss = None if actor.aux_loss is None else actor.aux_loss + critic.aux_loss
        # The last position predicts nothing. Position t has read the tokens up to t, so its score
        # is the value of the state in which token t + 1 is chosen.
        return actor.log_probs, critic.scores[:, :-1], aux_loss


# -- rewards and advantages ------------------------------------------------------------------------


def token_rewards(batch: RolloutBatch, rewards: Tensor, kl_coef: float) -> Tensor:
    """r_t, [B, T − 1], from the rewards of completions, [B]."""
    mask = batch.completion_mask
    r = torch.zeros_like(batch.old_log_probs)
    if batch.ref_log_probs is not None:
        # The KL is a cost of each token, because each token's distribution may drift. GAE charges
        # it to the tokens that led there.
        r = -kl_coef * (batch.old_log_probs - batch.ref_log_probs) * mask
    # The completion is judged as a whole, so its reward is paid when it is complete: with the last
    # token. GAE carries it back to the earlier ones.
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * steps).argmax(1)  # [B]
    has_tokens = mask.any(1)
    r[has_tokens, last[has_tokens]] += rewards[has_tokens]
    return r


def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Advantages of GAE; all [B, T − 1]. From the end backwards: A_t = δ_t + γλ · A_t+1."""
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # The mask stops the recursion at the completion's end: neither advantage nor value flows
        # back from the padding behind it.
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages


def whiten(ctx: Context, batches: list[RolloutBatch]) -> None:
    """Shift and scale the advantages to mean 0 and standard deviation 1.

    Over the tokens of all ranks and batches: with its own mean, every batch would have bad tokens
    by definition, and the step would depend on how completions are batched.
    """
    own = torch.cat([batch.advantages[batch.completion_mask] for batch in batches])
    mean, std = mean_std(ctx, own)
    for batch in batches:
        batch.advantages = (batch.advantages - mean) / (std + 1e-8) * batch.completion_mask


def compute_advantages(
    run: Run[Args, PromptBatch],
    model: ActorCritic,
    reference: ReferenceModel | None,
    batches: list[RolloutBatch],
    rewards: Tensor,
) -> dict[str, Metric]:
    """Give each batch log π_old, log π_ref, V_old, returns and advantages. Returns metrics.

    Args:
        rewards: [N], of the completions.
    """
    args = run.ctx.args
    for batch in batches:
        batch.set_old_log_probs(log_probs(run, model.actor, batch))
        if reference:
            batch.ref_log_probs = reference.log_probs(run, model.actor, batch)
        with torch.no_grad(), run.forward(model, sync=False):
            values = model.critic(batch.input_ids, batch.position_ids).scores
        batch.values = values[:, :-1] * batch.completion_mask
        own_rewards = rewards[batch.indices.cpu()].to(run.ctx.device)
        batch.advantages = compute_gae(
            token_rewards(batch, own_rewards, args.kl_coef),
            batch.values,
            batch.completion_mask,
            args.gamma,
            args.gae_lambda,
        )
        # before whitening: the critic predicts rewards, in their own units
        batch.returns = batch.advantages + batch.values
    whiten(run.ctx, batches)
    returns = torch.cat([batch.returns[batch.completion_mask] for batch in batches])
    values = torch.cat([batch.values[batch.completion_mask] for batch in batches])
    # 1: the critic predicts the returns exactly; 0: no better than their mean would
    explained = 1 - ((returns - values).var() / returns.var()).item() if len(returns) > 1 else 0.0
    count = len(rewards) if math.isfinite(explained) else 0  # no variance: all returns are equal
    return {
        "critic_value": (values.double().sum().item(), len(values)),
        "explained_variance": (explained * count if count else 0.0, count),
    }


def impute_failed_rewards(rewards: Tensor) -> Tensor:
    """[N] rewards, NaN (the reward could not be computed) replaced by the mean of the others, which
    makes the completion neither good nor bad. PPO cannot leave it out, as GRPO does: the critic
    would learn that it ends with reward 0."""
    return rewards.nan_to_num(rewards.nanmean().item() if len(rewards) else 0.0)


# -- loss ------------------------------------------------------------------------------------------


def ppo_loss(
    log_probs: Tensor, values: Tensor, batch: RolloutBatch, args: Args
) -> tuple[Tensor, Tensor]:
    """Losses of actor and critic, each a sum over tokens.

    Args:
        log_probs, values: [B, T − 1], of the models that are trained.
        batch: old_log_probs, advantages, values and returns, [B, T − 1].
    """
    mask, advantages = batch.completion_mask, batch.advantages
    ratio = torch.exp(log_probs - batch.old_log_probs)
    clipped = ratio.clamp(1 - args.clip_epsilon, 1 + args.clip_epsilon)
    # Negative, because the optimizer minimises and the expected advantage is to grow. The minimum
    # is the pessimistic choice: beyond the clip nothing more is gained and the gradient is 0, but a
    # token that moved the wrong way is still pulled back.
    actor_loss = -torch.min(ratio * advantages, clipped * advantages)
    clipped_values = batch.values + (values - batch.values).clamp(-args.value_clip, args.value_clip)
    critic_loss = 0.5 * torch.max(
        (values - batch.returns).square(), (clipped_values - batch.returns).square()
    )
    return (actor_loss * mask).sum(), (critic_loss * mask).sum()


def minibatches(
    run: Run[Args, PromptBatch], batches: list[RolloutBatch]
) -> Iterator[list[RolloutBatch]]:
    """The batches of each optimizer step. Each epoch has another order, the same on all ranks. All
    ranks make as many steps; one that has no completions left gets a batch without tokens."""
    args = run.ctx.args
    for epoch in range(args.update_epochs):
        generator = torch.Generator().manual_seed(args.seed * 1000 + run.step * 10 + epoch)
        order = torch.randperm(len(batches), generator=generator).tolist()
        for n in range(args.num_minibatches):
            minibatch = [batches[index] for index in order[n :: args.num_minibatches]]
            yield minibatch or micro_batches([], 1, run.tokenizer.pad_token_id, run.ctx.device)


# -- training --------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    # Setup: actor, critic, data, rewards, reference.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    policy = init_model(args, tokenizer)
    # The critic has the policy's blocks and a head of zeros, so that V = 0 at first.
    critic = MiniMindForScoring.from_language_model(copy.deepcopy(policy))
    model = ActorCritic(add_lora_if_asked(args, policy), critic)
    rewards_of = Rewards(ctx, tokenizer, policy.config.hidden_size)
    train_data, val_data = read_prompts(ctx, tokenizer, rewards_of.can_score)
    stage = args.stage("ppo")
    run = Run(ctx, stage, model, tokenizer, train_data, val_data, collate=collate_prompts)

    # The policy as it is now; without a KL in the rewards there is no use for it.
    reference = ReferenceModel(ctx, policy) if args.kl_coef else None
    model = prepare_model(ctx, model)
    # Two learning rates: a critic is trained from nothing, a policy only adjusted.
    optimizer = MultiOptimizer(
        *make_optimizer(
            policy, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
        ).optimizers,
        *make_optimizer(
            critic, args.optimizer, args.critic_learning_rate, args.weight_decay, ctx.dtype
        ).optimizers,
    )
    run.resume(model, optimizer)

    for global_batch in run.steps():
        # Rollout: the policy as it is now completes each prompt.
        prompts = [prompt for batch in global_batch for prompt in batch.prompts]
        completions = generate_completions(
            ctx, policy, tokenizer, prompts, args.num_generations, step=run.step
        )
        run.metrics.add_tokens(sum(each.num_sampled for each in completions))

        # Rewards and advantages: computed once for these completions.
        rewards, metrics = rewards_of(completions)  # [N]
        print_sample(ctx, run.step, completions, rewards)
        rewards = impute_failed_rewards(rewards)
        pad_id = tokenizer.pad_token_id
        batches = micro_batches(completions, args.update_batch_size, pad_id, ctx.device)
        metrics |= compute_advantages(run, unwrap(model), reference, batches, rewards)

        # Losses of actor and critic: one optimizer step per minibatch.
        for minibatch in minibatches(run, batches):
            stats = UpdateStats(ctx, minibatch)
            for batch in minibatch:
                with run.forward(model, sync=batch is minibatch[-1]):
                    new_log_probs, values, aux_loss = model(
                        **policy_inputs(batch, args.temperature)
                    )
                    actor_loss, critic_loss = ppo_loss(new_log_probs, values, batch, args)
                # Divided by the tokens of all ranks' batches, so that each token counts the same.
                # A mean over each micro-batch would give tokens of short completions more weight.
                loss = (actor_loss + args.vf_coef * critic_loss) / stats.num_tokens
                run.backward(loss, stats.aux_loss(batch, aux_loss))
                stats.accumulate(new_log_probs, batch, args.clip_epsilon, args.clip_epsilon)
                stats.sums["critic_loss"] += critic_loss.item()
            run.update(model, optimizer)
            # The advantages are π_old's: the further π moves away, the less they say about π. The
            # clip limits each token's ratio, but not the sum over all tokens.
            if args.target_kl and stats.approx_kl() > args.target_kl:
                break

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            sample, val_metrics = evaluate_policy(ctx, policy, tokenizer, val_data, rewards_of)
            run.log_evaluation(sample, **val_metrics)
        metrics |= completion_stats(completions) | stats.metrics()
        run.log(**metrics)
        run.save_every(model, optimizer, save=make_save_fn(args, lambda both: both.actor))
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)
