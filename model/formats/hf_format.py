"""MiniMind ↔ a transformers folder: config.json, model.safetensors, tokenizer.

Each MiniMind model is the same computation as an architecture of transformers:

| MiniMind                        | transformers         | differences in the weights            |
|---------------------------------|----------------------|---------------------------------------|
| dense                           | LlamaForCausalLM     | none                                  |
| dense, q/k norm                 | Qwen3ForCausalLM     | none                                  |
| MoE, shared experts             | Qwen2MoeForCausalLM  | shared experts are one, with a gate;  |
|                                 |                      | q, k and v have biases of zero        |
| MoE                             | MixtralForCausalLM   | other names                           |
| MoE, q/k norm                   | Qwen3MoeForCausalLM  | none                                  |
| MoE, sigmoid, shared experts    | Glm4MoeForCausalLM   | shared experts are one                |

What these have and MiniMind has not, such as biases, is read where it changes nothing.

For the rest, such as softmax MoE with both q/k norm and shared experts, there is the "native"
folder, which brings this project's code along (trust_remote_code).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from model.errors import UserError
from model.formats.experts import PROJECTIONS, join_experts, put_experts
from model.formats.minimind_format import check_sizes, make_config
from model.formats.native_format import YARN_FIELDS, is_native, load_native, read_config_json
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

SHARED_FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id
    eos_token_id pad_token_id""".split()
# Values of further RoPE fields that change nothing.
HARMLESS_ROPE_FIELDS = {
    "truncate": True,
    "partial_rotary_factor": 1.0,
}
UNSUPPORTED_FIELDS = {
    "use_sliding_window": "sliding-window attention",
    "first_k_dense_replace": "dense layers among MoE layers",
    "mlp_only_layers": "dense layers among MoE layers",
}
ARCHITECTURES = {
    LlamaConfig: "LlamaForCausalLM",
    Qwen3Config: "Qwen3ForCausalLM",
    Qwen2MoeConfig: "Qwen2MoeForCausalLM",
    Qwen3MoeConfig: "Qwen3MoeForCausalLM",
    MixtralConfig: "MixtralForCausalLM",
    Glm4MoeConfig: "Glm4MoeForCausalLM",
}
MIXTRAL_NAMES = {
    "gate": "w1",
    "up": "w3",
    "down": "w2",
}  # in its files; in memory it has Qwen's names
NEAR_ZERO_GATE = 1e-12  # weight of a shared expert's gate: llama.cpp does not accept 0


# -- configs ---------------------------------------------------------------------------------------


def to_hf_config(config: MiniMindConfig) -> PreTrainedConfig:
    """The config of the equivalent transformers model. UserError if there is none."""
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields |= {"head_dim": config.head_dim, "rope_parameters": rope_parameters(config)}
    if not config.use_moe:
        kind = Qwen3Config if config.qk_norm else LlamaConfig
        return kind(architectures=[ARCHITECTURES[kind]], **fields)
    shared = config.n_shared_experts
    fields |= {
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }
    if config.scoring_func == "sigmoid" and shared:
        fields["rope_parameters"]["partial_rotary_factor"] = 1.0
        kind = Glm4MoeConfig
        fields |= {
            "n_routed_experts": config.n_routed_experts,
            "n_shared_experts": shared,
            "first_k_dense_replace": 0,
            "use_qk_norm": config.qk_norm,
            "attention_bias": False,
        }
    elif config.scoring_func == "softmax" and not (shared and config.qk_norm):
        fields["router_aux_loss_coef"] = config.aux_loss_alpha
        if config.qk_norm:
            kind = Qwen3MoeConfig
            fields["num_experts"] = config.n_routed_experts
        elif shared:
            kind = Qwen2MoeConfig
            fields["num_experts"] = config.n_routed_experts
            assert config.moe_intermediate_size is not None  # __post_init__ has set it
            size = shared * config.moe_intermediate_size
            # vLLM's class always has biases and leaves those that a folder lacks uninitialised:
            # to_hf_state writes zeros.
            fields |= {"shared_expert_intermediate_size": size, "qkv_bias": True}
        elif config.norm_topk_prob:
            kind = MixtralConfig
            fields["num_local_experts"] = config.n_routed_experts
            fields["intermediate_size"] = fields.pop("moe_intermediate_size")
        else:
            raise unsupported_moe(config)
    else:
        raise unsupported_moe(config)
    return kind(architectures=[ARCHITECTURES[kind]], **fields)


def unsupported_moe(config: MiniMindConfig) -> UserError:
    features = [
        f"scoring_func {config.scoring_func}",
        f"{'with' if config.qk_norm else 'without'} q/k norm",
        f"{'with' if config.n_shared_experts else 'without'} shared experts",
        f"norm_topk_prob {config.norm_topk_prob}",
    ]
    return UserError(
        f"transformers has no architecture with such experts ({', '.join(features)}); --native "
        "writes a folder with this project's code"
    )


