"""What to expect of a training, told before its first step: data, steps, memory, time, loss."""

import math
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from dataset.packing import Rows
from dataset.pairs import Pairs
from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindModel
from model.weights import count_parameters
from trainer.common import hardware

if TYPE_CHECKING:
    from trainer.trainer_utils import Run


def forecast(
    run: "Run", model: nn.Module, rows: Rows | Pairs, held_out: Rows | Pairs | None
) -> tuple[list[str], str]:
    """Lines that tell what to expect, and what to try if memory runs out all the same.

    Raises:
        UserError: a batch cannot fit this machine, with one that would.
    """
    args, parameters = run.args, count_parameters(model)
    tokens = run.rows_in_all * rows.tokens / len(rows)
    kind = str(run.dtype).removeprefix("torch.")
    lines = [
        f"{run.name}: {parameters / 1e6:.2f}M parameters, {run.origin['machine']}, {kind}, "
        f"{run.ranks} process{'es' * (run.ranks > 1)}",
        f"data: {rows.summary}"
        + (f"; held out: {len(held_out.chosen):,} {rows.documents_name}" if held_out else ""),
        f"training: {run.steps_in_all:,} steps of {window_sizes(run)} {rows.rows_name}, "
        f"{tokens:,.0f} tokens",
    ]
    told, smaller_batch = memory_forecast(run, model, rows)
    lines.append(told)
    if run.flops:
        work = hardware.flops_per_token(run.config, args.max_seq_len) * tokens
        lines.append(
            f"time: about {duration(work / (0.4 * run.flops * run.ranks))}, if 40% of the "
            f"machine's {run.flops / 1e12:.2f} TFLOP/s are reached"
        )
    if args.from_weight == "none" and isinstance(rows, Rows):
        size = run.config.vocab_size
        lines.append(
            f"loss: ln {size} = {math.log(size):.2f} at the start, which is guessing; it falls "
            "fast at first"
        )
    if kind != args.dtype and run.device.type == "cuda":
        lines.append(f"this GPU has no {args.dtype} of its own: computing in {kind}")
    elif kind != args.dtype:
        lines.append(f"{run.device.type} trains in float32; --dtype is for CUDA")
    return lines, smaller_batch


def window_sizes(run: "Run") -> str:
    """Rows of an update: of the first, and of the largest."""
    sizes = [after - before for before, after in islice(run.sampler.windows(), run.steps_in_all)]
    return f"{sizes[0]} to {max(sizes)}" if sizes[0] < max(sizes) else f"{sizes[0]}"


def memory_forecast(run: "Run", model: nn.Module, rows: Rows | Pairs) -> tuple[str, str]:
    """A line on memory, and which batch to try should it run out; UserError if the batch is far
    beyond what the machine has."""
    args, flag, most = run.args, run.args.rows_flag, rows.tokens_of_longest
    batch_size = getattr(args, flag)
    at_once = batch_size if flag != "batch_size" else min(batch_size, len(rows))
    fixed, per_token = training_memory(
        run.config, model, run.dtype, args.optimizer, args.gradient_checkpointing
    )
    if args.needs_reference:
        fixed += 4 * count_parameters(model)
    need = fixed + per_token * at_once * most
    free, whole = hardware.memory_available(run.device), hardware.memory_in_all(run.device)
    if run.device.type != "cuda":  # all processes share it
        free, whole = free / hardware.ranks_here(), whole / hardware.ranks_here()
    fitting = int((free - fixed) / (per_token * most))
    fitting = min(fitting, at_once // 2)
    if fitting < 1:
        smaller = "try --gradient_checkpointing 1, a smaller --max_seq_len or a smaller model"
    elif flag != "batch_size":  # the update is the same, in more parts
        smaller = f"--{flag} {fitting} should fit"
    else:
        steps = math.ceil(args.accumulation_steps * args.batch_size / fitting)
        smaller = f"--batch_size {fitting} with --accumulation_steps {steps} should fit"
    if need > 1.5 * whole:  # the estimate is not that far off: do not wait for the crash
        raise UserError(
            f"--{flag} {batch_size} with {rows.rows_name} of {most} tokens needs about "
            f"{need / 1e9:.0f} GB a process, and there are {whole / 1e9:.0f} GB; {smaller}"
        )
    told = f"memory: about {need / 1e9:.1f} GB a process, {free / 1e9:.1f} GB are free"
    return told + (f"; warning: that may not fit; {smaller}" if need > free else ""), smaller


def training_memory(
    config: MiniMindConfig,
    model: nn.Module,
    dtype: torch.dtype,
    optimizer: str,
    gradient_checkpointing: bool,
) -> tuple[float, float]:
    """An estimate of what training needs: bytes in any case, and bytes for each token of a batch.

    In any case: weights, and of those that are trained gradients and the optimizer's averages
    (AdamW keeps two, Muon one), in float32. For each token, what backward needs of every layer:
    about 12 vectors of the hidden size and 4 of the intermediate size, or with gradient
    checkpointing one vector a layer and one layer at a time; and logits, which float32 makes in
    chunks and autocast as a whole, three times. A critic beside the actor doubles all that.
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    fixed = 4 * (count_parameters(model) + trained * (3 if optimizer == "adamw" else 2))
    whole = dtype == torch.float32
    size = 4 if whole else 3  # under autocast part of it stays float32
    layer = 12 * config.hidden_size + 4 * config.active_intermediate_size
    layers = config.num_hidden_layers
    kept = layer + layers * config.hidden_size if gradient_checkpointing else layers * layer
    models = sum(isinstance(part, MiniMindModel) for part in model.modules())
    return fixed, models * (size * kept + config.vocab_size * (1 if whole else 14))


def seconds_of_an_update(records: list[dict]) -> float:
    """How long an update takes, by the log of a run; the first one is slow and does not count."""
    _, first, *_, last = [record for record in records if "loss" in record]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def duration(seconds: float) -> str:
    """8 s, 12 min, 3.4 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
