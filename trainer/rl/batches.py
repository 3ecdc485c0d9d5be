"""Completions → padded batches to train on, and statistics of an optimizer step.

All per-token tensors are [B, T − 1], like log-probs: column t belongs to token t + 1, which the
model predicts from the tokens up to t.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dataset.packing import Batch, collate
from model.losses import IGNORE_INDEX
from trainer.common.context import Context
from trainer.common.metrics import Metric
from trainer.rl.rollout import Completion


@dataclass
class RolloutBatch(Batch):
    """Prompts with their completions, padded on the right; loss on the completions alone."""

    indices: Tensor  # [B], int64: places in the list of completions
    ref_log_probs: Tensor | None = None  # [B, T − 1] of π_ref; None without a reference
    # The rest is set between rollout and training; until then there is no such attribute.
    old_log_probs: Tensor = field(init=False, repr=False)  # [B, T − 1] of π_old, which sampled
    advantages: Tensor = field(init=False, repr=False)  # [B, 1], or [B, T − 1] in PPO
    values: Tensor = field(init=False, repr=False)  # [B, T − 1], PPO: V_old, before training
    returns: Tensor = field(init=False, repr=False)  # [B, T − 1], PPO: the critic's targets

    @property
    def completion_mask(self) -> Tensor:
        """[B, T − 1], bool: the predicted token is one that the policy sampled, its EOS included;
        False for prompts, tool results and padding."""
        return self.labels[:, 1:] != IGNORE_INDEX

    def set_old_log_probs(self, log_probs: Tensor) -> None:
        """Keep the log-probs of the first forward pass over this batch as log π_old.

        Must be called before the first optimizer step after the rollout: until then the policy is
        the one that sampled, and the ratio π / π_old is exactly 1. Later calls change nothing. PPO
        makes a forward pass for it, because the KL in its rewards needs log π_old; the others take
        the first pass of the training, which costs nothing.
        """
        if not hasattr(self, "old_log_probs"):
            # Detached: π_old is a constant. With a gradient through it the ratio would be 1
            # whatever the weights are, and its gradient 0.
            self.old_log_probs = log_probs.detach()


def micro_batches(
    completions: Sequence[Completion], batch_size: int, pad_id: int, device: torch.device
) -> list[RolloutBatch]:
    """Batches of completions of similar length, so that little is padding. Without completions,
    one batch without tokens: every rank must take part in each step."""
    lengths = [len(each.prompt.ids) + len(each.tokens) for each in completions]
    order = sorted(range(len(completions)), key=lengths.__getitem__)
    batches = []
    for start in range(0, max(1, len(order)), batch_size):
        indices = order[start : start + batch_size]
        rows = [[token_row(completions[n])] for n in indices] or [[]]
        batch = RolloutBatch(
            **vars(collate(rows, pad_id)), indices=torch.tensor(indices, dtype=torch.long)
        )
        batches.append(batch.to(device))
    return batches


def token_row(completion: Completion) -> dict[str, np.ndarray]:
    """The tokens of prompt and completion, and which of them carry loss."""
    prompt, tokens = completion.prompt.ids, completion.tokens
    # In an episode with tools, only tokens that the policy sampled are its actions. The tools'
    # results are context: a loss on them would teach the policy to imitate the tools.
    actions = [True] * len(tokens) if completion.action_mask is None else completion.action_mask
    loss_mask = [False] * len(prompt) + actions
    return {"input_ids": np.array(prompt + tokens), "loss_mask": np.array(loss_mask)}


# -- statistics ------------------------------------------------------------------------------------


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) for each token, the same shape: k3 = e^d − d − 1 with d =
    log π_ref − log π. Unbiased for tokens sampled from π and never negative, while −d itself, which
    is unbiased too, is negative for many tokens (joschu.net/blog/kl-approx.html)."""
    difference = ref_log_probs - log_probs
    return difference.exp() - difference - 1


def mean_std(ctx: Context, values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the values of all ranks; `values` are this rank's."""
    values = values.double()
    count, total, squares = ctx.all_reduce_sum(
        len(values), values.sum().item(), values.square().sum().item()
    )
    mean = total / max(1, count)
    return mean, math.sqrt(max(0.0, squares / max(1, count) - mean**2))


class UpdateStats:
    """How many completions and tokens the ranks have together, which losses are divided by, and
    sums over this rank's tokens for the log.

    Attributes:
        num_completions, num_tokens: of all ranks, at least 1; tokens are those that carry loss.
    """

    def __init__(self, ctx: Context, batches: list[RolloutBatch]):
        self.ctx = ctx
        completions = sum(len(batch.indices) for batch in batches)
        tokens = sum(batch.num_label_tokens for batch in batches)
        completions, tokens = ctx.all_reduce_sum(completions, tokens)
        self.num_completions, self.num_tokens = max(1.0, completions), max(1.0, tokens)
        self.sums: dict[str, float] = defaultdict(float)
        self.tokens_seen = 0  # by this rank; each epoch counts

    def aux_loss(self, batch: RolloutBatch, aux_loss: Tensor | None) -> Tensor | float:
        """The micro-batch's part of the experts' balance loss, a mean over all completions."""
        return 0.0 if aux_loss is None else aux_loss * len(batch.indices) / self.num_completions

    @torch.no_grad()
    def accumulate(self, log_probs: Tensor, batch: RolloutBatch, low: float, high: float) -> None:
        """Add a micro-batch.

        Args:
            log_probs: [B, T − 1] of the policy that is trained.
            low, high: the clip's range of the ratio, [1 − low, 1 + high].
        """
        mask = batch.completion_mask
        self.tokens_seen += batch.num_label_tokens
        # E[−log π] is the entropy; the sampled tokens estimate it without a sum over the vocabulary
        self.sums["entropy"] -= log_probs[mask].sum().item()
        ratio = (log_probs - batch.old_log_probs)[mask].exp()
        self.sums["approx_kl"] += kl_estimate(log_probs, batch.old_log_probs)[mask].sum().item()
        self.sums["clip_fraction"] += ((ratio < 1 - low) | (ratio > 1 + high)).sum().item()
        if batch.ref_log_probs is not None:
            self.sums["kl"] += kl_estimate(log_probs, batch.ref_log_probs)[mask].sum().item()

    def approx_kl(self) -> float:
        """KL(π ‖ π_old) so far, a mean over the tokens of all ranks."""
        return self.ctx.all_reduce_sum(self.sums["approx_kl"])[0] / self.num_tokens

    def metrics(self) -> dict[str, Metric]:
        """Means over tokens: entropy of the policy; kl, to the reference; approx_kl, to the policy
        that sampled; clip_fraction, the share of tokens whose ratio is outside of the clip."""
        return {name: (value, self.tokens_seen) for name, value in self.sums.items()}
