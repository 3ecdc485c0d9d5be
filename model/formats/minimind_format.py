"""Bare `.pth` files of earlier MiniMind versions: the config from the shapes of the weights."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import UserError

ROUTER_BIAS = "mlp.e_score_correction_bias"  # its name in a layer, with scoring_func "sigmoid"


def config_from_shapes(
    state: dict[str, Tensor], path: Path | str = "the file", heads: int = 8
) -> dict[str, Any]:
    """The config of a bare `.pth`, from the shapes of its weights.

    What shapes do not show depends on the generation: newer weights, which have q/k norm, have
    rms_norm_eps 1e-6 and one expert per token, older ones 1e-5 and two; each has its own YaRN.

    Args:
        heads: the number of query heads where no q/k norm shows the size of a head.
    """
    try:
        embedding = state["model.embed_tokens.weight"]
        vocab_size, hidden_size = embedding.shape
        layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in state]
        first = "model.layers.0."
        key_rows = state[first + "self_attn.k_proj.weight"].shape[0]
        query_rows = state[first + "self_attn.q_proj.weight"].shape[0]
        use_moe = first + "mlp.gate.weight" in state
        expert = "experts.0." if use_moe else ""
        intermediate_size = state[f"{first}mlp.{expert}gate_proj.weight"].shape[0]
        q_norm = state.get(first + "self_attn.q_norm.weight")
        head_dim = query_rows // heads if q_norm is None else q_norm.shape[0]
        heads, key_heads = query_rows // head_dim, key_rows // head_dim
    except KeyError as error:
        raise UserError(
            f"{path} does not hold MiniMind weights: the key {error} is missing"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not hold MiniMind weights: their shapes do not fit"
        ) from error
    newer = q_norm is not None
    generation: dict[str, Any] = {}
    if newer:
        generation = {"yarn_factor": 16.0, "yarn_attention_factor": 1.0}
    if use_moe:
        generation |= {
            "use_moe": True,
            "n_routed_experts": len(state[first + "mlp.gate.weight"]),
            "n_shared_experts": sum(
                name.startswith(first + "mlp.shared_experts.") and "gate_proj" in name
                for name in state
            ),
            "num_experts_per_tok": 1 if newer else 2,
            "scoring_func": "sigmoid" if first + ROUTER_BIAS in state else "softmax",
        }
    return {
        **generation,
        "yarn_beta_fast": 32.0 if newer else 4.0,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "qk_norm": newer,
        "rms_norm_eps": 1e-6 if newer else 1e-5,
        "tie_word_embeddings": torch.equal(state.get("lm_head.weight", embedding), embedding),
    }
