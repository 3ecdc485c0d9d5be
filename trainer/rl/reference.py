"""What the reference model says of preference pairs: computed once, and kept on disk.

The reference never changes, so neither do its log-probabilities: DPO needs no second model beside
the one that it trains, and the next run on the same data and weights finds them there.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dataset.lm_dataset import CACHE_VERSION
from dataset.pairs import PairBatch, Pairs
from model.weights import atomic_write
from trainer.common.checkpoint import hash_of
from trainer.common.evaluation import over_pairs
from trainer.trainer_utils import Run, unwrapped


def completion_log_probs(model: nn.Module, batch: PairBatch) -> Tensor:
    """log p(completion | prompt) of both sides of each pair, [N, 2]."""
    outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
    return batch.sums(outputs.log_probs)


def add_reference(run: Run, model: nn.Module, pairs: Pairs) -> None:
    """Give each pair its log-probabilities by the model as it is now; LoRA's additions must still
    be nothing."""
    path = reference_file(run, model, pairs)
    known = read_reference(path, pairs)
    if run.sum_over_ranks(known is not None)[0] < run.ranks:
        found = over_pairs(run, model, pairs, completion_log_probs, "log-probs of the reference")
        known = found.cpu().numpy()
        if run.is_main:
            with atomic_write(path) as file:
                np.save(file, known)
    pairs.reference = known


def reference_file(run: Run, model: nn.Module, pairs: Pairs) -> Path:
    """Beside the cached tokens, named after all that the log-probabilities depend on."""
    model = unwrapped(model)
    state = {name: w for name, w in model.state_dict().items() if ".lora_" not in name}
    depends = [
        *(
            CACHE_VERSION,
            pairs.documents.info.description,
            hash_of(np.ascontiguousarray(pairs.chosen)),
        ),
        *(hash_of(*(weight.cpu() for weight in state.values())), model.config.to_dict()),
        *(run.device.type, str(run.dtype)),
    ]
    key = hashlib.sha256(json.dumps(depends, default=str).encode()).hexdigest()[:24]
    return Path(pairs.documents.cache_files[0]["filename"]).with_name(f"{key}.reference.npy")


def read_reference(path: Path, pairs: Pairs) -> np.ndarray | None:
    """None where there is no file, or a damaged one."""
    try:
        known = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return known if known.shape == pairs.reference.shape else None
