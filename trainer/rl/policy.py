"""Log-probs of the policy and of its reference, and how the policy is saved."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model.formats.lora_format import save_lora
from model.model_lora import add_lora, disable_adapter
from model.model_minimind import MiniMindForCausalLM
from model.weights import save_weights
from trainer.common.context import Context, unwrap
from trainer.rl.arguments import RolloutArgs
from trainer.rl.batches import RolloutBatch
from trainer.rl.prompts import PromptBatch
from trainer.trainer_utils import Run

# what every trainer of reinforcement learning has
RolloutRun = Run[RolloutArgs, PromptBatch]


def add_lora_if_asked(args: RolloutArgs, model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """The model to train; with --use_lora it gets an adapter, and only that is trained."""
    if args.use_lora:
        add_lora(model, args.lora_config())
    return model


def make_save_fn(args: RolloutArgs, policy_of: Callable = lambda model: model) -> Callable:
    """What writes the weights of the policy, which is a part of the model in PPO."""
    save = partial(save_lora, config=args.lora_config()) if args.use_lora else save_weights
    return lambda model, path, **about: save(policy_of(model), path, **about)


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


def log_probs(run: RolloutRun, model: MiniMindForCausalLM, batch: RolloutBatch) -> Tensor:
    """log π of each token of the completions, [B, T − 1], without gradient.

    The same computation as in training. The engine's own log-probs would be cheaper, but with a KV
    cache sums are made in another order, and the ratio would differ from 1 by rounding.
    """
    with torch.no_grad(), run.forward(unwrap(model), sync=False):
        return unwrap(model)(**policy_inputs(batch, run.ctx.args.temperature)).log_probs


class ReferenceModel:
    """π_ref, the policy before training: a frozen copy, or with LoRA the model with its adapter
    disabled, which needs no memory."""

    def __init__(self, ctx: Context[RolloutArgs], model: MiniMindForCausalLM):
        """To be made before --resume loads trained weights into the model."""
        self.copy = None
        if not ctx.args.use_lora:
            self.copy = copy.deepcopy(model).requires_grad_(False).to(ctx.device)

    def log_probs(self, run: RolloutRun, model: MiniMindForCausalLM, batch: RolloutBatch) -> Tensor:
        """log π_ref, [B, T − 1]; `model` is the policy."""
        if self.copy is not None:
            return log_probs(run, self.copy, batch)
        with disable_adapter(unwrap(model)):
            return log_probs(run, model, batch)
