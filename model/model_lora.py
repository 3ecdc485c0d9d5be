"""LoRA: fine-tuning by a small addition to chosen matrices (Hu et al. 2021, arXiv 2106.09685).

    W·x  →  W·x + alpha/r · B·A·x        A [r, in], B [out, r], r much smaller than both

W stays as it is, to the bit; only A and B are trained, a few per cent of the parameters. B begins
at 0, so that at first nothing is changed. To serve, the product is added to W (`merge`) and costs
nothing; `unmerge` gives back the very W that was there.

Names are those of peft: `model.layers.0.self_attn.q_proj.lora_A.weight` and `….lora_B.weight`, in
an adapter of peft with `base_model.model.` before them.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model.errors import UserError
from model.weights import read_info, read_state, to_fp16_cpu, write_json, write_weights

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class LoraConfig:
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
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
    """A linear layer, and its addition."""

    def __init__(self, linear: nn.Linear, settings: LoraConfig):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        like = dict(bias=False, device=linear.weight.device, dtype=linear.weight.dtype)
        self.lora_A = nn.Linear(linear.in_features, settings.r, **like)
        self.lora_B = nn.Linear(settings.r, linear.out_features, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(settings.dropout)
        self.scale = settings.alpha / settings.r
        self.before: Tensor | None = None  # the weight, while merged
        self.off = False

    def forward(self, rows: Tensor) -> Tensor:
        out = F.linear(rows, self.weight, self.bias)
        if self.off or self.before is not None:
            return out
        return out + self.scale * self.lora_B(self.lora_A(self.dropout(rows)))

    @property
    def delta_weight(self) -> Tensor:
        """alpha/r · B·A, [out, in], in float32."""
        return self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()


def add_lora(model: nn.Module, settings: LoraConfig) -> None:
    """Give an addition to each linear layer whose last name is one of the target modules, and
    freeze everything else. UserError if there is no such layer."""
    if "lm_head" in settings.target_modules:
        raise UserError("LoRA is for layers inside the blocks; lm_head is the embedding, tied")
    for target in dict.fromkeys(settings.target_modules):
        found = [
            (name, layer)
            for name, layer in model.named_modules()
            if type(layer) is nn.Linear and name.rsplit(".", 1)[-1] == target
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
            model.set_submodule(name, LoraLinear(layer, settings))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return (each for each in model.named_modules() if isinstance(each[1], LoraLinear))


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the additions alone, by name."""
    return {name: weight for name, weight in model.state_dict().items() if ".lora_" in name}


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had any."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each addition to its weight, in float32."""
    for _, layer in lora_layers(model):
        if layer.before is None:
            layer.before = layer.weight.detach().clone()
            layer.weight.copy_(layer.weight.float() + layer.delta_weight)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take the weights back that were there before, bit for bit."""
    for _, layer in lora_layers(model):
        if layer.before is not None:
            layer.weight.copy_(layer.before)
            layer.before = None


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """The model with ordinary layers again, the additions in their weights, which are rounded to
    float16 as in a file (`pack_for_cpu_decoding` asks for that)."""
    merge(model)
    for name, layer in list(lora_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        layer.weight.copy_(layer.weight.half())
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain)
    return model


# -- files -----------------------------------------------------------------------------------------


def save_lora(
    model: nn.Module,
    path: Path | str,
    *,
    stage: str,
    config: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
) -> Path:
    """Save the additions as float16 `.pth`, and their settings in the `.json` beside it."""
    state = to_fp16_cpu(lora_state(model))
    parameters = sum(weight.numel() for weight in state.values())
    info = {"stage": stage, "lora": asdict(config), "parameters": parameters, "origin": origin}
    return write_weights(path, state, model, tokenizer, info)


def read_lora(path: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """The additions in a file and their settings. UserError if it is no LoRA file."""
    state, info = read_state(path), read_info(path)
    if not all(".lora_" in name for name in state):
        raise UserError(f"{path} is a whole model and no LoRA file")
    if info is None or "lora" not in info:
        raise UserError(
            f"{path} has no .json with LoRA's settings beside it: alpha cannot be read from the "
            "weights' shapes"
        )
    try:
        return state, LoraConfig(**info["lora"])
    except TypeError as error:
        raise UserError(f"the settings in {path.with_suffix('.json')} are no LoRA's") from error


def load_lora(model: nn.Module, path: Path | str) -> LoraConfig:
    """Give `model` the additions of a file. UserError where they do not fit it."""
    path = Path(path)
    state, settings = read_lora(path)
    add_lora(model, settings)
    set_lora_state(model, state, path)
    return settings


@torch.no_grad()
def set_lora_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy weights into the additions; UserError unless they are all of them."""
    expected = lora_state(model)
    if expected.keys() != state.keys():
        name = min(expected.keys() ^ state.keys())
        raise UserError(f"{source} does not fit the model: only one of them has {name}")
    for name, weight in state.items():
        if weight.shape != expected[name].shape:
            raise UserError(
                f"{source} does not fit the model: {name} is {list(weight.shape)} in the file and "
                f"{list(expected[name].shape)} in the model"
            )
        expected[name].copy_(weight)


# -- peft ------------------------------------------------------------------------------------------

PREFIX = "base_model.model."  # before each name in an adapter of peft


def save_peft(path: Path | str, folder: Path, base: Path | str = "") -> None:
    """A LoRA file as a folder that peft loads.

    Args:
        base: what adapter_config.json is to name as the model that it belongs to.
    """
    state, settings = read_lora(Path(path))
    if any(".experts." in name or ".mlp.gate." in name for name in state):
        raise UserError(
            "in transformers the experts of a layer and their gate are no linear layers, to which "
            "peft could add something of this kind; merge it into the model instead (merge-lora)"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": str(base),
    }
    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: weight.float().contiguous() for name, weight in state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


@torch.no_grad()
def load_peft(model: nn.Module, folder: Path) -> LoraConfig:
    """Give `model` the additions of an adapter of peft. UserError where that is something else."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "adapter_model.safetensors")
        targets = config["target_modules"]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
            raise ValueError("it is of another kind, or has biases")
        if not isinstance(targets, list):
            raise ValueError("target_modules is no list")
        settings = LoraConfig(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            target_modules=sorted(name.rsplit(".", 1)[-1] for name in targets),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no LoRA adapter of peft: {error}") from error
    for name in (
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "fan_in_fan_out",
    ):
        if config.get(name):
            raise UserError(f"the adapter in {folder} has {name}, which this LoRA has not")
    add_lora(model, settings)
    set_lora_state(model, {n.removeprefix(PREFIX): w for n, w in state.items()}, folder)
    return settings
