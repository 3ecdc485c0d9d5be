"""Folders with a config.json of model_type "minimind": of this project (`to-hf --native`) and of
earlier MiniMind versions. The code that they bring along is never run.

The config has the names of its version, and leaves out what the version always has:

| since 2026                   | 2025, and here             |
|------------------------------|----------------------------|
| num_experts                  | n_routed_experts           |
| router_aux_loss_coef         | aux_loss_alpha             |
| always q/k norm              | here qk_norm; 2025 never   |
| rope_scaling {"type": yarn}  | here yarn_factor and so on |

What config.json does not say is read from the shapes of the weights (minimind_format.py).
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.config import MiniMindConfig
from model.errors import UserError, reason_of
from model.formats.minimind_format import (
    build_model,
    check_plain,
    config_from_shapes,
    make_config,
    read_state,
)
from model.model_minimind import MiniMindForCausalLM

RENAMED = {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"}
YARN_FIELDS = {  # transformers: MiniMind
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "attention_factor": "yarn_attention_factor",
}
MAX_LABELS = 100_000
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_config_json(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. UserError if it is not a JSON object."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        # transformers makes a table of the labels when it reads the config
        if isinstance(labels := values.get("num_labels"), int) and labels > MAX_LABELS:
            raise ValueError(f"num_labels is {labels}")
        for name in ("attn_implementation", "_attn_implementation"):
            if values.get(name) not in ATTENTION:
                raise ValueError(f"{name} {values[name]!r} may name code on a hub")
        return values
    except (OSError, ValueError, RecursionError, TypeError) as error:
        reason = reason_of(error) if isinstance(error, RecursionError) else error
        raise UserError(f"the config.json in {folder} cannot be read: {reason}") from error


def is_native(folder: Path) -> bool:
    """Whether a folder's config.json is of MiniMind's own architecture."""
    return read_config_json(folder).get("model_type") == MiniMindConfig.model_type


def load_native(folder: Path, **overrides: Any) -> MiniMindForCausalLM:
    """The model in a native folder, in float32 and eval mode.

    Args:
        overrides: fields of the config that replace those of config.json, but for structural ones.

    Raises:
        UserError: config.json does not fit the weights, or a file cannot be read.
    """
    state = read_folder_state(folder)
    values = read_config_json(folder)
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"the activation in {folder} is {values['hidden_act']}; MiniMind supports silu only"
        )
    known = config_from_shapes(state, folder, values.get("num_attention_heads", 8))
    config = make_config({**known, **config_fields(values)}, overrides, folder, "config.json")
    return build_model(MiniMindForCausalLM, config, state, folder).float().eval()


def config_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json as fields of MiniMindConfig; null and unknown keys are left
    out."""
    named = {RENAMED.get(name, name): value for name, value in values.items()}
    fields = {
        name: value
        for name, value in named.items()
        if value is not None and (name in MiniMindConfig.__annotations__ or name == "head_dim")
    }
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(
            f"config.json has rope_scaling of type {kind}; MiniMind supports yarn and none"
        )
    if kind == "yarn":
        fields |= {YARN_FIELDS[name]: x for name, x in rope.items() if name in YARN_FIELDS}
        fields.setdefault("inference_rope_scaling", True)
    return fields


def read_folder_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, in one file or several (*.index.json), .safetensors or .bin."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        files = [name] if (folder / name).is_file() else []
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted({Path(file).name for file in weight_map.values()})
            except Exception as error:  # of many types, by what the file holds
                raise UserError(f"{index} is no index of weights: {error}") from error
        state: dict[str, Tensor] = {}
        for file in files:
            state |= read_weights_file(folder / file)
        if state:
            if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
                state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: saved once
            return state
    raise UserError(f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}")


def read_weights_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return read_state(path)
    try:
        state = load_file(path)
        for name, tensor in state.items():
            check_plain(tensor, f"{path} is refused: its {name}")
        return state
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the weights {path} cannot be read ({error}); if the file is small, it may be a Git "
            "LFS pointer: fetch it with `git lfs pull`"
        ) from error
