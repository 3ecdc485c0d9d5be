"""Checkpoints: what a run needs to go on as if it had never stopped (`checkpoints/`, --resume).

A checkpoint holds weights and optimizer in float32, the random states of all ranks, the position in
the data, the log, and the run's fingerprint (arguments, model config, hashes of data and
tokenizer), so that another run's checkpoint is refused.
"""

import hashlib
import os
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import NotRequired, TypedDict  # typing's since Python 3.11

from dataset.packing import TrainingData
from model.command_line import names_where
from model.errors import UserError
from model.weights import atomic_write, to_fp16_cpu, tokenizer_hash
from trainer.common.context import Context
from trainer.common.metrics import Accumulator, MetricLog
from trainer.report.old_keys import with_new_keys

MAX_SKIPPED_IN_A_ROW = 5  # steps without a finite gradient that end a run


class Checkpoint(TypedDict):
    """What the file holds."""

    model: dict[str, Tensor]  # trainable weights, float32
    optimizer: list[dict[str, Any]]
    scaler: dict[str, Any]
    rng_states: list[dict[str, Any]]  # of each rank
    progress: dict[str, Any]
    metrics: dict[str, Any]  # since the last log line
    history: list[dict[str, Any]]  # the lines of the log
    fingerprint: dict[str, Any]
    global_batch_size: int
    total_steps: NotRequired[int]  # since 2026-11
    extra_state: NotRequired[Any]


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps
    max_steps: int = 0  # that --minutes has chosen; 0: none
    samples_seen: int = 0  # position in the data, all epochs together
    tokens: int = 0  # trained, without padding
    seconds: float = 0.0  # of training, without evaluation and saving
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)  # the latest
    changed_fraction: float | None = None  # of the float16 weights, since the start
    tracker_id: str | None = None  # under which the tracker knows the run

    def add(self, since_line: Accumulator) -> None:
        """Count the tokens and seconds since the last log line."""
        self.tokens += since_line.tokens
        self.seconds += since_line.seconds

    def position(self) -> dict[str, Any]:
        """What every record of the log begins with."""
        return {"step": self.step, "num_tokens": self.tokens, "seconds": round(self.seconds, 2)}

    def skip_step(self, scaled: bool, print: Callable[[str], None]) -> None:
        """Count a step whose gradient is not finite; several in a row raise a UserError.

        `scaled`: float16's loss scale starts at 2^16 and is halved at each overflow until it fits,
        so that some skipped steps are normal.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        if not scaled:
            print(f"step {self.step} is skipped: its gradient is not finite")
        allowed = MAX_SKIPPED_IN_A_ROW + 16 * scaled
        if self.skipped_in_a_row == allowed:
            raise UserError(
                f"{allowed} steps in a row had no finite gradient, the last was step {self.step}; "
                "try a lower --learning_rate, more --warmup_steps, or --dtype float32"
            )


def fingerprint_of(
    args: Any,
    stage: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
) -> dict[str, Any]:
    """What tells this run from any other.

    Args:
        model: before its first step. Only loaded weights are hashed: random ones follow from the
            seed.
    """
    # data, tokenizer and first weights are compared by what they hold, wherever they lie
    may_differ = names_where(type(args), "may_differ", True)
    arguments = {name: value for name, value in asdict(args).items() if name not in may_differ}
    sizes = {name: getattr(model.config, name) for name in type(model.config).__annotations__}
    loaded = args.from_weight != "none"
    return {
        **arguments,
        **sizes,
        "stage": stage,
        "data": data.fingerprint,
        "documents trained": hash_of(np.ascontiguousarray(data.indices)),
        "tokenizer": tokenizer_hash(tokenizer),
        "first weights": hash_of(*to_fp16_cpu(model.state_dict()).values()) if loaded else "new",
    }


def hash_of(*arrays: np.ndarray | Tensor) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.asarray(array).data)
    return sha.hexdigest()[:16]


# -- writing and reading ---------------------------------------------------------------------------


def check_writable(*directories: str) -> None:
    """UserError now, rather than after hours of training."""
    for directory in directories:
        try:
            os.makedirs(directory, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Any,
    scaler: Any,
    progress: Progress,
    metrics: MetricLog,
    extra_state: Any = None,
    **plain: Any,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        extra_state: what else the algorithm must remember; has a state_dict().
        plain: the other parts, as they are: rng_states, fingerprint, global_batch_size,
            total_steps.
    """
    checkpoint = {
        "model": trainable_state(model),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "progress": asdict(progress),
        "metrics": metrics.state_dict(),
        "history": metrics.history,
        "extra_state": extra_state and extra_state.state_dict(),
        **plain,
    }
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the run with this fingerprint; `restore` puts it to use.

    Raises:
        UserError: the file cannot be read or is no checkpoint, or is another run's (names the first
            thing that differs).
    """
    try:
        checkpoint = upgrade(torch.load(path, map_location="cpu", weights_only=True))
        missing = Checkpoint.__required_keys__ - checkpoint.keys()
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(f"{path} is damaged; start anew without --resume") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of this version: it lacks {min(missing)}")
    for name, then in checkpoint["fingerprint"].items():
        now = fingerprint.get(name, then)
        if now != then:
            raise UserError(
                f"{path} was made with {name} {then!r}, and this run has {now!r}; give the same, "
                f"or {how_to_train_on(path, fingerprint['stage'])}"
            )
    return checkpoint


def how_to_train_on(path: Path, stage: str) -> str:
    """How another run may follow one whose settings cannot change any more: its schedule, order of
    data and optimizer state are made for them."""
    weight = re.sub(r"_[0-9]+(_moe)?[.]checkpoint[.]pt$", "", path.name)
    if stage.startswith("lora/") or stage == "reward":  # no model to initialise from
        return "start anew without --resume"
    return (
        "begin a new run, with a schedule of its own, from the weights of this one: --from_weight "
        f"{weight} --save_weight {weight}_2 without --resume"
    )


def keep_unfinished(ctx: Context, path: Path, log: Path, total_steps: int) -> None:
    """Let a new run overwrite an unfinished one only with --force, and keep the log of what it
    overwrites.

    Args:
        path, log: checkpoint and log of this run's name.
        total_steps: of this run, for a checkpoint that does not have its own (until 2026-11).

    Raises:
        UserError: there is an unfinished run, and no --force.
    """
    if ctx.args.resume or not path.exists():
        return
    try:  # mmap: a checkpoint may have gigabytes, of which a few bytes are needed
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = checkpoint["progress"]["step"]
        state = "a finished"
        if step < checkpoint.get("total_steps", total_steps):
            state = "an unfinished"
    except Exception:  # damaged: --resume could not go on with it either
        return
    if state == "an unfinished" and not ctx.args.force:
        raise UserError(
            f"{path} is of an unfinished run, at step {step}: --resume goes on with it, --force 1 "
            "begins anew over it, and another --save_weight keeps both"
        )
    kept = log.with_suffix(".before.jsonl")
    if ctx.is_main and log.exists():
        os.replace(log, kept)
    ctx.print(f"beginning anew over {state} run, at step {step}; its log is kept as {kept}")


def restore(
    checkpoint: dict[str, Any],
    ctx: Context,
    *,
    model: nn.Module,
    optimizer: Any,
    scaler: Any,
    metrics: MetricLog,
    extra_state: Any = None,
) -> Progress:
    """Load a checkpoint's states; returns its progress. Frozen weights are not in it and stay."""
    metrics.load_state_dict(checkpoint["metrics"])
    metrics.history = checkpoint["history"]
    if len(checkpoint["rng_states"]) == ctx.world_size:
        restore_rng_state(checkpoint["rng_states"][ctx.rank], ctx.device)
    frozen = model.state_dict().keys() - trainable_state(model).keys()
    kept = {name: model.state_dict()[name] for name in frozen}
    model.load_state_dict({**kept, **checkpoint["model"]})
    optimizer.load_state_dict(checkpoint["optimizer"])
    if extra_state:
        extra_state.load_state_dict(checkpoint["extra_state"])
    if scaler.is_enabled() and checkpoint["scaler"]:  # empty if it was written without a scaler
        scaler.load_state_dict(checkpoint["scaler"])
    return Progress(**checkpoint["progress"])


