"""What a model computes on its way from a text to the next token, taken out to be looked at.

`observe` runs a text through a model once and keeps the vectors between the layers; everything else
is read from them by small functions: attention, the logit lens, the experts that were chosen, the
likeliest next tokens, and the loss of each token. Models of transformers work too, as far as they
tell these things. Nothing here changes a model, or is fast.

Letters in the shape comments:
    T tokens   L layers   C hidden size   H query heads   K key/value heads   D size of a head
    V vocabulary   E routed experts   k experts that a token uses, or likeliest tokens
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.attention import repeat_kv
from model.feed_forward import MixtureOfExperts, Routing
from model.model_minimind import MiniMindBlock, MiniMindConfig
from model.rope import apply_rotary_emb, rope_cos_sin


@dataclass
class Observation:
    """One text, and what a model made of it."""

    ids: Tensor  # [T]
    hidden: Tensor  # [L + 1, T, C]: behind embedding and each layer; the last is normalised
    logits: Tensor  # [T, V], float32
    attention: Tensor | None  # [L, H, T, T]: row = who looks, column = what is looked at
    routing: list[Routing | None]  # of each layer; None where it is no mixture (or does not tell)


class TopTokens(NamedTuple):
    """The likeliest tokens, the likeliest first."""

    ids: Tensor  # [..., k]
    probabilities: Tensor  # [..., k]


@torch.no_grad()
def observe(model: PreTrainedModel, ids: list[int]) -> Observation:
    """Run a text through a model in eval mode, alone and without a cache.

    Args:
        ids: its tokens, at least one and at most what the model has positions for (ValueError).
    """
    most = model.config.max_position_embeddings
    if not 1 <= len(ids) <= most:
        raise ValueError(f"{len(ids)} tokens, where a text has 1 to {most}")
    row = torch.tensor([ids], device=model.device)
    if not isinstance(model.config, MiniMindConfig):
        return observe_transformers(model, row)
    outputs = model(input_ids=row, output_hidden_states=True, use_cache=False)
    hidden = torch.cat(outputs.hidden_states)  # [L + 1, T, C]
    rotation = rope_cos_sin(model.config, torch.arange(len(ids), device=model.device)[None])
    # the input of a layer is what the one before it left
    blocks = list(zip(model.model.layers, hidden[:-1], strict=True))
    return Observation(
        ids=row[0],
        hidden=hidden,
        logits=outputs.logits[0].float(),
        attention=torch.stack([attention_weights(*block, rotation) for block in blocks]),
        routing=[layer_routing(*block, rotation) for block in blocks],
    )


def attention_weights(
    block: MiniMindBlock, hidden: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """softmax(QKᵀ/√D) of a layer: [T, C], its input, → [H, T, T]. Each row adds up to 1.

    The model itself never has this matrix: its fused kernels go over it piece by piece.
    """
    attention = block.self_attn
    inputs = block.input_layernorm(hidden)[None]
    heads = (1, len(hidden), -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(inputs).view(heads)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(inputs).view(heads)).transpose(1, 2)
    query, key = (
        apply_rotary_emb(query, *rotation),
        apply_rotary_emb(key, *rotation),
    )  # [1, H, T, D], [1, K, T, D]
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    scores = (query @ key.transpose(-1, -2) / math.sqrt(attention.head_dim))[0].float()
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def layer_routing(
    block: MiniMindBlock, hidden: Tensor, rotation: tuple[Tensor, Tensor]
) -> Routing | None:
    """Which experts each token of a layer's input [T, C] goes to: scores [T, E], chosen [T, k],
    weights [T, k]; None in a dense layer."""
    if not isinstance(block.mlp, MixtureOfExperts):
        return None
    inputs = block.input_layernorm(hidden)[None]
    hidden = hidden + block.self_attn(inputs, rotation, None, None, len(hidden))
    routing = block.mlp.route(block.post_attention_layernorm(hidden))
    return Routing(*(each[0] for each in routing))


def observe_transformers(model: PreTrainedModel, row: Tensor) -> Observation:
    """The same for a model of transformers, which tells its attention if it is not fused."""
    fused = model.config._attn_implementation
    model.set_attn_implementation("eager")
    told = dict(output_attentions=True, output_hidden_states=True)
    if hasattr(model.config, "output_router_logits"):
        told["output_router_logits"] = True
    try:
        outputs = model(input_ids=row, use_cache=False, **told)
    finally:
        model.set_attn_implementation(fused)
    attention = outputs.attentions
    layers = len(outputs.hidden_states) - 1
    gates = getattr(outputs, "router_logits", None) or [None] * layers
    return Observation(
        ids=row[0],
        hidden=torch.cat(outputs.hidden_states),
        logits=outputs.logits[0].float(),
        attention=torch.cat(attention).float() if attention else None,
        routing=[None if gate is None else softmax_routing(model, gate) for gate in gates],
    )


def softmax_routing(model: PreTrainedModel, logits: Tensor) -> Routing:
    """Where a softmax gate with these logits [T, E] sends the tokens."""
    scores = logits.float().softmax(-1)
    weights, chosen = scores.topk(model.config.num_experts_per_tok, dim=-1)
    if getattr(model.config, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(scores, chosen, weights)


# -- read from an observation ----------------------------------------------------------------------


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """The k likeliest tokens by logits [..., V], with their probabilities."""
    probabilities, ids = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return TopTokens(ids, probabilities)


@torch.no_grad()
def logit_lens(model: PreTrainedModel, hidden: Tensor, k: int) -> TopTokens:
    """What each layer would say if it were the last: [L + 1, T, C] → [L + 1, T, k].

    The final norm and the head are put behind every layer ("the logit lens", nostalgebraist 2020).
    Row 0 is the embedding; the last row is the model's own answer.

    Args:
        hidden: as in an Observation, the last one normalised already.
    """
    norm, head = model.base_model.norm, model.get_output_embeddings()
    # one by one: the logits of all layers are large
    layers = [top_tokens(head(norm(layer)), k) for layer in hidden[:-1]]
    layers.append(top_tokens(head(hidden[-1]), k))
    return TopTokens(*(torch.stack(each) for each in zip(*layers, strict=True)))


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[T, V], [T] → [T - 1]: −log p of each token but the first, in nats, given those before it."""
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def token_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """[T, V], [T] → [T - 1]: how many tokens the model found likelier than each that came."""
    true = logits[:-1].gather(-1, ids[1:, None])
    return (logits[:-1] > true).sum(-1)


def expert_load(routing: Routing) -> Tensor:
    """[E]: of a layer's choices, the share that went to each expert."""
    experts = routing.scores.shape[-1]
    return torch.bincount(routing.experts.flatten(), minlength=experts) / routing.experts.numel()


# -- bytes -----------------------------------------------------------------------------------------


def byte_characters() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2) writes for each byte: itself where that can be
    seen, and else one from 256 on, in the order of the bytes."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = byte_characters()


def decode_token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token stands for: often a part of a character. A control token is its name."""
    name = tokenizer.convert_ids_to_tokens(token)
    if token not in tokenizer.added_tokens_decoder and all(c in BYTES for c in name):
        return bytes(BYTES[c] for c in name)
    return tokenizer.decode([token]).encode()
