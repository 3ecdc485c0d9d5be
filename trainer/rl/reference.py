"""The reference of reinforcement learning, to which the KL keeps the policy near."""

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from model.model_lora import disable_adapter
from model.model_minimind import MiniMindForCausalLM
from trainer.common.context import Context, unwrap
from trainer.rl.arguments import RolloutArgs
from trainer.rl.batches import RolloutBatch
from trainer.rl.policy import log_probs

if TYPE_CHECKING:
    from trainer.rl.policy import RolloutRun


class ReferenceModel:
    """π_ref, the policy before training: a frozen copy, or with LoRA the model with its adapter
    disabled, which needs no memory."""

    def __init__(self, ctx: Context[RolloutArgs], model: MiniMindForCausalLM):
        """To be made before --resume loads trained weights into the model."""
        self.copy = None
        if not ctx.args.use_lora:
            self.copy = copy.deepcopy(model).requires_grad_(False).to(ctx.device)

    def log_probs(
        self, run: "RolloutRun", model: MiniMindForCausalLM, batch: RolloutBatch
    ) -> Tensor:
        """log π_ref, [B, T − 1]; `model` is the policy."""
        if self.copy is not None:
            return log_probs(run, self.copy, batch)
        with disable_adapter(unwrap(model)):
            return log_probs(run, model, batch)