def rope_parameters(config: MiniMindConfig) -> dict[str, Any]:
    """RoPE and YaRN in the terms of transformers."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.inference_rope_scaling:
        parameters["rope_type"] = "yarn"
        parameters |= {hf: getattr(config, own) for hf, own in YARN_FIELDS.items()}
    return parameters


def from_hf_config(config: PreTrainedConfig) -> MiniMindConfig:
    """The MiniMind config of a transformers model. UserError if it is not one of the above."""
    if type(config) not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES.values())
        raise UserError(
            f"{type(config).__name__} is not supported; it must be one of {known}, or MiniMind"
        )
    for name, feature in UNSUPPORTED_FIELDS.items():
        if getattr(config, name, None):
            raise UserError(f"the model has {feature} ({name}), which MiniMind does not support")
    if config.hidden_act != "silu":
        raise UserError(
            f"the model's activation is {config.hidden_act}; MiniMind supports silu only"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.hidden_size != head_dim * config.num_attention_heads:
        raise UserError(
            f"the model has {config.num_attention_heads} heads of size {head_dim}, not together as "
            f"wide as its hidden_size {config.hidden_size}"
        )
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    rope = config.rope_parameters
    fields["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] == "yarn":
        fields["inference_rope_scaling"] = True
        fields |= {own: rope[hf] for hf, own in YARN_FIELDS.items() if rope.get(hf) is not None}
    elif rope["rope_type"] != "default":
        raise UserError(
            f"the model has RoPE scaling {rope['rope_type']}, which MiniMind does not support"
        )
    known = {"type", "rope_type", "rope_theta", *YARN_FIELDS}  # "type": until transformers 4
    for name, value in rope.items():
        if name not in known and value is not None and HARMLESS_ROPE_FIELDS.get(name) != value:
            raise UserError(f"the model's RoPE has {name} {value}, which MiniMind does not support")
    fields["qk_norm"] = isinstance(config, Qwen3Config | Qwen3MoeConfig)
    if isinstance(config, LlamaConfig | Qwen3Config):
        return MiniMindConfig(**fields)
    fields |= {"use_moe": True, "num_experts_per_tok": config.num_experts_per_tok}
    if hasattr(config, "router_aux_loss_coef"):
        fields["aux_loss_alpha"] = config.router_aux_loss_coef
    if isinstance(config, MixtralConfig):
        if config.sliding_window:
            raise UserError(
                "the model has sliding-window attention, which MiniMind does not support"
            )
        fields |= {"n_routed_experts": config.num_local_experts, "n_shared_experts": 0}
        return MiniMindConfig(moe_intermediate_size=config.intermediate_size, **fields)
    fields |= {
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }
    if isinstance(config, Glm4MoeConfig):
        if config.n_group != 1 or config.routed_scaling_factor != 1:
            raise UserError(
                "the model's experts are grouped or scaled, which MiniMind does not support"
            )
        fields |= {
            "scoring_func": "sigmoid",
            "qk_norm": config.use_qk_norm,
            "n_routed_experts": config.n_routed_experts,
            "n_shared_experts": config.n_shared_experts,
        }
        return MiniMindConfig(**fields)
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    if config.decoder_sparse_step != 1 or shared % config.moe_intermediate_size:
        raise UserError(
            "the model has dense layers, or the width of its shared expert is not a multiple of "
            "moe_intermediate_size; MiniMind supports neither"
        )
    fields |= {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": shared // config.moe_intermediate_size,
    }
    return MiniMindConfig(**fields)


# -- weights ---------------------------------------------------------------------------------------


def to_hf_state(model: MiniMindForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a dtype, under the names of files of transformers."""
    config = model.config
    state = {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}
    kind = type(to_hf_config(config))
    if config.tie_word_embeddings:
        head = state.pop("lm_head.weight")
        if kind is Glm4MoeConfig:  # vLLM's class ties no head; a copy, since files share no memory
            state["lm_head.weight"] = head.clone()
    if not config.use_moe:
        return state
    for layer in range(config.num_hidden_layers):
        if kind is Qwen2MoeConfig:
            for part in "qkv":
                name = f"model.layers.{layer}.self_attn.{part}_proj"
                state[f"{name}.bias"] = torch.zeros(len(state[f"{name}.weight"]), dtype=dtype)
        mlp = f"model.layers.{layer}.mlp."
        if config.n_shared_experts:
            gated = kind is Qwen2MoeConfig
            shared = f"{mlp}shared_expert" if gated else f"{mlp}shared_experts"
            join_experts(state, f"{mlp}shared_experts", config.n_shared_experts, shared, wide=True)
            if gated:
                # Qwen2 multiplies its shared expert by sigmoid(x · w). With w ≈ 0 that is 1/2, and
                # an output twice as large makes up for it.
                state[f"{shared}.down_proj.weight"] = state[f"{shared}.down_proj.weight"] * 2
                like = state[f"{mlp}gate.weight"]
                near_zero = max(NEAR_ZERO_GATE, torch.finfo(like.dtype).smallest_normal / 1024)
                gate = like.new_full((1, config.hidden_size), near_zero)
                state[f"{mlp}shared_expert_gate.weight"] = gate
        if kind is Glm4MoeConfig:
            bias = state.pop(f"{mlp}e_score_correction_bias").float()
            state[f"{mlp}gate.e_score_correction_bias"] = bias
        if kind is MixtralConfig:
            moe = f"model.layers.{layer}.block_sparse_moe."
            state[f"{moe}gate.weight"] = state.pop(f"{mlp}gate.weight")
            for n, part in product(range(config.n_routed_experts), PROJECTIONS):
                weight = state.pop(f"{mlp}experts.{n}.{part}_proj.weight")
                state[f"{moe}experts.{n}.{MIXTRAL_NAMES[part]}.weight"] = weight
    return state


