"""Log-probabilities of DPO's reference model: computed once for all pairs, and cached on disk.

The reference is the policy before training and never changes, so neither do its log-probabilities.
DPO thus keeps no second model in memory, and the next run on the same data and weights reads them
from the cache.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dataset.lm_dataset import FORMAT
from dataset.pairs import PairBatch, Pairs
from model.weights import atomic_write
from trainer.common.checkpoint import hash_of
from trainer.common.evaluation import over_pairs
from trainer.trainer_utils import Run, unwrapped


def completion_log_probs(model: nn.Module, batch: PairBatch) -> Tensor:
    """log p(completion | prompt) of both sides of each pair, [N, 2]."""
    outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
    return batch.sums(outputs.log_probs)


def precompute_ref_log_probs(run: Run, model: nn.Module, pairs: Pairs) -> None:
    """Set `pairs.reference` to log π_ref of each pair, by the model as it is now: before its first
    update, so that LoRA's B is still 0 and the adapter changes nothing."""
    path = cache_file(run, model, pairs)
    log_probs = read_cache(path, pairs)
    # a collective computation: if the file of one rank is missing, all ranks take part
    if run.sum_over_ranks(log_probs is not None)[0] < run.ranks:
        computed = over_pairs(run, model, pairs, completion_log_probs, "log-probs of the reference")
        log_probs = computed.cpu().numpy()
        if run.is_main:
            with atomic_write(path) as file:
                np.save(file, log_probs)
    pairs.reference = log_probs


def cache_file(run: Run, model: nn.Module, pairs: Pairs) -> Path:
    """Next to the cached tokens. Its name is a hash of all that the log-probabilities depend on:
    data, weights, architecture, device and precision."""
    model = unwrapped(model)
    state = {name: w for name, w in model.state_dict().items() if ".lora_" not in name}
    depends_on = [
        *(FORMAT, pairs.documents.info.description, hash_of(np.ascontiguousarray(pairs.chosen))),
        *(hash_of(*(weight.cpu() for weight in state.values())), model.config.to_dict()),
        *(run.device.type, str(run.dtype)),
    ]
    key = hashlib.sha256(json.dumps(depends_on, default=str).encode()).hexdigest()[:24]
    return Path(pairs.documents.cache_files[0]["filename"]).with_name(f"{key}.reference.npy")


def read_cache(path: Path, pairs: Pairs) -> np.ndarray | None:
    """None if there is no file, or it is damaged."""
    try:
        log_probs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return log_probs if log_probs.shape == pairs.reference.shape else None
