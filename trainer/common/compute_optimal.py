"""`--minutes N` of pretraining: the model size, and the steps, that make the most of N minutes.

A large model learns more from a token, and a small one sees more tokens in the same time. The
held-out loss of a model of N parameters after D tokens follows a law (Chinchilla, arXiv 2203.15556,
eq. 2), which benchmarks/learning/scaling_law.py fits to runs of the default recipe:

    L(N, D) = E + A/N^α + B/D^β        in bits per byte

Tokens of a second epoch teach less than new ones (arXiv 2305.16264, eq. 5): of U different tokens,
D tokens are worth

    D' = U + U · R* · (1 − e^(−R/R*))        R = D/U − 1 repetitions, R* = 15.4

The speed is measured: a few steps of this machine, for sizes around the best one.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dataset.packing import PackedDataset, collate
from dataset.sampler import GlobalBatchSampler
from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, weight_name
from trainer.common import hardware
from trainer.common.arguments import TrainArgs
from trainer.common.context import Context
from trainer.common.loop import initial_batch_size, make_sampler
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, prepare_model

REPETITIONS = 15.4  # R*: after so many epochs, repeated tokens have taught most of what they can
GUESSED_PEAK = 2e13  # FLOP/s of a machine whose peak is unknown: only where the search begins
MEASURED_STEPS = 4  # of each size, after one that is not measured
# (hidden size, layers), from 0.9M to 184M parameters: a layer for every 32 of the width, up to 8,
# and up to 16 for the largest. One ladder in steps of about 1.4: the loss has one valley on it.
SIZES = [
    *((96, 3), (128, 4), (160, 5), (192, 6), (224, 7), (256, 8), (320, 8), (384, 8), (448, 8)),
    *((512, 8), (640, 8), (768, 8), (768, 12), (768, 16), (1024, 16)),
]


@dataclass(frozen=True)
class ScalingLaw:
    """Held-out bits per byte by parameters and tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float, unique_tokens: float = math.inf) -> float:
        """Bits per byte after training `tokens` tokens, of which `unique_tokens` are different."""
        worth = max(1.0, effective_tokens(tokens, unique_tokens))
        return self.E + self.A / parameters**self.alpha + self.B / worth**self.beta


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """How many new tokens teach as much as `tokens` of which `unique_tokens` are different."""
    if tokens <= unique_tokens:
        return tokens
    repetitions = tokens / unique_tokens - 1
    return unique_tokens * (1 + REPETITIONS * (1 - math.exp(-repetitions / REPETITIONS)))


# Provisional: set by eye to a few runs of benchmarks/README.md ("Scaling law"), not fitted yet.
LAW = ScalingLaw(E=0.9, A=70.0, alpha=0.35, B=18.0, beta=0.2)


class Speed(NamedTuple):
    """How long an optimizer step takes: update + samples · sample."""

    update: float  # seconds, whatever the batch: clipping and the optimizer
    sample: float  # seconds of forward and backward of a sequence, all ranks together

    def steps_within(self, seconds: float, sampler: GlobalBatchSampler) -> tuple[int, int]:
        """The optimizer steps that fit the time, and the samples that they train."""
        steps = samples = 0
        for before, after in sampler.bounds():
            seconds -= self.update + self.sample * (after - before)
            if seconds < 0:
                break
            steps, samples = steps + 1, after
        return steps, samples


def learning_rate(width: int) -> float:
    """Peak learning rate of a size that --minutes chooses. Narrow models learn faster with more
    than the default (RECIPE_LOG.md, series 16); a step of a matrix moves its output by lr · width
    at most, hence lr ∝ 1/width (μP, arXiv 2203.03466)."""
    return TrainArgs.learning_rate * max(1.0, 256 / width)


def lowest(loss: Callable[[int], float], start: int, count: int) -> int:
    """The index, of `count`, with the lowest loss, downhill from `start`: there is one valley."""
    while True:
        beside = [index for index in (start - 1, start + 1) if 0 <= index < count]
        best = min([start, *beside], key=loss)
        if best == start:
            return start
        start = best


class Candidate(NamedTuple):
    """A size, measured on this machine."""

    flags: dict[str, Any]  # that make a training of this size; none: those of the command line
    parameters: int
    speed: Speed
    loss: float  # bits per byte to expect after --minutes