# -- folders ---------------------------------------------------------------------------------------


@torch.no_grad()
def save_hf_folder(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that AutoModelForCausalLM loads without trust_remote_code."""
    config = to_hf_config(model.config)
    config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_hf_state(model, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_hf_config(folder: Path) -> PreTrainedConfig:
    read_config_json(folder)  # refuses what is to be refused before transformers reads it
    try:
        # without the argument, a folder with code of its own would ask on stdin whether to run it
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the config.json in {folder} cannot be read: {reason}") from error


def load_hf_folder(folder: Path, **overrides: Any) -> MiniMindForCausalLM:
    """Load a transformers folder as a MiniMind model, in float32 and eval mode.

    Args:
        overrides: fields of the config that replace those of config.json, but for structural ones.

    Raises:
        UserError: MiniMind has no such model.
    """
    if is_native(folder):
        return load_native(folder, **overrides)
    known = from_hf_config(read_hf_config(folder)).to_diff_dict()  # errors before the weights
    config = make_config(known, overrides, folder, "config.json")
    files = (path for each in ("*.safetensors", "*.bin") for path in folder.glob(each))
    check_sizes(config, sum(path.stat().st_size for path in files), folder)
    other = load_transformers(folder, torch.float32)
    model = MiniMindForCausalLM(config)
    model.load_state_dict(from_hf_state(dict(other.state_dict()), config), strict=True)
    return model.eval()


def from_hf_state(state: dict[str, Tensor], config: MiniMindConfig) -> dict[str, Tensor]:
    """The weights of a transformers model under MiniMind's names. Unlike in files, in memory all
    experts of a layer are one tensor. UserError if biases add anything."""
    for name in [name for name in state if name.endswith("_proj.bias")]:
        if state.pop(name).any():
            raise UserError(f"the model has biases ({name}), which MiniMind does not support")
    for layer in range(config.num_hidden_layers if config.use_moe else 0):
        mlp = f"model.layers.{layer}.mlp."
        size = config.moe_intermediate_size
        gate_and_up = state.pop(f"{mlp}experts.gate_up_proj")  # [E, 2I, C]
        down = state.pop(f"{mlp}experts.down_proj")  # [E, C, I]
        experts = zip(gate_and_up[:, :size], gate_and_up[:, size:], down, strict=True)
        put_experts(state, f"{mlp}experts", experts)
        if config.scoring_func == "sigmoid":
            bias = state.pop(f"{mlp}gate.e_score_correction_bias")
            state[f"{mlp}e_score_correction_bias"] = bias
        if not config.n_shared_experts:
            continue
        gate = state.pop(f"{mlp}shared_expert_gate.weight", None)
        name = "shared_experts" if gate is None else "shared_expert"
        shared = {part: state.pop(f"{mlp}{name}.{part}_proj.weight") for part in PROJECTIONS}
        if gate is not None:
            if gate.abs().max() > 1e-6:
                raise UserError(
                    "the model's shared expert has a gate, which MiniMind does not support"
                )
            shared["down"] = shared["down"] / 2  # the gate is 1/2 (see to_hf_state)
        experts = zip(
            shared["gate"].split(size),
            shared["up"].split(size),
            shared["down"].split(size, dim=1),
            strict=True,
        )
        put_experts(state, f"{mlp}shared_experts", experts)
    return state


@contextmanager
def quiet_transformers() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def load_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a transformers folder, as its own architecture; UserError unless all weights fit."""
    if is_native(folder):
        return load_native(folder).to(dtype)
    try:
        with quiet_transformers():  # the errors below say it in one sentence
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # of many types: unknown architecture, LFS pointer, half a file
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder} cannot be loaded ({reason}); if its files are small, they may be Git LFS "
            "pointers: fetch them with `git lfs pull`"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            name = min(map(str, info[what]))
            raise UserError(f"{folder} does not fit its config.json: {what[:-5]} weight {name}")
    return model
