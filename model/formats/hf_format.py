"""MiniMind ↔ a folder of transformers: config.json, model.safetensors, tokenizer.

A model here is one that transformers knows, under other labels:

| here                       | there                |                                           |
|----------------------------|----------------------|-------------------------------------------|
| dense                      | LlamaForCausalLM     | the same names                            |
| dense, q/k norm            | Qwen3ForCausalLM     | the same names                            |
| experts                    | Qwen2MoeForCausalLM  | shared experts are one wide one, gated    |
| experts, none shared       | MixtralForCausalLM   | others in the file                        |
| the same, q/k norm         | Qwen3MoeForCausalLM  | the same names                            |
| experts that a bias        | Glm4MoeForCausalLM   | shared experts are one wide one           |
| balances, and shared ones  |                      |                                           |

What none of them holds, such as softmax over experts with both q/k norm and shared ones, goes into
a folder of its own kind ("native"), which takes this project's code to read.
"""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_transformers

SHARED_FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id
    eos_token_id pad_token_id""".split()
YARN_FIELDS = {  # their name: ours
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "attention_factor": "yarn_attention_factor",
}
HARMLESS_ROPE_FIELDS = {
    "truncate": True,
    "partial_rotary_factor": 1.0,
}  # of what may stand there too
UNSUPPORTED_FIELDS = {
    "attention_bias": "biases in its attention",
    "qkv_bias": "biases in its attention",
    "mlp_bias": "biases in its feed-forward layers",
    "use_sliding_window": "attention within a window",
    "first_k_dense_replace": "layers without experts among those with them",
    "mlp_only_layers": "layers without experts among those with them",
}
ARCHITECTURES = {
    LlamaConfig: "LlamaForCausalLM",
    Qwen3Config: "Qwen3ForCausalLM",
    Qwen2MoeConfig: "Qwen2MoeForCausalLM",
    Qwen3MoeConfig: "Qwen3MoeForCausalLM",
    MixtralConfig: "MixtralForCausalLM",
    Glm4MoeConfig: "Glm4MoeForCausalLM",
}
PROJECTIONS = ("gate", "up", "down")
MIXTRAL_NAMES = {
    "gate": "w1",
    "up": "w3",
    "down": "w2",
}  # in its files; in memory it has Qwen's names
# A gate that is half open whatever comes, sigmoid(x · w) with w ≈ 0; llama.cpp takes no 0 itself.
NEAR_ZERO_GATE = 1e-12  # in float16 its smallest number


# -- configs ---------------------------------------------------------------------------------------


def to_hf_config(config: MiniMindConfig) -> PreTrainedConfig:
    """The config of the transformers model that is this one. UserError if there is none."""
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
            size = shared * config.moe_intermediate_size
            fields |= {"shared_expert_intermediate_size": size, "qkv_bias": False}
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
        f"balanced by {'a bias' if config.scoring_func == 'sigmoid' else 'a loss'}",
        f"{'with' if config.qk_norm else 'without'} q/k norm",
        f"{'with' if config.n_shared_experts else 'without'} shared ones",
        f"weights that {'' if config.norm_topk_prob else 'do not '}add up to 1",
    ]
    return UserError(
        f"no class of transformers that is known here has such experts ({', '.join(features)}); "
        "--native makes a folder that brings this project's code along"
    )


def rope_parameters(config: MiniMindConfig) -> dict[str, Any]:
    """What transformers calls our settings of RoPE and YaRN."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.inference_rope_scaling:
        parameters["rope_type"] = "yarn"
        parameters |= {theirs: getattr(config, ours) for theirs, ours in YARN_FIELDS.items()}
    return parameters


