"""Files of LoRA adapters: MiniMind's own, those of earlier versions, and folders of peft.

| file             | names of a layer's weights                 | alpha                    |
|------------------|--------------------------------------------|--------------------------|
| here             | lora_A.weight, lora_B.weight               | in the `.json` beside it |
| earlier versions | lora.A.weight, lora.B.weight               | r: B·A is added as it is |
| peft             | as here, with the prefix base_model.model. | in adapter_config.json   |

Which layers have an adapter is read from the names of the weights.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from model.config import MiniMindConfig
from model.errors import UserError, reason_of
from model.formats.minimind_format import read_state
from model.formats.native_format import read_weights_file
from model.model_lora import LoraConfig, add_lora, lora_state
from model.weights import (
    list_weights,
    read_info,
    to_fp16_cpu,
    weight_name,
    write_json,
    write_weights,
)

# -- MiniMind's own --------------------------------------------------------------------------------


def save_lora(
    model: nn.Module,
    path: Path | str,
    *,
    stage: str,
    config: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
) -> Path:
    """Save the adapter as a float16 `.pth`, with its config in the `.json`."""
    state = to_fp16_cpu(lora_state(model))
    parameters = sum(weight.numel() for weight in state.values())
    info = {"stage": stage, "lora": asdict(config), "parameters": parameters, "origin": origin}
    return write_weights(path, state, model, tokenizer, info)


def resolve_lora(name: str, config: MiniMindConfig, directory: Path | str) -> Path:
    """The adapter that --lora_weight names: a `.pth`, or the newest of that name and of the model's
    size, in lora/ or beside the model's weights. UserError if there is none."""
    if name.endswith(".pth"):
        return Path(name)
    for stage in (f"lora/{name}", name):
        if found := list_weights(stage, config.hidden_size, directory, config.use_moe):
            return found[0]
    file = f"{weight_name(name, config.hidden_size, config.use_moe)}.pth"
    folder = Path(directory)
    there = [*(folder / "lora").glob("*.pth"), *folder.glob("lora_*.pth")]
    raise UserError(
        f"there is no LoRA adapter {file} in {folder / 'lora'} or {folder}; "
        + (f"there is {', '.join(sorted(p.name for p in there))}" if there else "train one first")
    )


