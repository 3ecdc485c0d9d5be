"""What to expect of a training, printed before its first step: data, steps, memory, time, loss."""

import math
from pathlib import Path

from torch import nn

from dataset.packing import PackedDataset, TrainingData
from model.errors import UserError
from model.model_minimind import MiniMindConfig
from model.weights import count_parameters
from trainer.common import hardware
from trainer.common.context import Context
from trainer.common.loop import Plan


def forecast(
    ctx: Context,
    plan: Plan,
    peak_flops: float | None,
    model: nn.Module,
    config: MiniMindConfig,
    train_data: TrainingData,
    val_data: TrainingData | None,
) -> tuple[list[str], str]:
    """Lines that tell what to expect, and what to try if memory runs out all the same.

    Raises:
        UserError: a batch cannot fit this machine; it names one that would.
    """
    args, parameters = ctx.args, count_parameters(model)
    num_tokens = plan.total_samples * train_data.num_tokens / len(train_data)
    dtype = str(ctx.dtype).removeprefix("torch.")
    held_out = f"; held out: {len(val_data.indices):,} {val_data.document_unit}" if val_data else ""
    names = ", ".join(Path(path).name for path in args.data_path)
    first, largest = plan.first_batch, plan.largest_batch
    sizes = f"{first} to {largest}" if first < largest else f"{first}"
    # the first steps will show the speed, and with it how many there are
    most = "at most " if args.minutes and not args.max_steps else ""
    memory, oom_hint = memory_forecast(ctx, model, config, train_data)
    lines = [
        f"{plan.name}: {parameters / 1e6:.2f}M parameters, "
        f"{hardware.describe_machine(ctx.device)}, {dtype}, "
        f"{ctx.world_size} process{'es' * (ctx.world_size > 1)}",
        f"data: {names}: {train_data.summary}{held_out}",
        f"training: {most}{plan.total_steps:,} steps of {sizes} {train_data.sample_unit}, "
        f"{num_tokens:,.0f} tokens",
        memory,
    ]
    if peak_flops:
        work = hardware.flops_per_token(config, args.max_seq_len) * num_tokens
        seconds = work / (0.4 * peak_flops * ctx.world_size)
        lines.append(
            f"time: {most or 'about '}{duration(seconds)}, if 40% of the machine's "
            f"{peak_flops / 1e12:.2f} TFLOP/s are reached"
        )
    if args.from_weight == "none" and isinstance(train_data, PackedDataset):
        size = config.vocab_size
        lines.append(
            f"loss: ln {size} = {math.log(size):.2f} at the start, a uniform guess; it falls fast "
            "at first"
        )
    return [*lines, *explain_dtype(ctx)], oom_hint


def explain_dtype(ctx: Context) -> list[str]:
    """Why the training computes in a type that was not asked for; nothing where it was."""
    dtype, asked = str(ctx.dtype).removeprefix("torch."), ctx.args.dtype
    if ctx.device.type == "cpu" and asked == "auto":
        gain = f"{hardware.bfloat16_gain():.1f} times as fast as float32's"
        return [f"--dtype auto: bfloat16 products are {gain} on this CPU: computing in {dtype}"]
    if ctx.device.type == "cuda" and dtype == "float16" != asked:
        return ["this GPU has no native bfloat16: computing in float16"]
    if asked not in ("auto", dtype):
        return [f"{ctx.device.type} does not train in {asked}: computing in {dtype}"]
    return []


def memory_forecast(
    ctx: Context, model: nn.Module, config: MiniMindConfig, train_data: TrainingData
) -> tuple[str, str]:
    """A line on memory, and which batch to try should it run out.

    Raises:
        UserError: the batch needs far more than the machine has.
    """
    args, flag, longest = ctx.args, ctx.args.batch_size_flag, train_data.max_sample_tokens
    batch_size = getattr(args, flag)
    samples = batch_size if flag != "batch_size" else min(batch_size, len(train_data))
    fixed, per_token = hardware.training_memory(
        config, model, ctx.device, ctx.dtype, args.optimizer, args.gradient_checkpointing
    )
    if args.needs_reference:
        fixed += 4 * count_parameters(model)
    need = fixed + per_token * samples * longest
    free, total = hardware.memory_available(ctx.device), hardware.total_memory(ctx.device)
    if ctx.device.type != "cuda":  # all processes of the machine share it
        free, total = free / hardware.ranks_here(), total / hardware.ranks_here()
    fitting = min(int((free - fixed) / (per_token * longest)), samples // 2)
    if fitting < 1:
        hint = "try --gradient_checkpointing 1, a smaller --max_seq_len or a smaller model"
    elif flag != "batch_size":  # the same optimizer step, in more parts
        hint = f"--{flag} {fitting} should fit"
    else:
        steps = math.ceil(args.accumulation_steps * args.batch_size / fitting)
        hint = f"--batch_size {fitting} with --accumulation_steps {steps} should fit"
    if need > 1.5 * total:  # the estimate is not that far off: do not wait for the crash
        raise UserError(
            f"--{flag} {batch_size} with {train_data.sample_unit} of {longest} tokens needs about "
            f"{need / 1e9:.0f} GB a process, and there are {total / 1e9:.0f} GB; {hint}"
        )
    line = f"memory: about {need / 1e9:.1f} GB a process, {free / 1e9:.1f} GB are free"
    return line + (f"; warning: that may not fit; {hint}" if need > free else ""), hint


def seconds_per_step(history: list[dict]) -> float:
    """Seconds of an optimizer step, from the log of a run; the first, slow one does not count."""
    _, first, *_, last = [record for record in history if "loss" in record]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def duration(seconds: float) -> str:
    """8 s, 12 min, 3.4 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
