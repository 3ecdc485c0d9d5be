"""Log-probs of the policy."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.model_minimind import MiniMindForCausalLM
from trainer.common.context import unwrap
from trainer.rl.arguments import RolloutArgs
from trainer.rl.batches import RolloutBatch

if TYPE_CHECKING:
    from trainer.rl.prompts import PromptBatch
    from trainer.trainer_utils import Run

    RolloutRun = Run[RolloutArgs, PromptBatch]  # of every trainer of reinforcement learning


def policy_inputs(batch: RolloutBatch, temperature: float) -> dict:
    """The model's arguments for the log-probs of a batch.

    The policy is the distribution that was sampled from, so logits are divided by the sampling
    temperature here too; otherwise the ratio would not be 1 before the first step.
    """
    return dict(
        **batch.inputs,
        labels=batch.labels,
        use_cache=False,
        return_log_probs=True,
        temperature=temperature,
    )


def log_probs(run: "RolloutRun", model: MiniMindForCausalLM, batch: RolloutBatch) -> Tensor:
    """log π of each token of the completions, [B, T − 1], without gradient.

    The same computation as in training. The engine's own log-probs would be cheaper, but with a KV
    cache sums are made in another order, and the ratio would differ from 1 by rounding.
    """
    with torch.no_grad(), run.forward(unwrap(model), sync=False):
        return unwrap(model)(**policy_inputs(batch, run.ctx.args.temperature)).log_probs