# Names of a checkpoint's parts until 2026-11: read for one version more.
OLD_KEYS = {
    "random": "rng_states",
    "records": "history",
    "identity": "fingerprint",
    "rows_per_update": "global_batch_size",
    "beside": "extra_state",
}


def upgrade(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with today's names."""
    if "identity" not in checkpoint:
        return checkpoint
    new = {OLD_KEYS.get(name, name): part for name, part in checkpoint.items()}
    names = {"rows_seen": "samples_seen", "changed": "changed_fraction"}
    new["progress"] = {names.get(n, n): value for n, value in new["progress"].items()}
    stage = new["fingerprint"].get("stage", "")
    new["history"] = with_new_keys(new["history"], stage)
    (evaluation,) = with_new_keys([new["progress"]["evaluation"]], stage)
    new["progress"]["evaluation"] = evaluation
    pending = new.pop("pending")
    names = ("steps", "tokens", "seconds", "expert_load")
    new["metrics"] = {name: pending[name] for name in names if name in pending}
    # other metrics since the last log line were means, which sums and counts cannot continue
    new["metrics"] |= {"sums": {}, "loss_sum": pending["loss"]}
    for optimizer in new["optimizer"]:
        for state in optimizer["state"].values():
            if "average" in state:
                state["momentum_buffer"] = state.pop("average")
    return new


# -- random states ---------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator, in types that torch.load reads with weights_only."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # a tuple; it could be asked for a dict
    kind, keys, *rest = legacy
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "device": device_rng(device).get_rng_state() if device.type != "cpu" else None,
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        device_rng(device).set_rng_state(state["device"])


def device_rng(device: torch.device) -> Any:
    """torch.cuda or torch.mps, which hold the state of the current GPU's generator."""
    return getattr(torch, device.type)


# -- trainable weights -----------------------------------------------------------------------------


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters."""
    return {
        name: each.detach()
        for name, each in model.state_dict(keep_vars=True).items()
        if each.requires_grad or not isinstance(each, nn.Parameter)
    }
