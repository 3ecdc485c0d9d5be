"""Attention: which keys a query may see, and softmax(QKᵀ/√D)V in three ways.

Letters in the shape comments, as in model_minimind.py:
    B batch   T tokens fed now   S tokens attended to (cached + T)
    H query heads   K key/value heads   D size of a head
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class VarlenMetadata(NamedTuple):
    """The documents of packed rows, all rows laid end to end: what varlen attention takes instead
    of a mask, so that it computes nothing between documents."""

    cu_seqlens: Tensor  # [documents + 1], int32: where each begins, and where the last ends
    max_seqlen: int  # no document has more tokens


# -- which keys a query may see --------------------------------------------------------------------


def make_attention_mask(
    hidden: Tensor,
    past: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    varlen: bool = False,
) -> Tensor | VarlenMetadata | None:
    """Which keys each query may see, as a bool mask [B or 1, 1, T, S], True = visible.

    None, the fast path, means all earlier positions (causal). Beyond causality, padding is hidden
    (attention_mask [B, S]), and so are the other documents of a packed row (position_ids, [B or 1,
    T], that restart at 0; given when nothing is cached). With `varlen`, the documents are returned
    as VarlenMetadata instead of a mask.
    """
    T = hidden.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., : past + T]  # transformers prepared it already
    packed = position_ids is not None
    if attention_mask is None and not packed and (past == 0 or T == 1):
        return None
    if packed and attention_mask is None and varlen:
        return varlen_metadata(position_ids.expand(len(hidden), T))
    steps = torch.arange(past + T, device=hidden.device)
    mask = (steps <= steps[past:, None])[None]  # [1, T, S]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, : past + T].bool()
    if packed:
        document = (position_ids == 0).cumsum(-1)
        mask = mask & (document[:, None, :] == document[:, :, None])
    return mask[:, None]


def varlen_metadata(position_ids: Tensor) -> VarlenMetadata:
    """Positions [B, T] that restart at 0 with each document; a row begins one in any case."""
    starts = position_ids == 0
    starts[:, 0] = True
    cu_seqlens = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    return VarlenMetadata(cu_seqlens.int(), position_ids.shape[1])


def supports_varlen(hidden: Tensor, head_dim: int) -> bool:
    """Whether PyTorch's varlen attention, which is FlashAttention, can compute this."""
    if not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return False
    half = torch.is_autocast_enabled("cuda") or hidden.dtype != torch.float32
    return half and head_dim % 8 == 0 and head_dim <= 256


# -- the three ways --------------------------------------------------------------------------------


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | VarlenMetadata | None, dropout: float
) -> Tensor:
    """softmax(QKᵀ/√D)V by PyTorch's fused kernels. [B, H, T, D], [B, K, S, D] → [B, H, T, D]."""
    if isinstance(mask, VarlenMetadata):
        return varlen_attention(query, key, value, mask)
    # A query that stands alone sees all keys; is_causal would align it with the first of them.
    causal = mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.shape[2] == 1:
        # A new token: the query heads of a group are to the kernel so many queries of one head,
        # and it reads each key once for all of them.
        queries = query.reshape(*key.shape[:2], -1, query.shape[3])  # [B, K, H / K, D]
        out = F.scaled_dot_product_attention(queries, key, value, mask, dropout)
        return out.reshape(query.shape)
    if grouped and mask is not None and query.is_cuda:
        # CUDA's kernels know groups (flash) or masks (memory-efficient), but not both
        key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=causal, enable_gqa=grouped
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: VarlenMetadata
) -> Tensor:
    """The same for documents end to end, each of which sees itself alone. Shapes as above."""
    B, H, T, D = query.shape
    # varlen_attn knows groups since torch 2.12 only
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    query, key, value = (x.transpose(1, 2).reshape(B * T, H, D) for x in (query, key, value))
    cu_seqlens, max_seqlen = documents
    causal = (-1, 0)  # a window: all keys before, none after
    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=causal
    )
    return out.view(B, T, H, D).transpose(1, 2)


def repeat_kv(heads: Tensor, n_rep: int) -> Tensor:
    """[B, K, S, D] → [B, H, S, D]: query head h reads key/value head h // (H / K)."""
    return heads.repeat_interleave(n_rep, dim=1)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """The same, written out: the reference that the tests compare the fused kernels with."""
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [B, H, T, S]
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # not -inf: a padding row sees nothing at all, and softmax of only -inf is NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ value
