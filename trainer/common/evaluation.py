"""How good is the model now: held-out loss, bits per byte, a sample of its text; and what DPO's
reference says of the preference pairs."""

import hashlib
import json
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import CACHE_VERSION, encode_chat, token_bytes
from dataset.packing import IGNORE_INDEX, PackedDataset, collate
from dataset.pairs import PreferenceBatch, PreferenceDataset, collate_pairs
from model.errors import UserError
from model.formats.files import add_checksum, atomic_write, verify
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.losses import cross_entropy_sum
from model.model_minimind import MiniMindForCausalLM
from trainer.common.checkpoint import hash_of
from trainer.common.context import Context, ModelT, unwrap
from trainer.common.hardware import oom_guard

FunctionT = TypeVar("FunctionT", bound=Callable)


def eager(evaluate: FunctionT) -> FunctionT:
    """Run without compiled blocks: they are compiled for the shapes of training, and a KV cache or
    another shape would start a new compilation. The function's first argument is the context."""

    @wraps(evaluate)
    def evaluate_eagerly(ctx: Context, *args, **settings) -> Any:
        with ctx.compiler_stance("force_eager"):
            return evaluate(ctx, *args, **settings)

    return cast(FunctionT, evaluate_eagerly)


@eager
@torch.no_grad()
def evaluate_loss(
    ctx: Context,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: PackedDataset,
) -> dict[str, float]:
    """Loss on held-out sequences; each rank evaluates a part of them.

    Returns:
        eval_loss: nats per label token.
        eval_bpb: bits per UTF-8 byte of the text that carries loss, without control tokens. Unlike
            the loss, it can be compared between tokenizers.
    """
    model = unwrap(model)
    sizes = token_bytes(tokenizer).to(ctx.device)  # [V], 0 for control tokens
    text_loss = control_loss = text_bytes = num_label_tokens = 0.0
    model.eval()
    local = range(ctx.rank, len(data), ctx.world_size)
    for at in range(0, len(local), ctx.args.batch_size):
        sequences = [data[index] for index in local[at : at + ctx.args.batch_size]]
        batch = collate(sequences, tokenizer.pad_token_id).to(ctx.device)
        with ctx.autocast():
            hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
            is_text = (batch.labels != IGNORE_INDEX) & (sizes[batch.labels.clamp(min=0)] > 0)
            text, control = (
                sum_of_loss(model, hidden, batch.labels.masked_fill(~kept, IGNORE_INDEX))
                for kept in (is_text, ~is_text)
            )
        text_loss, control_loss = text_loss + text, control_loss + control
        text_bytes += sizes[batch.labels[is_text]].sum().item()
        num_label_tokens += batch.num_label_tokens
    model.train()
    if data.label_bytes is not None:  # of all ranks together
        text_bytes = data.label_bytes if ctx.is_main else 0
    text_loss, control_loss, text_bytes, num_label_tokens = ctx.all_reduce_sum(
        text_loss, control_loss, text_bytes, num_label_tokens
    )
    return {
        "eval_loss": (text_loss + control_loss) / max(1, num_label_tokens),
        "eval_bpb": text_loss / math.log(2) / max(1, text_bytes),
    }


