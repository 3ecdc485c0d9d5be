"""The inside of a forward pass: hidden states, attention, logit lens, routing, losses of tokens.

`observe` runs a text through a model once and keeps the hidden states; small functions compute the
rest from them. Models of transformers work too, as far as they return these things. Nothing here
changes a model, and nothing is optimised.

Letters in the shape comments:
    T tokens   L layers   C hidden size   H query heads   K key/value heads   D size of a head
    V vocabulary   E routed experts   k selected experts, or most likely tokens
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from model.attention import VarlenMetadata, attention_weights, make_attention_mask
from model.feed_forward import MixtureOfExperts, Routing
from model.model_minimind import MiniMindBlock, MiniMindConfig
from model.rope import apply_rotary_emb, rope_cos_sin


@dataclass
class Observation:
    """A text and the activations of a model on it."""

    ids: Tensor  # [T]
    hidden: Tensor  # [L + 1, T, C]: after the embedding and each layer; the last is normalised
    logits: Tensor  # [T, V], float32
    attention: Tensor | None  # [L, H, T, T]: query, key
    routing: list[Routing | None]  # of each layer; None in dense layers, and where not available


class TopTokens(NamedTuple):
    """The most likely tokens, in descending order."""

    ids: Tensor  # [..., k]
    probabilities: Tensor  # [..., k]


@torch.no_grad()
def observe(model: PreTrainedModel, ids: list[int]) -> Observation:
    """Run a text through a model in eval mode, without batch or cache.

    Args:
        ids: its tokens; ValueError unless there are 1 to max_position_embeddings.
    """
    most = model.config.max_position_embeddings
    if not 1 <= len(ids) <= most:
        raise ValueError(f"the text has {len(ids)} tokens, where 1 to {most} are possible")
    row = torch.tensor([ids], device=model.device)
    if not isinstance(model.config, MiniMindConfig):
        return observe_transformers(model, row)
    outputs = model(input_ids=row, output_hidden_states=True, use_cache=False)
    hidden = torch.cat(outputs.hidden_states)  # [L + 1, T, C]
    cos_sin = rope_cos_sin(model.config, torch.arange(len(ids), device=model.device)[None])
    mask = make_attention_mask(model.config, hidden[:1], 0, None, None)
    assert not isinstance(mask, VarlenMetadata)  # which packed documents alone have
    # the input of a layer is the output of the one before it
    blocks = list(zip(model.model.layers, hidden[:-1], strict=True))
    return Observation(
        ids=row[0],
        hidden=hidden,
        logits=outputs.logits[0].float(),
        attention=torch.stack([layer_attention(*block, cos_sin, mask) for block in blocks]),
        routing=[layer_routing(*block, cos_sin, mask) for block in blocks],
    )


def layer_attention(
    block: MiniMindBlock, hidden: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """softmax(QKᵀ/√D) of a layer from its input [T, C] → [H, T, T]; each row sums to 1.

    The model itself never has this matrix in memory: fused kernels compute it in blocks.
    """
    attention = block.self_attn
    inputs = block.input_layernorm(hidden)[None]
    heads = (1, len(hidden), -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(inputs).view(heads)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(inputs).view(heads)).transpose(1, 2)
    query = apply_rotary_emb(query, *cos_sin).float()  # [1, H, T, D]
    key = apply_rotary_emb(key, *cos_sin).float()  # [1, K, T, D]
    return attention_weights(query, key, mask)[0]


def layer_routing(
    block: MiniMindBlock, hidden: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None
) -> Routing | None:
    """The routing of a layer from its input [T, C]: scores [T, E], experts [T, k], weights [T, k];
    None in a dense layer."""
    if not isinstance(block.mlp, MixtureOfExperts):
        return None
    inputs = block.input_layernorm(hidden)[None]
    hidden = hidden + block.self_attn(inputs, cos_sin, mask, None, len(hidden))
    routing = block.mlp.route(block.post_attention_layernorm(hidden))
    return Routing(*(each[0] for each in routing))


def observe_transformers(model: PreTrainedModel, row: Tensor) -> Observation:
    """The same for a model of transformers, which returns attention weights in eager mode only."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    flags = dict(output_attentions=True, output_hidden_states=True)
    if hasattr(model.config, "output_router_logits"):
        flags["output_router_logits"] = True
    try:
        outputs = model(input_ids=row, use_cache=False, **flags)
    finally:
        model.set_attn_implementation(implementation)
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
    """The routing of a softmax router with logits [T, E]."""
    scores = logits.float().softmax(-1)
    weights, experts = scores.topk(model.config.num_experts_per_tok, dim=-1)
    if getattr(model.config, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(scores, experts, weights)


# -- computed from an observation ------------------------------------------------------------------


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """The k most likely tokens by logits [..., V], with their probabilities."""
    probabilities, ids = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return TopTokens(ids, probabilities)


@torch.no_grad()
def logit_lens(model: PreTrainedModel, hidden: Tensor, k: int) -> TopTokens:
    """The logit lens (nostalgebraist 2020): what each layer would predict if it were the last, by
    the final norm and the head: [L + 1, T, C] → [L + 1, T, k]. Row 0 is the embedding, the last row
    the model's prediction.

    Args:
        hidden: as in an Observation, where the last one is already normalised.
    """
    norm, head = model.base_model.norm, model.get_output_embeddings()
    # one by one: the logits of all layers at once would be large
    layers = [top_tokens(head(norm(layer)), k) for layer in hidden[:-1]]
    layers.append(top_tokens(head(hidden[-1]), k))
    return TopTokens(*(torch.stack(each) for each in zip(*layers, strict=True)))


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[T, V], [T] → [T − 1]: −log p in nats of each token but the first, given those before it."""
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def token_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """[T, V], [T] → [T − 1]: how many tokens were more likely than the actual one; 0 is a hit."""
    true = logits[:-1].gather(-1, ids[1:, None])
    return (logits[:-1] > true).sum(-1)


def expert_load(routing: Routing) -> Tensor:
    """[E]: the share of a layer's selections that each expert gets."""
    experts = routing.scores.shape[-1]
    return torch.bincount(routing.experts.flatten(), minlength=experts) / routing.experts.numel()


# -- bytes -----------------------------------------------------------------------------------------
