"""From the last hidden states to a loss or to log-probabilities, without all logits in memory.

Letters in the shape comments: B batch   T tokens   C hidden size   V vocabulary
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a label that carries no loss, as everywhere in PyTorch
CHUNK_SIZE = 512  # positions whose logits stand in memory at a time


def cross_entropy_sum(
    hidden: Tensor, head: Tensor, labels: Tensor, label_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ −w[label] · log softmax(head · h)[label] over the positions that have a label, and Σ w.

    Args:
        hidden: [B, T, C]. head: [V, C]. labels: [B, T], -100 where there is none.
        label_weights: w, [V], float32. Default: 1 each, so that Σ w is the number of labels.
    """
    chosen = labels != IGNORE_INDEX
    total = chosen.sum() if label_weights is None else sum_label_weights(labels, label_weights)
    if hidden.is_cuda:  # to pick positions out, the CPU would have to wait for the GPU
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
    else:
        hidden, labels = hidden[chosen], labels[chosen]  # no logits for what carries no loss
    fused = (
        len(labels) > hidden.shape[-1]  # where PyTorch says that chunking pays
        and hidden.dtype == torch.float32  # it would sum in half precision
        and hasattr(F, "linear_cross_entropy")  # since torch 2.13
        and not torch.is_autocast_enabled(hidden.device.type)  # it knows nothing of autocast
    )
    if fused:  # in chunks, so that [B·T, V] never stands in memory as a whole
        # on a CPU, larger chunks than PyTorch's choice make faster matrix products (RECIPE_LOG.md)
        rows = CHUNK_SIZE if hidden.device.type == "cpu" else None
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = F.linear_cross_entropy(
            hidden, head, labels, weight=label_weights, reduction="sum", options=options
        )
    else:
        logits = F.linear(hidden, head).float()
        loss = F.cross_entropy(logits, labels, weight=label_weights, reduction="sum")
    return loss, total


def sum_label_weights(labels: Tensor, label_weights: Tensor) -> Tensor:
    """Σ w[label] over the positions that have a label."""
    return (label_weights[labels.clamp(min=0)] * (labels != IGNORE_INDEX)).sum()


def token_log_probs(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log softmax(head · h / temperature)[label] at each position, 0 where there is no label.

    The logits of a chunk are made anew for its gradient: [B, T, V] never stands in memory.

    Args:
        hidden: [B, T, C]. head: [V, C]. labels: [B, T], -100 where there is none.

    Returns:
        [B, T], float32.
    """

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(states, head).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    chosen = labels != IGNORE_INDEX
    chunks = zip(hidden[chosen].split(CHUNK_SIZE), labels[chosen].split(CHUNK_SIZE), strict=True)
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    zeros = torch.zeros(labels.shape, device=labels.device)
    return zeros.masked_scatter(chosen, torch.cat(parts))


def divergence_sum(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    temperature: float,
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Σ divergence(log p_teacher, log p_student) over the positions that have a label, where p is
    softmax(head · h / temperature).

    The logits of both are made a chunk at a time, and anew for the chunk's gradient: [B, T, V]
    never stands in memory, let alone twice.

    Args:
        hidden: [B, T, C]. head: [V, C]. The teacher's may have another C, and get no gradient.
        labels: [B, T], -100 where there is none.
        divergence: of two [N, V], summed over both.
    """

    def of_chunk(states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = log_probs(teacher_states, teacher_head)
        return divergence(teacher, log_probs(states, head))

    def log_probs(states: Tensor, head: Tensor) -> Tensor:
        return (F.linear(states, head).float() / temperature).log_softmax(-1)  # [N, V]

    chosen = labels != IGNORE_INDEX
    chunks = zip(
        hidden[chosen].split(CHUNK_SIZE), teacher_hidden[chosen].split(CHUNK_SIZE), strict=True
    )
    return torch.stack(
        [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    ).sum()
