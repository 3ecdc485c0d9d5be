"""How good is the model now: held-out loss, bits per byte, a sample of its text."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from dataset.lm_dataset import encode_chat, token_bytes
from dataset.packing import IGNORED, Rows, collate
from dataset.pairs import Pairs, collate_pairs
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.losses import cross_entropy_sum
from trainer.common.hardware import autocast
from trainer.trainer_utils import Run, unwrapped


def uncompiled(evaluate: Callable) -> Callable:
    """Blocks are compiled for training; caches and other shapes would each be compiled anew."""

    @wraps(evaluate)
    def evaluate_eagerly(run: Run, *args, **settings) -> Any:
        with run.compiler("force_eager"):
            return evaluate(run, *args, **settings)

    return evaluate_eagerly


@uncompiled
@torch.no_grad()
def held_out_loss(run: Run, model: nn.Module, rows: Rows) -> dict[str, float]:
    """Loss on held-out rows, which all ranks share out between them.

    Returns:
        val_loss: nats per trained token.
        val_bpb: bits per UTF-8 byte of the trained text, control tokens left out of both; unlike
            the loss it can be compared between tokenizers.
    """
    model = unwrapped(model)
    sizes = token_bytes(run.tokenizer).to(run.device)
    text_loss = control_loss = text_bytes = labelled = 0.0
    model.eval()
    mine = range(run.rank, len(rows), run.ranks)
    for at in range(0, len(mine), run.args.batch_size):
        chunk = mine[at : at + run.args.batch_size]
        batch = collate([rows[row] for row in chunk], run.tokenizer.pad_token_id).to(run.device)
        with autocast(run.device, run.dtype):
            hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
            is_text = (batch.labels != IGNORED) & (sizes[batch.labels.clamp(min=0)] > 0)
            text, control = (
                sum_of_loss(model, hidden, batch.labels.masked_fill(~kept, IGNORED))
                for kept in (is_text, ~is_text)
            )
        text_loss, control_loss = text_loss + text, control_loss + control
        text_bytes += sizes[batch.labels[is_text]].sum().item()
        labelled += batch.labelled
    model.train()
    text_loss, control_loss, text_bytes, labelled = run.sum_over_ranks(
        text_loss, control_loss, text_bytes, labelled
    )
    return {
        "val_loss": (text_loss + control_loss) / max(1, labelled),
        "val_bpb": text_loss / math.log(2) / max(1, text_bytes),
    }


@uncompiled
@torch.no_grad()
def over_pairs(
    run: Run, model: nn.Module, pairs: Pairs, of_batch: Callable, title: str = ""
) -> Tensor:
    """What `of_batch(model, batch)` gives for both sides of every pair, [pairs, 2]; the ranks share
    the pairs out between them. With a title, under a progress bar."""
    model = unwrapped(model)
    found = torch.zeros(len(pairs), 2, device=run.device)
    order = np.argsort(pairs.lengths.max(1), kind="stable")  # little padding
    starts = range(0, len(pairs), run.args.batch_size)[run.rank :: run.ranks]
    model.eval()
    for at in tqdm(starts, desc=title, leave=False, disable=not (title and run.is_main)):
        some = order[at : at + run.args.batch_size]
        batch = collate_pairs([pairs[pair] for pair in some], run.tokenizer.pad_token_id)
        with run.memory_watched(), autocast(run.device, run.dtype):
            found[some] = of_batch(model, batch.to(run.device)).float()
    model.train()
    if run.ranks > 1:
        dist.all_reduce(found)
    return found


def pair_figures(values: Tensor, pairs: int) -> dict[str, Tensor]:
    """How often and by how much the chosen side is valued higher.

    Args:
        values: [N, 2], such as rewards of chosen and rejected.
        pairs: what sums are divided by: N, or how many pairs all ranks have.
    """
    chosen, rejected = values.unbind(1)
    figures = dict(accuracy=chosen > rejected, margin=chosen - rejected)
    figures |= dict(chosen_reward=chosen, rejected_reward=rejected)
    return {name: figure.sum() / pairs for name, figure in figures.items()}


def sum_of_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> float:
    loss, _ = cross_entropy_sum(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
    return loss.item()


@uncompiled
def continuation(run: Run, model: nn.Module, rows: Rows, length: int = 40) -> str:
    """The beginning of the first held-out document, and how the model goes on from there."""
    if not run.is_main:
        return ""
    ids = rows[0][0]["input_ids"].tolist()
    prompt = ids[: max(1, min(12, len(ids) // 2))]
    (reply,) = generate(unwrapped(model), [prompt], Sampling(max_new_tokens=length, temperature=0))
    shown = run.tokenizer.decode(prompt[1:])
    return f"{shown} ▸{run.tokenizer.decode(reply, skip_special_tokens=True)}"


@uncompiled
def answer(run: Run, model: nn.Module, question: str, length: int = 60) -> str:
    """A question to the assistant, and its answer."""
    if not run.is_main:
        return ""
    messages = [{"role": "user", "content": question}]
    prompt = encode_chat(run.tokenizer, messages, add_generation_prompt=True).ids
    (reply,) = generate(unwrapped(model), [prompt], Sampling(max_new_tokens=length, temperature=0))
    return f"{question} ▸ {run.tokenizer.decode(reply, skip_special_tokens=True)}"