def read_lora(path: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter in a file and its config. UserError if it is not a LoRA file."""
    state, info = read_state(path), read_info(path)
    # a resume file of an earlier version holds the base model too
    adapter = {re.sub(r"\.lora\.([AB])\.", r".lora_\1.", n): w for n, w in state.items()}
    adapter = {name: weight for name, weight in adapter.items() if ".lora_" in name}
    if not adapter:
        raise UserError(f"{path} is a whole model and not a LoRA file")
    if info is not None and "lora" in info:
        try:
            return adapter, LoraConfig(**info["lora"])
        except TypeError as error:
            raise UserError(f"{path.with_suffix('.json')} does not hold a LoRA config") from error
    if any(".lora_" in name for name in state):
        raise UserError(
            f"{path} has no .json with the LoRA config beside it; alpha cannot be read from the "
            "shapes of the weights"
        )
    r = rank_of(adapter, path)
    return adapter, LoraConfig(r, alpha=r, target_modules=last_names(adapter))


def rank_of(adapter: dict[str, Tensor], source: Path) -> int:
    """The rank of all layers. UserError if they have several."""
    ranks = {len(weight) for name, weight in adapter.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(
            f"the adapter in {source} has layers of ranks {sorted(ranks)}; MiniMind supports one "
            "rank for all"
        )
    return ranks.pop()


def module_names(adapter: Iterable[str]) -> list[str]:
    """The names of the layers that an adapter has weights for."""
    return sorted({name.partition(".lora_")[0] for name in adapter})


def last_names(adapter: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in module_names(adapter)})


def load_lora(model: nn.Module, path: Path | str) -> LoraConfig:
    """Add the adapter of a file to `model`. UserError if it does not fit."""
    path = Path(path)
    state, config = read_lora(path)
    add_lora(model, config)
    set_lora_state(model, state, path)
    return config


@torch.no_grad()
def set_lora_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy weights into the adapter of `model`. UserError unless names and shapes are equal."""
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

PEFT_PREFIX = "base_model.model."  # of each name in a peft adapter
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What changes the computation, and has no counterpart here.
UNSUPPORTED_PEFT = """use_dora use_qalora use_bdlora modules_to_save fan_in_fan_out lora_bias
    layer_replication trainable_token_indices target_parameters alora_invocation_tokens arrow_config
    monteclora_config""".split()
MERGE_THERE = (
    "; merge it with peft (merge_and_unload), save the model and convert that with from-hf"
)
# Initialisations that change the base weights too: what is saved is no adapter of the model itself.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_peft(path: Path | str, folder: Path, base: Path | str = "") -> None:
    """Write a LoRA file as a peft adapter.

    Args:
        base: the base model that adapter_config.json names.
    """
    state, lora = read_lora(Path(path))
    if any(".experts." in name or ".mlp.gate." in name for name in state):
        raise UserError(
            "peft cannot adapt experts and routers, which are not linear layers in transformers; "
            "merge the adapter into the model instead (merge-lora)"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": str(base),
    }
    folder.mkdir(parents=True, exist_ok=True)
    named = {PEFT_PREFIX + name: weight.float().contiguous() for name, weight in state.items()}
    save_file(named, folder / PEFT_WEIGHTS[0], metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def load_peft(model: nn.Module, folder: Path) -> LoraConfig:
    """Add a peft adapter to `model`, for the layers that it has weights for. UserError if it is not
    a plain LoRA adapter.

    Layers may differ in rank and scale in peft (rank_pattern, alpha_pattern), and have one of each
    here: A and B of a smaller rank are filled up with zeros, and B takes what its scale differs by.
    """
    try:
        peft_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if peft_config.get("peft_type") != "LORA" or peft_config.get("bias", "none") != "none":
            raise ValueError("its peft_type is not LORA, or it trains biases")
        r, alpha = peft_config["r"], peft_config["lora_alpha"]
        config = LoraConfig(r, alpha, peft_config.get("lora_dropout", 0.0))
        alphas = {**(peft_config.get("alpha_pattern") or {})}
        for each in alphas.values():
            LoraConfig(r, each)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = reason_of(error) if isinstance(error, RecursionError) else error
        raise UserError(f"{folder} is not a LoRA adapter of peft: {reason}") from error
    for name in UNSUPPORTED_PEFT:
        if peft_config.get(name):
            raise UserError(
                f"the adapter in {folder} has {name}, which MiniMind does not support{MERGE_THERE}"
            )
    initial = peft_config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGING):
        raise UserError(
            f"the adapter in {folder} has init_lora_weights {initial}, which changes the base "
            "weights too; save it with peft's path_initial_model_for_weight_conversion"
        )
    state = read_peft_weights(folder)
    names = module_names(state)
    ranks = {name: len(state[f"{name}.lora_A.weight"]) for name in names}
    if not peft_config.get("rank_pattern") and set(ranks.values()) != {r}:
        rank = min(set(ranks.values()) - {r})
        raise UserError(f"the adapter in {folder} has rank {rank}, and its config says {r}")
    power = 0.5 if peft_config.get("use_rslora") else 1  # scaled by alpha / sqrt(r), or alpha / r
    scales = {name: alpha_of(name, alphas, alpha) / ranks[name] ** power for name in names}
    config.r = max(ranks.values())
    config.alpha = max(scales.values()) * config.r
    config.target_modules = target_modules(model, state, folder)
    for name in names:
        missing, factor = config.r - ranks[name], scales[name] * config.r / config.alpha
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        state[f"{name}.lora_A.weight"] = F.pad(a, (0, 0, 0, missing))
        state[f"{name}.lora_B.weight"] = F.pad(b * factor, (0, missing))
    add_lora(model, config)
    set_lora_state(model, state, folder)
    return config


def alpha_of(name: str, alphas: dict[str, float], default: float) -> float:
    """The alpha of a layer: of the first pattern that fits the end of its name, as in peft."""
    for pattern, alpha in alphas.items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise UserError(f"alpha_pattern {pattern} is no regular expression: {error}") from error
        if fits:
            return alpha
    return default


def read_peft_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a peft adapter under MiniMind's names."""
    path = next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} is not a LoRA adapter of peft: it has no {PEFT_WEIGHTS[0]}")
    state = {
        name.removeprefix(PEFT_PREFIX): weight for name, weight in read_weights_file(path).items()
    }
    for name in sorted(state):
        if not re.search(r"\.lora_[AB]\.weight$", name) or state[name].dim() != 2:
            raise UserError(
                f"the adapter in {folder} has the weight {name}; MiniMind has adapters of linear "
                f"layers in the blocks alone{MERGE_THERE}"
            )
    for name in (f"{name}.lora_{part}.weight" for name in module_names(state) for part in "AB"):
        if name not in state:
            raise UserError(f"the adapter in {folder} has no weight {name}")
    return state


def target_modules(model: nn.Module, adapter: dict[str, Tensor], source: Path) -> list[str]:
    """The layers of an adapter: their last names where all layers of such a name have one, else
    their whole names. UserError if the model lacks one of them."""
    linears = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    wanted = module_names(adapter)
    for name in wanted:
        if name not in linears:
            raise UserError(f"{source} does not fit the model, which has no linear layer {name}")
    short = last_names(adapter)
    every = [name for name in linears if name.rpartition(".")[2] in short]
    return short if sorted(every) == wanted else wanted