def from_hf_config(config: PreTrainedConfig) -> MiniMindConfig:
    """The config here of a transformers model. UserError if it is none of the above."""
    if isinstance(config, MiniMindConfig):
        return config
    if type(config) not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES.values())
        raise UserError(f"{type(config).__name__} is none of {known} or MiniMind's own")
    for name, complaint in UNSUPPORTED_FIELDS.items():
        if getattr(config, name, None):
            raise UserError(f"the model has {complaint}, and MiniMind has not ({name})")
    if config.hidden_act != "silu":
        raise UserError(f"the model's activation is {config.hidden_act}, and MiniMind's is silu")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.hidden_size != head_dim * config.num_attention_heads:
        raise UserError("the model's heads together are not as wide as the model")
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    rope = config.rope_parameters
    fields["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] == "yarn":
        fields["inference_rope_scaling"] = True
        fields |= {ours: rope[theirs] for theirs, ours in YARN_FIELDS.items() if theirs in rope}
    elif rope["rope_type"] != "default":
        raise UserError(f"the model scales RoPE in a way MiniMind has not: {rope['rope_type']}")
    known = {"rope_type", "rope_theta", *YARN_FIELDS}
    for name, value in rope.items():
        if name not in known and value is not None and HARMLESS_ROPE_FIELDS.get(name) != value:
            raise UserError(
                f"the model's RoPE has {name} {value}, and MiniMind's has no such thing"
            )
    fields["qk_norm"] = isinstance(config, Qwen3Config | Qwen3MoeConfig)
    if isinstance(config, LlamaConfig | Qwen3Config):
        return MiniMindConfig(**fields)
    fields |= {"use_moe": True, "num_experts_per_tok": config.num_experts_per_tok}
    if isinstance(config, MixtralConfig):
        if config.sliding_window:
            raise UserError("the model has attention within a window, and MiniMind has not")
        fields |= {"n_routed_experts": config.num_local_experts, "n_shared_experts": 0}
        return MiniMindConfig(moe_intermediate_size=config.intermediate_size, **fields)
    fields |= {
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }
    if isinstance(config, Glm4MoeConfig):
        if config.n_group != 1 or config.routed_scaling_factor != 1:
            raise UserError("the model's experts are grouped or scaled, and MiniMind's are not")
        fields |= {
            "scoring_func": "sigmoid",
            "qk_norm": config.use_qk_norm,
            "n_routed_experts": config.n_routed_experts,
            "n_shared_experts": config.n_shared_experts,
        }
        return MiniMindConfig(**fields)
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    if config.decoder_sparse_step != 1 or shared % config.moe_intermediate_size:
        raise UserError("not every layer has experts, or the shared one is not as wide as some")
    fields |= {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": shared // config.moe_intermediate_size,
    }
    return MiniMindConfig(**fields)


# -- weights ---------------------------------------------------------------------------------------


def to_hf_state(model: MiniMindForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a dtype, under the names of transformers' files."""
    config = model.config
    state = {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if not config.use_moe:
        return state
    kind = type(to_hf_config(config))
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp."
        if config.n_shared_experts:
            join_shared_experts(state, mlp, config, gated=kind is Qwen2MoeConfig)
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


def join_shared_experts(
    state: dict[str, Tensor], mlp: str, config: MiniMindConfig, gated: bool
) -> None:
    """Several experts that are always used are one wider one. Qwen's passes a gate, here half open,
    for which outputs that are twice as large make up."""
    name = "shared_expert" if gated else "shared_experts"
    for part in PROJECTIONS:
        each = (
            f"{mlp}shared_experts.{n}.{part}_proj.weight" for n in range(config.n_shared_experts)
        )
        joined = torch.cat([state.pop(one) for one in each], 1 if part == "down" else 0)
        state[f"{mlp}{name}.{part}_proj.weight"] = joined * (2 if gated and part == "down" else 1)
    if gated:
        like = state[f"{mlp}gate.weight"]
        nearly = max(NEAR_ZERO_GATE, torch.finfo(like.dtype).smallest_normal / 1024)
        state[f"{mlp}shared_expert_gate.weight"] = like.new_full((1, config.hidden_size), nearly)


# -- folders ---------------------------------------------------------------------------------------


@torch.no_grad()
def save_hf_folder(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A folder that AutoModelForCausalLM loads without any code of ours."""
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
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the config.json in {folder} cannot be read: {reason}") from error


def load_hf_folder(folder: Path) -> MiniMindForCausalLM:
    """The model of a folder as one of ours, in float32. UserError if it is none."""
    from_hf_config(read_hf_config(folder))  # a mistake shows before all the weights are read
    other = load_transformers(folder, torch.float32)
    if isinstance(other, MiniMindForCausalLM):
        return other.eval()
    config = from_hf_config(other.config)
    model = MiniMindForCausalLM(config)
    model.load_state_dict(from_hf_state(dict(other.state_dict()), config), strict=True)
    return model.eval()


def from_hf_state(state: dict[str, Tensor], config: MiniMindConfig) -> dict[str, Tensor]:
    """The weights of a transformers model in memory, where all experts of a layer are one tensor,
    under our names."""
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
                raise UserError("the model's shared expert has a gate, and MiniMind's has none")
            shared["down"] = shared["down"] / 2
        experts = zip(
            shared["gate"].split(size),
            shared["up"].split(size),
            shared["down"].split(size, dim=1),
            strict=True,
        )
        put_experts(state, f"{mlp}shared_experts", experts)
    return state


def put_experts(
    state: dict[str, Tensor], where: str, experts: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> None:
    for n, weights in enumerate(experts):
        for part, weight in zip(PROJECTIONS, weights, strict=True):
            state[f"{where}.{n}.{part}_proj.weight"] = weight
