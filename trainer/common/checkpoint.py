"""Checkpoints: what a run needs to go on as if it had never stopped (`checkpoints/`, --resume).

A checkpoint holds weights and optimizer in float32, the random states of all ranks, the position in
the data, the log, and the run's fingerprint (arguments, model config, hashes of data and
tokenizer), so that another run's checkpoint is refused.
"""

import hashlib
import os
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
from model.errors import UserError, reading
from model.formats.minimind_format import load_tensors, save_tensors
from model.weights import to_fp16_cpu, tokenizer_hash
from trainer.common.context import Context
from trainer.common.hardware import restore_rng_state
from trainer.common.metrics import Accumulator, MetricLog
from trainer.report.old_keys import upgrade

START_ANEW = "start anew without --resume, or put a copy of it in its place"
# Where weights lie: other weights are recognised by their hash, wherever they are.
PLACES = ("from_weight", "teacher_weight")
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


KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "scaler", "progress", "metrics", "fingerprint"), dict),
    **dict.fromkeys(("optimizer", "rng_states", "history"), list),
    "global_batch_size": int,
}
MAY_BE_NONE = {"changed_fraction": float, "tracker_id": str, "expert_load": Tensor}


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
    save_tensors(path, checkpoint)


def load_checkpoint(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the run with this fingerprint; `restore` puts it to use.

    Raises:
        UserError: the file cannot be read or is no checkpoint, or is another run's (names the first
            thing that differs).
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file; {START_ANEW}")
    try:
        checkpoint = upgrade(load_tensors(path, START_ANEW))
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(f"{path} is damaged; {START_ANEW}") from error
    check_fields(checkpoint, path)
    for name, then in checkpoint["fingerprint"].items():
        now = fingerprint.get(name, then)
        if now != then and name not in PLACES:
            raise UserError(
                f"{path} was made with {name} {then!r}, and this run has {now!r}; give the same, "
                f"or {how_to_train_on(path, fingerprint['stage'])}"
            )
    # load_state_dict copies weights; optimizers keep the tensors that they are given
    return {name: each if name == "model" else copied(each) for name, each in checkpoint.items()}


def check_fields(checkpoint: Any, path: Path) -> None:
    """UserError unless a checkpoint has what it must have. A lacking field must not pass for one
    that is at its start."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint but a {type(checkpoint).__name__}; {START_ANEW}")
    if missing := Checkpoint.__required_keys__ - checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of this version: it lacks {min(missing)}")
    for name, kind in KINDS.items():
        if not isinstance(checkpoint[name], kind):
            found = type(checkpoint[name]).__name__
            raise UserError(f"{path} is damaged: its {name} is a {found}; {START_ANEW}")
    if not all(isinstance(record, dict) for record in checkpoint["history"]):
        raise UserError(f"{path} is damaged: its history is no list of records; {START_ANEW}")
    for part, expected, required in (
        ("progress", Progress(), {"step", "samples_seen", "tokens", "seconds"}),
        ("metrics", Accumulator(), {"steps", "tokens", "seconds", "loss_sum", "sums"}),
    ):
        for name, default in vars(expected).items():
            value = checkpoint[part].get(name, None if name in required else default)
            kind = int | float if isinstance(default, float) else type(default)
            right = isinstance(value, kind)
            if default is None:
                right = value is None or isinstance(value, MAY_BE_NONE[name])
            if isinstance(value, Tensor):  # expert_load: [layers, experts]
                right = right and value.dim() == 2
            at_least_0 = isinstance(default, int) or name == "seconds"  # losses of RL may be below
            if not right or (at_least_0 and value < 0):
                raise UserError(f"{path} is damaged: its {part} has {name} {value!r}; {START_ANEW}")


def copied(part: Any) -> Any:
    """A part of a checkpoint in memory, apart from the mapped file."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, dict):
        return {name: copied(each) for name, each in part.items()}
    return [copied(each) for each in part] if isinstance(part, list) else part


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


def resume_from(
    ctx: Context,
    path: Path,
    fingerprint: dict[str, Any],
    *,
    model: nn.Module,
    optimizer: Any,
    scaler: Any,
    metrics: MetricLog,
    extra_state: Any = None,
) -> tuple[Progress, int] | None:
    """Load the states of a checkpoint on all ranks; its progress, and the samples of a full step.
    None if no rank has one. Frozen weights are not in it and stay.

    Raises:
        UserError: on all ranks, if one of them cannot go on.
    """
    checkpoint = shared_checkpoint(ctx, path, fingerprint)
    if checkpoint is None:
        return None
    with reading(path, START_ANEW):
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
        return Progress(**checkpoint["progress"]), checkpoint["global_batch_size"]


def shared_checkpoint(
    ctx: Context, path: Path, fingerprint: dict[str, Any]
) -> dict[str, Any] | None:
    """The same checkpoint for all ranks, on one machine or several: each reads its own file if all
    have the same, and else rank 0 reads its file and hands it over."""
    files = ctx.all_gather(file_identity(path))
    if not any(files):
        return None
    if not files[0]:
        raise UserError(
            f"rank {files.index(max(files))} has the checkpoint {path}, and rank 0 has none; copy "
            "it to the first machine, where it is written, or remove it"
        )
    same = len(set(files)) == 1
    checkpoint, error = None, ""
    if same or ctx.is_main:
        try:
            checkpoint = load_checkpoint(path, fingerprint)
        except UserError as mistake:
            error = str(mistake)
    if errors := [each for each in ctx.all_gather(error) if each]:
        raise UserError(errors[0])
    if not same:
        ctx.print(f"rank 0 hands {path.name} over to the others, which lack it or have another")
        checkpoint = ctx.broadcast(checkpoint)
    return checkpoint


def file_identity(path: Path) -> str:
    """What tells a checkpoint from another, read in no time: size and end of the file, where a zip
    archive has the checksums of all its parts; "" where there is none."""
    if not path.exists():
        return ""
    if not path.is_file():
        return "no file"
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16))
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"


def check_same_on_ranks(ctx: Context, fingerprint: dict[str, Any]) -> None:
    """UserError on all ranks if one of them has other data, weights or arguments: on several
    machines each reads its own files."""
    for rank, other in enumerate(ctx.all_gather(fingerprint)):
        differ = [name for name in fingerprint if other.get(name) != fingerprint[name]]
        if differ and rank:
            raise UserError(
                f"rank {rank} has another {differ[0]} than rank 0; all machines need the same "
                "data, weights and flags"
            )


# -- trainable weights -----------------------------------------------------------------------------


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters."""
    return {
        name: each.detach()
        for name, each in model.state_dict(keep_vars=True).items()
        if each.requires_grad or not isinstance(each, nn.Parameter)
    }