def sum_of_loss(model: MiniMindForCausalLM, hidden: Tensor, labels: Tensor) -> float:
    loss, _ = cross_entropy_sum(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
    return loss.item()


@eager
@torch.no_grad()
def map_pairs(
    ctx: Context,
    model: ModelT,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PreferenceDataset,
    function: Callable[[ModelT, PreferenceBatch], Tensor],
    title: str = "",
    oom_hint: str = "try a smaller one",
) -> Tensor:
    """`function(model, batch)` of both sides of every pair, [pairs, 2], on all ranks; each rank
    computes a part of the pairs. With a title there is a progress bar."""
    model = unwrap(model)
    values = torch.zeros(len(pairs), 2, device=ctx.device)
    order = np.argsort(pairs.lengths.max(1), kind="stable")  # similar lengths: little padding
    starts = range(0, len(pairs), ctx.args.batch_size)[ctx.rank :: ctx.world_size]
    model.eval()
    for at in tqdm(starts, desc=title, leave=False, disable=not (title and ctx.is_main)):
        some = order[at : at + ctx.args.batch_size]
        batch = collate_pairs([pairs[index] for index in some], tokenizer.pad_token_id)
        with oom_guard(ctx.args, oom_hint), ctx.autocast():
            values[some] = function(model, batch.to(ctx.device)).float()
    model.train()
    if ctx.world_size > 1:
        dist.all_reduce(values)  # a pair's values are 0 on all ranks but the one that computed them
    return values


@eager
def sample_continuation(
    ctx: Context,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: PackedDataset,
    length: int = 40,
) -> str:
    """The beginning of the first held-out document, and the model's greedy continuation."""
    if not ctx.is_main:
        return ""
    ids = data[0][0]["input_ids"].tolist()
    prompt = ids[: max(1, min(12, len(ids) // 2))]
    greedy = SamplingParams(max_new_tokens=length, temperature=0)
    (reply,) = generate(unwrap(model), [prompt], greedy)
    shown = tokenizer.decode(prompt, skip_special_tokens=True)
    return f"{shown} ▸{tokenizer.decode(reply, skip_special_tokens=True)}"


@eager
def sample_answer(
    ctx: Context,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    length: int = 60,
) -> str:
    """A question to the assistant, and its greedy answer."""
    if not ctx.is_main:
        return ""
    messages = [{"role": "user", "content": question}]
    prompt = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
    greedy = SamplingParams(max_new_tokens=length, temperature=0)
    (reply,) = generate(unwrap(model), [prompt], greedy)
    return f"{question} ▸ {tokenizer.decode(reply, skip_special_tokens=True)}"


# -- log-probs of a reference, computed once and kept on disk --------------------------------------


def completion_log_probs(model: MiniMindForCausalLM, batch: PreferenceBatch) -> Tensor:
    """log p(completion | prompt) of both sides of each pair, [N, 2]."""
    outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
    return batch.sum_log_probs(outputs.log_probs)


def precompute_ref_log_probs(
    ctx: Context,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PreferenceDataset,
    oom_hint: str,
) -> None:
    """Give each pair its log-probabilities by the model as it is now. A LoRA adapter must still be
    0.

    The reference never changes, so neither do its log-probabilities: DPO needs no second model in
    memory, and the next run with the same data and weights reads them from the file.
    """
    path = cache_file(ctx, model, pairs)
    log_probs = read_cache(path, pairs)
    cached_ranks = ctx.all_reduce_sum(log_probs is not None)[0]
    if log_probs is None or cached_ranks < ctx.world_size:  # if it is missing on some rank
        title = "log-probs of the reference"
        values = map_pairs(ctx, model, tokenizer, pairs, completion_log_probs, title, oom_hint)
        log_probs = values.cpu().numpy()
        if ctx.is_main:
            with atomic_write(path) as file:
                np.save(file, log_probs)
                add_checksum(file)
    pairs.ref_log_probs = log_probs


def cache_file(ctx: Context, model: MiniMindForCausalLM, pairs: PreferenceDataset) -> Path:
    """Beside the cached tokens, named after all that the log-probabilities depend on."""
    model = unwrap(model)
    state = {name: w for name, w in model.state_dict().items() if ".lora_" not in name}
    depends = [
        *(CACHE_VERSION, pairs.fingerprint, hash_of(np.ascontiguousarray(pairs.indices))),
        *(hash_of(*(weight.cpu() for weight in state.values())), model.config.to_dict()),
        *(ctx.device.type, str(ctx.dtype)),
    ]
    key = hashlib.sha256(json.dumps(depends, default=str).encode()).hexdigest()[:24]
    return Path(pairs.documents.cache_files[0]["filename"]).with_name(f"{key}.reference.npy")


def read_cache(path: Path, pairs: PreferenceDataset) -> np.ndarray | None:
    """None where there is no file, or a damaged one."""
    try:
        if not verify(path, "it is computed again"):
            return None
        log_probs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, UserError):
        return None
    return log_probs if log_probs.shape == pairs.ref_log_probs.shape else None
