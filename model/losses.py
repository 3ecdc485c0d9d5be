"""From the last hidden states to a loss or to log-probabilities, a chunk of positions at a time:
the logits [B, T, V] of a batch would be the largest tensor of a training step.

Letters in the shape comments: B batch   T tokens   C hidden size   V vocabulary
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # label without loss: the default of F.cross_entropy
CHUNK_SIZE = 512  # positions whose logits are in memory at a time


def cross_entropy_sum(
    hidden: Tensor, head: Tensor, labels: Tensor, label_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ −w[label] · log softmax(head · h)[label] over the positions that have a label, and Σ w.

    A sum and not a mean: only the caller knows the count over all micro-batches and ranks.

    Args:
        hidden: [B, T, C]. head: [V, C]. labels: [B, T], -100 where there is none.
        label_weights: w, [V], float32. Default: 1 each, so that Σ w is the number of labels.
    """
    has_label = labels != IGNORE_INDEX
    total = has_label.sum() if label_weights is None else sum_label_weights(labels, label_weights)
    if hidden.is_cuda:  # boolean indexing would make the CPU wait for the GPU
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
    else:  # no logits for prompts and padding
        hidden, labels = hidden[has_label], labels[has_label]
    autocasts = torch.is_autocast_enabled(hidden.device.type)
    fused = (
        len(labels) > hidden.shape[-1]  # chunking pays from here on (PyTorch's documentation)
        and hidden.dtype == torch.float32  # in half precision it would also sum in half precision
        and hasattr(F, "linear_cross_entropy")  # since torch 2.13
        and not autocasts  # which it does not support
    )
    if fused:  # in chunks: [B·T, V] is never in memory as a whole
        # on a CPU, larger chunks than PyTorch's default make faster matrix products (RECIPE_LOG.md)
        rows = CHUNK_SIZE if hidden.device.type == "cpu" else None
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = F.linear_cross_entropy(
            hidden, head, labels, weight=label_weights, reduction="sum", options=options
        )
    elif autocasts and hidden.device.type == "cpu":
        weights = None if label_weights is None else label_weights[labels]
        loss = ChunkedCrossEntropy.apply(
            hidden, head, labels, weights, torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()
        )
    else:
        # The softmax needs float32: in bfloat16 a sum of 6,400 exponentials loses the small ones.
        logits = F.linear(hidden, head).float()
        loss = F.cross_entropy(logits, labels, weight=label_weights, reduction="sum")
    return loss, total


class ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −w · log softmax(head · h)[label], with matrix products in `dtype` and all sums in float32.

    The gradient of the logits is softmax − one-hot, so it is known as soon as they are: each chunk
    of positions makes its part of both gradients in the forward pass, and its logits are dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, C]
        head: Tensor,  # [V, C]
        labels: Tensor,  # [N]
        weights: Tensor | None,  # [N]
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> Tensor:
        half, half_head = hidden.to(dtype), head.to(dtype)
        wanted = [with_gradient and each for each in ctx.needs_input_grad[:2]]
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        head_grad = torch.zeros_like(head) if wanted[1] else None  # not for a frozen head
        loss = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(labels), CHUNK_SIZE):
                rows = slice(start, start + CHUNK_SIZE)
                logits = (half[rows] @ half_head.mT).float()
                log_probs = logits.log_softmax(-1)
                each = -log_probs.gather(1, labels[rows, None])
                scale = 1.0 if weights is None else weights[rows, None]
                loss += (each * scale).sum()
                if not any(wanted):
                    continue
                grad = log_probs.exp_()
                grad.scatter_add_(1, labels[rows, None], grad.new_full(each.shape, -1.0))
                grad = (grad * scale if weights is not None else grad).to(dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = grad @ half_head
                if head_grad is not None:
                    head_grad += grad.mT @ half[rows]
        ctx.save_for_backward(hidden_grad, head_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = [each if each is None else each * grad_outputs[0] for each in ctx.saved_tensors]
        return *grads, None, None, None, None


def sum_label_weights(labels: Tensor, label_weights: Tensor) -> Tensor:
    """Σ w[label] over the positions that have a label."""
    return (label_weights[labels.clamp(min=0)] * (labels != IGNORE_INDEX)).sum()


def token_log_probs(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log softmax(head · h / temperature)[label] at each position, 0 where there is no label.

    Each chunk's logits are recomputed in the backward pass: [B, T, V] is never in memory. The
    logits are divided by the temperature of sampling, so that these are the log-probs of the
    distribution that the tokens were drawn from.

    Args:
        hidden: [B, T, C]. head: [V, C]. labels: [B, T], -100 where there is none.

    Returns:
        [B, T], float32.
    """

    def chunk_log_probs(states: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(states, head).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    has_label = labels != IGNORE_INDEX
    states, targets = hidden[has_label].split(CHUNK_SIZE), labels[has_label].split(CHUNK_SIZE)
    chunks = zip(states, targets, strict=True)
    parts = [checkpoint(chunk_log_probs, *chunk, use_reentrant=False) for chunk in chunks]
    zeros = torch.zeros(labels.shape, device=labels.device)
    return zeros.masked_scatter(has_label, torch.cat(parts))


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

    The logits of both models are computed in chunks, and again in the backward pass: [B, T, V] is
    never in memory, let alone twice.

    Args:
        hidden: [B, T, C]. head: [V, C]. The teacher's may have another C and get no gradient.
        labels: [B, T], -100 where there is none.
        divergence: of two log-probs [N, V], summed over positions and vocabulary.
    """

    def chunk_divergence(states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = log_probs(teacher_states, teacher_head)
        return divergence(teacher, log_probs(states, head))

    def log_probs(states: Tensor, head: Tensor) -> Tensor:
        return (F.linear(states, head).float() / temperature).log_softmax(-1)  # [N, V]

    has_label = labels != IGNORE_INDEX
    states, teacher_states = (x[has_label].split(CHUNK_SIZE) for x in (hidden, teacher_hidden))
    chunks = zip(states, teacher_states, strict=True)
    return torch.stack(
        [checkpoint(chunk_divergence, *chunk, use_reentrant=False) for chunk in chunks]
    ).sum()
