"""Attention: the mask, and softmax(QKᵀ/√D)V in three ways: SDPA, varlen, and written out.

Letters in the shape comments, as in model_minimind.py:
    B batch   T tokens fed now   S tokens attended to (cached + T)
    H query heads   K key/value heads   D size of a head
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .config import MiniMindConfig


class VarlenMetadata(NamedTuple):
    """The documents of packed rows, all rows laid end to end (FlashAttention's arguments).

    Varlen attention takes these instead of a mask and skips the pairs of tokens of two different
    documents, which a mask would compute and throw away.
    """

    cu_seqlens: Tensor  # [documents + 1], int32: cumulative lengths, 0 first
    max_seqlen: int  # at least the length of the longest document


# -- masks -----------------------------------------------------------------------------------------


class Cache(Protocol):
    """What the model needs of a KV cache: those of transformers have it, and the engine's views."""

    def get_seq_length(self) -> int: ...

    def update(self, key: Tensor, value: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, D]; returns all that is cached of the layer, [B, K, S, D]."""
        ...


def make_attention_mask(
    config: MiniMindConfig,
    hidden: Tensor,
    past: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    training: bool = False,
) -> Tensor | VarlenMetadata | None:
    """The mask of a forward pass of T = hidden.shape[1] tokens: bool [B or 1, 1, T, S], True where
    a query may attend to a key.

    Args:
        hidden: [B, T, C], for its shape and device.
        past: number of cached tokens, so that S = past + T.
        attention_mask: [B, S], 0 hides padding; or [B, 1, T, S], returned as it is.
        position_ids: [B or 1, T]; each 0 starts a document, and documents of a packed row do not
            attend to each other. None: one document a row. Only without a cache.

    Returns:
        None where the mask is causal and nothing more: kernels have a fast path for that. For
        packed documents VarlenMetadata instead of a mask, where varlen attention can run.
    """
    T = hidden.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., : past + T]  # prepared by the caller (engine.py, transformers)
    # A single new token may attend to everything that is cached. Several tokens behind a cache
    # need a mask: is_causal would align the first query with the first key.
    if attention_mask is None and position_ids is None and (past == 0 or T == 1):
        return None
    varlen = attention_mask is None and uses_varlen(config, hidden, training)
    if position_ids is not None and varlen:
        return varlen_metadata(position_ids.expand(len(hidden), T))
    mask = causal_mask(torch.arange(past, past + T, device=hidden.device)[None], past + T)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, : past + T].bool()
    if position_ids is not None:
        document = (position_ids == 0).cumsum(-1)  # [B or 1, T]: number of each token's document
        mask = mask & (document[:, None, None, :] == document[:, None, :, None])
    return mask


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Queries at `positions` [B or 1, T] of rows of S keys → bool [B or 1, 1, T, S]: a query sees
    its own key and those before it. The model, the engine and the microscope all use this."""
    keys = torch.arange(num_keys, device=positions.device)
    return (keys <= positions[..., None])[:, None]


def varlen_metadata(position_ids: Tensor) -> VarlenMetadata:
    """The documents of positions [B, T], each of which starts at 0."""
    starts = position_ids == 0
    starts[:, 0] = True  # a row never continues the document of the row before it
    cu_seqlens = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    return VarlenMetadata(cu_seqlens.int(), position_ids.shape[1])


def uses_varlen(config: MiniMindConfig, hidden: Tensor, training: bool) -> bool:
    dropout = training and config.dropout > 0  # varlen_attn has no dropout
    return config.flash_attn and not dropout and supports_varlen(hidden, config.head_dim)


def supports_varlen(hidden: Tensor, head_dim: int) -> bool:
    """Whether PyTorch's varlen_attn (FlashAttention: Ampere or newer, half precision) can run."""
    if not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return False
    half = torch.is_autocast_enabled("cuda") or hidden.dtype != torch.float32
    return half and head_dim % 8 == 0 and head_dim <= 256


# -- softmax(QKᵀ/√D)V ------------------------------------------------------------------------------


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | VarlenMetadata | None, dropout: float
) -> Tensor:
    """softmax(QKᵀ/√D)V by PyTorch's fused kernels. [B, H, T, D], [B, K, S, D] → [B, H, T, D]."""
    if isinstance(mask, VarlenMetadata):
        return varlen_attention(query, key, value, mask)
    # A single query sees all keys; is_causal would align it with the first key and hide the rest.
    causal = mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.shape[2] == 1:
        # Decoding is bound by reading the cache. As H / K queries of one head, the query heads of
        # a group share one read of their keys.
        queries = query.reshape(*key.shape[:2], -1, query.shape[3])  # [B, K, H / K, D]
        out = F.scaled_dot_product_attention(queries, key, value, mask, dropout)
        return out.reshape(query.shape)
    if grouped and mask is not None and query.is_cuda:
        # CUDA kernels take groups (flash) or a mask (memory-efficient), but not both
        key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=causal, enable_gqa=grouped
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: VarlenMetadata
) -> Tensor:
    """Causal attention within each document, rows laid end to end. Shapes as above."""
    B, H, T, D = query.shape
    # varlen_attn has grouped queries only since torch 2.12
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    query, key, value = (x.transpose(1, 2).reshape(B * T, H, D) for x in (query, key, value))
    cu_seqlens, max_seqlen = documents
    causal = (-1, 0)  # window to the left: unlimited; to the right: none
    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=causal
    )
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out.view(B, T, H, D).transpose(1, 2)


def repeat_kv(heads: Tensor, n_rep: int) -> Tensor:
    """[B, K, S, D] → [B, K · n_rep, S, D]: query head h uses key/value head h // n_rep."""
    return heads.repeat_interleave(n_rep, dim=1)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """The same, written out. The tests compare the fused kernels with it."""
    weights = attention_weights(query, key, mask)
    value = repeat_kv(value, query.shape[1] // value.shape[1])
    return F.dropout(weights, dropout) @ value


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(QKᵀ/√D), [B, H, T, D], [B, K, S, D] → [B, H, T, S]; each row sums to 1."""
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    # A dot product of D terms of variance 1 has variance D. Divided by √D, logits stay near 1 and
    # the softmax does not saturate, where it would have no gradient.
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [B, H, T, S]
    if mask is None and query.shape[2] > 1:
        mask = causal_mask(torch.arange(query.shape[2], device=scores.device)[None], key.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        # The smallest number instead of -inf: a padding query has no visible key, and a softmax
        # over -inf alone is NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)
