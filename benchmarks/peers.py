"""The models of transformers that compute the same as ours: the peers of benchmarks and tests."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM


def peer_of(config: MiniMindConfig, **changes) -> PreTrainedModel:
    """The model of the same sizes, with random weights: Llama, with q/k norm Qwen3, with experts
    Qwen2-MoE (which has a shared one) or with q/k norm Qwen3-MoE (which has none).

    `changes` are fields of its config.
    """
    settings = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        attn_implementation="sdpa",
        **changes,
    )
    if not config.use_moe:
        if config.qk_norm:
            return Qwen3ForCausalLM(Qwen3Config(**settings))
        return LlamaForCausalLM(LlamaConfig(**settings))
    settings |= dict(
        num_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
    )
    if config.qk_norm:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    settings["shared_expert_intermediate_size"] = (
        config.n_shared_experts * config.moe_intermediate_size
    )
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings, qkv_bias=False))


def rope_parameters(config: MiniMindConfig) -> dict[str, Any]:
    """What transformers calls our settings of RoPE and YaRN."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.inference_rope_scaling:
        parameters |= {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.yarn_original_length,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "attention_factor": config.yarn_attention_factor,
        }
    return parameters


def peer_with_weights(own: MiniMindForCausalLM, **changes) -> PreTrainedModel:
    """The peer of a model, with its weights."""
    peer = peer_of(own.config, **changes)
    state = own.state_dict()
    for layer in range(own.config.num_hidden_layers if own.config.use_moe else 0):
        fuse_experts(state, f"model.layers.{layer}.mlp.", own.config)
    peer.load_state_dict(state, strict=True)
    return peer


def fuse_experts(state: dict[str, Tensor], mlp: str, config: MiniMindConfig) -> None:
    """Put the experts of a layer into the large tensors that transformers keeps in memory."""

    def taken(kind: str, part: str, count: int) -> list[Tensor]:
        return [state.pop(f"{mlp}{kind}.{n}.{part}_proj.weight") for n in range(count)]

    gate, up, down = (taken("experts", p, config.n_routed_experts) for p in ("gate", "up", "down"))
    state[f"{mlp}experts.gate_up_proj"] = torch.stack(
        [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    )
    state[f"{mlp}experts.down_proj"] = torch.stack(down)
    if config.qk_norm:
        return
    shared = f"{mlp}shared_expert."
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)):  # several are one wider one
        weights = taken("shared_experts", part, config.n_shared_experts)
        state[f"{shared}{part}_proj.weight"] = torch.cat(weights, dim)
    # theirs has a gate, sigmoid(x · w): half open at w ≈ 0, for which doubled outputs make up
    state[f"{shared}down_proj.weight"] = 2 * state[f"{shared}down_proj.weight"]
    gate_weight = torch.full((1, config.hidden_size), 1e-12)
    state[f"{mlp}shared_expert_gate.weight"] = gate_weight
