"""What a run must remember to go on as if it had never stopped: `checkpoints/`, for --resume.

A checkpoint holds weights and optimizer in float32, every random state, the place in the data, the
log, and the identity of the run: its arguments, the model's config, and hashes of data and
tokenizer, so that another run is not taken for this one.
"""

import hashlib
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.packing import Rows
from model.errors import UserError
from model.weights import halves, tokenizer_hash

PARTS = set(
    "model optimizer scaler random progress pending records identity rows_per_update".split()
)
# Arguments that may differ when a run goes on: where things lie, what is shown, how an update is
# cut into batches. Data, tokenizer and first weights are compared by what they hold.
MAY_CHANGE = set(
    "recipe resume from_resume device num_workers log_interval eval_interval save_interval "
    "save_dir checkpoint_dir use_wandb wandb_project val_documents gradient_checkpointing compile "
    "batch_size accumulation_steps data_path val_path tokenizer_path sample_prompt "
    "rollout_batch_size update_batch_size rollout_url rollout_folder rollout_reload "
    "reward_model_path judge_url".split()
)


def identity_of(
    args: Any,
    stage: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
) -> dict[str, Any]:
    """What makes a run this one and no other.

    Args:
        model: as it is before the first update. Only loaded weights count, since new ones follow
            from the seed.
        rows: what is trained: all of the data, or without a held-out share of it.
    """
    arguments = {name: value for name, value in asdict(args).items() if name not in MAY_CHANGE}
    sizes = {name: getattr(model.config, name) for name in type(model.config).__annotations__}
    loaded = args.from_weight != "none"
    return {
        **arguments,
        **sizes,
        "stage": stage,
        "data": rows.description,
        "documents trained": hash_of(np.ascontiguousarray(rows.chosen)),
        "tokenizer": tokenizer_hash(tokenizer),
        "first weights": hash_of(*halves(model.state_dict()).values()) if loaded else "new",
    }


def hash_of(*arrays: np.ndarray | Tensor) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.asarray(array).data)
    return sha.hexdigest()[:16]


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the run of that identity.

    Raises:
        UserError: the file cannot be read or is no checkpoint, or is another run's (which names
            the first thing that differs).
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = PARTS - checkpoint.keys()
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(f"{path} is damaged; start anew without --resume") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of this version: it lacks {min(missing)}")
    for name, then in checkpoint["identity"].items():
        now = identity.get(name, then)
        if now != then:
            raise UserError(
                f"{path} was made with {name} {then!r}, and this run has {now!r}; give the same, "
                "or start anew without --resume"
            )
    return checkpoint


# -- random states ---------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator, in types that torch.load reads with weights_only."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "device": generator_of(device).get_rng_state() if device.type != "cpu" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        generator_of(device).set_rng_state(state["device"])


def generator_of(device: torch.device) -> Any:
    """torch.cuda or torch.mps, which have the state of the current GPU's generator."""
    return getattr(torch, device.type)


# -- what rounding leaves of a training ------------------------------------------------------------


def stored_values(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters as a weight file holds them."""
    parameters = model.named_parameters()
    return halves({name: each for name, each in parameters if each.requires_grad})


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is frozen."""
    return {
        name: each.detach()
        for name, each in model.state_dict(keep_vars=True).items()
        if each.requires_grad or not isinstance(each, nn.Parameter)
    }


def changed_share(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The share of the stored values that are no longer what they were.

    Near a weight of 0.05 float16 knows steps of 3e-5: a training whose updates add up to less than
    that leaves the file as it was, whatever its loss said.
    """
    changed = sum(int((after[name] != old).sum()) for name, old in before.items())
    return changed / max(1, sum(old.numel() for old in before.values()))
