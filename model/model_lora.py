"""LoRA: fine-tuning by a low-rank adapter (Hu et al. 2021, arXiv 2106.09685).

    W·x  →  W·x + alpha/r · B·A·x        A [r, in], B [out, r], r much smaller than both

W is frozen; only A and B are trained, a few per cent of the parameters. For inference the product
is added to W (`merge`) and costs nothing; `unmerge` restores W bit for bit.

The names are those of peft: `model.layers.0.self_attn.q_proj.lora_A.weight` and `….lora_B.weight`.
Files of adapters are read and written in formats/lora_format.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import UserError

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class LoraConfig:
    """Size and place of an adapter."""

    r: int = 8  # rank
    alpha: float = 16.0  # B·A is scaled by alpha / r
    dropout: float = 0.0  # of the input of A
    # as in peft: last names of layers, such as q_proj, or whole names
    target_modules: list[str] = field(default_factory=lambda: list(ATTENTION_MODULES))

    def __post_init__(self) -> None:
        numbers = isinstance(self.r, int) and isinstance(self.alpha, int | float)
        if not numbers or self.r < 1 or self.alpha <= 0:
            raise UserError(
                f"LoRA: lora_r {self.r} must be at least 1 and lora_alpha {self.alpha} above 0"
            )
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"LoRA: lora_dropout {self.dropout} must be at least 0 and less than 1")
        names = self.target_modules
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise UserError(f"LoRA: target modules must be a list of names, not {names}")


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. The layer's own weight is shared, not copied."""

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        weight = linear.weight
        like: dict[str, Any] = dict(bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_A = nn.Linear(linear.in_features, config.r, **like)
        self.lora_B = nn.Linear(config.r, linear.out_features, **like)
        # B = 0: training starts from the unchanged model. A must not be 0 too, or neither of them
        # would get a gradient.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(config.dropout)
        # Divided by r, so that another rank needs no other learning rate (roughly).
        self.scaling = config.alpha / config.r
        self.base_weight: Tensor | None = None  # W, while the adapter is merged
        self.disabled = False

    def forward(self, rows: Tensor) -> Tensor:
        out = F.linear(rows, self.weight, self.bias)
        if self.disabled or self.base_weight is not None:
            return out
        return out + self.scaling * self.lora_B(self.lora_A(self.dropout(rows)))

    @property
    def delta_weight(self) -> Tensor:
        """alpha/r · B·A, [out, in], in float32."""
        return self.scaling * self.lora_B.weight.float() @ self.lora_A.weight.float()


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Add an adapter to each linear layer that the target modules name, and freeze everything else.
    UserError if there is no such layer."""
    if "lm_head" in config.target_modules:
        raise UserError("LoRA is for layers inside the blocks; lm_head is tied to the embedding")
    for target in dict.fromkeys(config.target_modules):
        found = [
            (name, layer)
            for name, layer in model.named_modules()
            if type(layer) is nn.Linear and f".{name}".endswith(f".{target}")
        ]
        if not found:
            linears = {
                name.rsplit(".", 1)[-1]
                for name, layer in model.named_modules()
                if isinstance(layer, nn.Linear)
            }
            raise UserError(
                f"the model has no linear layer {target}; it has {', '.join(sorted(linears))}"
            )
        for name, layer in found:
            model.set_submodule(name, LoraLinear(layer, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """All layers with an adapter, by name."""
    return (each for each in model.named_modules() if isinstance(each[1], LoraLinear))


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapter alone, by name."""
    return {name: weight for name, weight in model.state_dict().items() if ".lora_" in name}


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model, within a `with`: the reference model of DPO and RL without a second copy."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        for layer in layers:
            layer.disabled = False


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapter to the weights, W + alpha/r · B·A, in float32."""
    for _, layer in lora_layers(model):
        if layer.base_weight is None:
            layer.base_weight = layer.weight.detach().clone()
            layer.weight.copy_(layer.weight.float() + layer.delta_weight)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the weights of before `merge`: the copy, since subtracting would leave rounding."""
    for _, layer in lora_layers(model):
        if layer.base_weight is not None:
            layer.weight.copy_(layer.base_weight)
            layer.base_weight = None


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the adapter and replace its layers by plain linear ones. Merged weights are rounded to
    float16 as in a file, which `pack_for_cpu_decoding` needs."""
    merge(model)
    for name, layer in list(lora_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        layer.weight.copy_(layer.weight.half())
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain)
    return model
