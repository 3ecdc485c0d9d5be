"""The reference model's log-probabilities of preference pairs: computed once, and kept on disk.

The reference never changes, so neither do its log-probabilities: DPO needs no second model in
memory, and the next run with the same data and weights reads them from the file.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import CACHE_VERSION
from dataset.pairs import PreferenceBatch, PreferenceDataset
from model.model_minimind import MiniMindForCausalLM
from model.weights import atomic_write
from trainer.common.checkpoint import hash_of
from trainer.common.context import Context, unwrap
from trainer.common.evaluation import map_pairs


def completion_log_probs(model: MiniMindForCausalLM, batch: PreferenceBatch) -> Tensor:
    """log p(completion | prompt) of both sides of each pair, [N, 2]."""
    outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
    return batch.sum_log_probs(outputs.log_probs)


def precompute_ref_log_probs(
    ctx: Context,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PreferenceDataset,
) -> None:
    """Give each pair its log-probabilities by the model as it is now. A LoRA adapter must still be
    0."""
    path = cache_file(ctx, model, pairs)
    log_probs = read_cache(path, pairs)
    cached_ranks = ctx.all_reduce_sum(log_probs is not None)[0]
    if log_probs is None or cached_ranks < ctx.world_size:  # if it is missing on some rank
        title = "log-probs of the reference"
        values = map_pairs(ctx, model, tokenizer, pairs, completion_log_probs, title)
        log_probs = values.cpu().numpy()
        if ctx.is_main:
            with atomic_write(path) as file:
                np.save(file, log_probs)
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
        log_probs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return log_probs if log_probs.shape == pairs.ref_log_probs.shape else None