def choose_size(
    ctx: Context, tokenizer: PreTrainedTokenizerBase, train_data: PackedDataset
) -> None:
    """With --minutes, set the steps and epochs of a pretraining, and its sizes if none are given.
    A run that is resumed keeps those of its checkpoint."""
    args = ctx.args
    if not args.minutes or args.max_steps or (args.resume and keep_choice(ctx, tokenizer)):
        return
    began = time.monotonic()
    sampler = make_sampler(ctx, train_data)
    sampler.epochs = 10**9
    tokens_per_sample = train_data.num_tokens / len(train_data)
    sizes = [{}] if sizes_given(args) else candidates(ctx, tokenizer)

    @cache
    def measure(index: int) -> Candidate:
        of_size = replace(ctx, args=replace(args, **sizes[index]))
        model = init_model(of_size.args, tokenizer)
        parameters = count_parameters(model)
        speed = measure_speed(of_size, model, tokenizer, train_data)
        _, samples = speed.steps_within(60 * args.minutes, sampler)
        loss = LAW.loss(parameters, samples * tokens_per_sample, train_data.num_tokens)
        return Candidate(sizes[index], parameters, speed, loss)

    start = guess(ctx, tokenizer, sizes, train_data.num_tokens) if sizes[0] else 0
    best = lowest(lambda index: measure(index).loss, start, len(sizes))
    spent = ctx.all_reduce_sum(time.monotonic() - began)[0] / ctx.world_size  # ranks must agree
    steps, samples = measure(best).speed.steps_within(60 * args.minutes - spent, sampler)
    if not steps:
        raise UserError(
            f"--minutes {args.minutes:g} is too short: measuring this machine's speed took "
            f"{spent:.0f} s, which leaves no time for a step; give more minutes"
        )
    args.max_steps = steps
    args.epochs = max(args.epochs, math.ceil(samples / len(train_data)))
    for name, value in sizes[best].items():
        setattr(args, name, value)
    measured = [measure(index) for index in (best, best - 1, best + 1) if 0 <= index < len(sizes)]
    ctx.print(*explain(args, train_data, samples, measured))


def explain(
    args: TrainArgs, train_data: PackedDataset, samples: int, measured: list[Candidate]
) -> list[str]:
    """What was chosen and why, for whoever reads the log. The choice comes first in `measured`."""
    chosen = measured[0]
    tokens = samples * train_data.num_tokens / len(train_data)
    rate = tokens / (args.max_steps * chosen.speed.update + samples * chosen.speed.sample)
    name = f"{name_of(chosen)} (hidden size x layers), " if chosen.flags else ""
    lines = [
        f"--minutes {args.minutes:g}: {name}{chosen.parameters / 1e6:.1f}M parameters, of which "
        f"this machine trains {rate:,.0f} tokens a second: {args.max_steps:,} steps, "
        f"{tokens / 1e6:.2g}M tokens, {tokens / train_data.num_tokens:.2g} epochs, learning rate "
        f"{args.learning_rate:.2g}"
    ]
    if chosen.flags:
        losses = ", ".join(f"{name_of(each)} {each.loss:.2f}" for each in measured)
        lines.append(f"    held-out bits per byte to expect by then: {losses}")
    return lines


def name_of(candidate: Candidate) -> str:
    return f"{candidate.flags['hidden_size']} x {candidate.flags['num_hidden_layers']}"


def sizes_given(args: TrainArgs) -> bool:
    """Whether the command line says how large the model is."""
    sizes = (args.hidden_size, args.num_hidden_layers, args.num_attention_heads)
    sizes += (args.num_key_value_heads, args.intermediate_size)
    return args.from_weight != "none" or args.use_moe or any(size is not None for size in sizes)


def keep_choice(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Set what --minutes chose when the run to be resumed began; False if there is none.

    Raises:
        UserError: that run was begun with other --minutes.
    """
    args, given = ctx.args, sizes_given(ctx.args)
    name = args.save_weight or "pretrain"
    for path in Path(args.checkpoint_dir).glob(f"{name}_*.checkpoint.pt"):
        try:  # mmap: a checkpoint may have gigabytes, of which a few bytes are needed
            kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["fingerprint"]
            own_name = weight_name(name, kept["hidden_size"], kept["use_moe"])
        except Exception:  # damaged: if it is this run's, `load_checkpoint` says so
            continue
        if not kept.get("minutes") or not path.name.startswith(f"{own_name}."):
            continue
        if kept["minutes"] != args.minutes:
            raise UserError(
                f"{path} was begun with --minutes {kept['minutes']:g}, for which its schedule was "
                f"made: go on with the same, or begin anew with --resume 0"
            )
        chosen = {each: kept[each] for each in ("max_steps", "epochs")}
        if not given:
            chosen |= flags_of(ctx, tokenizer, kept["hidden_size"], kept["num_hidden_layers"])
        for each, value in chosen.items():
            setattr(args, each, value)
        return True
    return False


def candidates(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The flags of those of SIZES that fit the memory, the smallest one in any case."""
    smallest, *others = (flags_of(ctx, tokenizer, *size) for size in SIZES)
    return [smallest, *(size for size in others if fits(ctx, tokenizer, **size))]


def flags_of(
    ctx: Context, tokenizer: PreTrainedTokenizerBase, width: int, depth: int
) -> dict[str, Any]:
    """The flags of a size: with the learning rate of its width, unless another one is given, and
    with --batch_size divided until it fits the memory, and as many --accumulation_steps more, so
    that the optimizer step stays the same."""
    size: dict[str, Any] = dict(hidden_size=width, num_hidden_layers=depth)
    if ctx.args.learning_rate == TrainArgs.learning_rate:
        size["learning_rate"] = learning_rate(width)
    whole, steps = ctx.args.batch_size, ctx.args.accumulation_steps
    for parts in (number for number in range(1, whole + 1) if whole % number == 0):
        size |= dict(batch_size=whole // parts, accumulation_steps=parts * steps)
        if fits(ctx, tokenizer, **size):
            break
    return size


def fits(
    ctx: Context,
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int,
    num_hidden_layers: int,
    batch_size: int,
    **other_flags: int,
) -> bool:
    """Whether a training fits four fifths of the memory, by the estimate of every plan."""
    args, total = ctx.args, hardware.total_memory(ctx.device)
    if ctx.device.type != "cuda":  # all processes of the machine share it
        total /= hardware.ranks_here()
    config, model = on_meta(tokenizer, hidden_size, num_hidden_layers)
    fixed, per_token = hardware.training_memory(
        config, model, ctx.device, ctx.dtype, args.optimizer, args.gradient_checkpointing
    )
    return fixed + per_token * batch_size * args.max_seq_len < 0.8 * total


def guess(
    ctx: Context,
    tokenizer: PreTrainedTokenizerBase,
    sizes: list[dict[str, Any]],
    unique_tokens: int,
) -> int:
    """The index of the best size, if 40% of the machine's peak are reached: where to begin."""
    peak = hardware.peak_flops(ctx.device, ctx.dtype) or GUESSED_PEAK
    work = 60 * ctx.args.minutes * 0.4 * peak * ctx.world_size

    def loss(index: int) -> float:
        size = sizes[index]
        config, model = on_meta(tokenizer, size["hidden_size"], size["num_hidden_layers"])
        tokens = work / hardware.flops_per_token(config, ctx.args.max_seq_len)
        return LAW.loss(count_parameters(model), tokens, unique_tokens)

    best = min(range(len(sizes)), key=loss)
    return int(ctx.all_reduce_sum(best)[0] / ctx.world_size)


def on_meta(
    tokenizer: PreTrainedTokenizerBase, width: int, depth: int
) -> tuple[MiniMindConfig, MiniMindForCausalLM]:
    """A config, and its model without memory for its weights."""
    size = dict(hidden_size=width, num_hidden_layers=depth)
    config = MiniMindConfig(vocab_size=len(tokenizer), **size)
    with torch.device("meta"):
        return config, MiniMindForCausalLM(config)


def clock(device: torch.device) -> float:
    """Seconds, after all that was started on a GPU, which goes on while Python does."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def measure_speed(
    ctx: Context,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train_data: PackedDataset,
) -> Speed:
    """Time a few optimizer steps of a model, which is of no use afterwards."""
    args = ctx.args
    rows = min(initial_batch_size(ctx), args.batch_size, len(train_data))
    batch = collate([train_data[row] for row in range(rows)], tokenizer.pad_token_id)
    batch = batch.to(ctx.device)
    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )

    times = []
    for _ in range(1 + MEASURED_STEPS):
        start = clock(ctx.device)
        with ctx.autocast():
            outputs = model(
                **batch.inputs,
                labels=batch.labels,
                num_items_in_batch=batch.num_label_tokens,
                return_logits=False,
            )
        outputs.loss.backward()
        middle = clock(ctx.device)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append((clock(ctx.device) - middle, (middle - start) / rows))
    update, sample = map(median, zip(*times[1:], strict=True))
    if ctx.device.type == "cuda":
        del model, optimizer, outputs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    update, sample = (each / ctx.world_size for each in ctx.all_reduce_sum(update, sample))
    return Speed(update, sample / ctx.world_size)
