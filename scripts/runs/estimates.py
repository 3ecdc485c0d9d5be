"""What a stage takes, before it is trained: tokens of its data, time, memory and disk."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from dataset.forms.files import open_lines
from dataset.jsonl import BadRows, error_at, parse_row
from dataset.released import SIZES
from model.command_line import rules_of
from model.errors import UserError
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindForCausalLM
from model.weights import count_parameters
from trainer.common import hardware
from trainer.common.compute_optimal import clock
from trainer.common.context import Context
from trainer.common.optimizers import make_optimizer

SAMPLE_BYTES = 2_000_000  # of a data file, to know how many tokens it has
BYTES_PER_TOKEN, BYTES_PER_ROW = 3.2, 1200  # of a released file that is still to be downloaded
CACHED_BYTES = 2.2  # of a token in dataset/.cache: measured, 5 GB of JSONL are 3.4 GB of tokens
HELD_OUT_TOKENS = 256 * 200  # of a trainer's evaluation
ANSWER_TOKENS = 200  # assumed of a completion in reinforcement learning


class DataFile(NamedTuple):
    """What a stage reads, estimated from its beginning."""

    name: str
    rows: float
    bytes: float  # uncompressed
    tokens: float


class MachineSpeed(NamedTuple):
    """Of this machine, with the model that is going to be trained."""

    train: float  # tokens a second, forward and backward
    step: float  # seconds of an optimizer step
    decode: float  # tokens a second, 16 answers at once
    tokenize: float  # bytes a second
    start: float = 0.0  # seconds until a command has imported what it needs


@dataclass
class Estimate:
    """What a stage takes."""

    data: str
    minutes: float  # of --minutes; 0: no limit
    tokens: float
    seconds: float
    memory: float  # bytes, of the GPU or of the machine
    disk: float  # bytes


def released_file(name: str) -> DataFile:
    size = SIZES[name]
    return DataFile(name, size / BYTES_PER_ROW, size, size / BYTES_PER_TOKEN)


def measure_file(path: str, tokenizer: PreTrainedTokenizerBase) -> DataFile:
    """Rows and tokens of a file, from its first megabytes."""
    texts, size, bad_rows = [], 0, BadRows()  # which the trainer complains about
    with open_lines(path) as (raw, lines):
        for number, line in enumerate(lines, start=1):
            size += len(line)
            with error_at(path, number, bad_rows):
                if line.strip():
                    texts.append("\n".join(strings(parse_row(line))))
            if size > SAMPLE_BYTES:
                break
        times = max(1.0, os.path.getsize(path) / raw.tell()) if size > SAMPLE_BYTES else 1.0
    if not texts:
        raise UserError(f"{path} has no row of data, as far as it was read")
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return DataFile(Path(path).name, *(times * count for count in (len(texts), size, tokens)))


def strings(value: Any) -> Iterator[str]:
    """All texts in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def measure_machine(
    ctx: Context, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> MachineSpeed:
    """Some seconds of training and of decoding, on made-up tokens. A GPU is measured without
    compiled blocks, which are faster. Of this command's own start, how long any takes."""
    started = time.time() - psutil.Process().create_time()
    model, length = model.to(ctx.device), ctx.args.max_seq_len
    optimizer = make_optimizer(model, ctx.args.optimizer, 0.0, 0.0, ctx.dtype)
    rows = ctx.args.batch_size if ctx.device.type == "cuda" else 2
    ids = torch.randint(3, len(tokenizer), (rows, length), device=ctx.device)

    def train() -> None:
        with ctx.autocast():
            loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()

    train_seconds = seconds_of(ctx, train)
    step_seconds = seconds_of(ctx, optimizer.step)
    model.zero_grad(set_to_none=True)
    prompts, new = ids[:1, :16].tolist() * 16, 24
    sampling = SamplingParams(max_new_tokens=new, temperature=1.0)
    decode_seconds = seconds_of(ctx, lambda: generate(model, prompts, sampling), times=1)
    text = [tokenizer.decode(row) for row in ids.tolist()] * 20
    start = time.perf_counter()
    tokenizer(text)
    return MachineSpeed(
        train=ids.numel() / train_seconds,
        step=step_seconds,
        decode=16 * new / decode_seconds,
        tokenize=sum(len(each.encode()) for each in text) / (time.perf_counter() - start),
        start=started,
    )


def seconds_of(ctx: Context, call: Any, times: int = 2) -> float:
    """The shorter of some calls, after one that does not count."""
    best = float("inf")
    for number in range(times + 1):
        start = clock(ctx.device)
        call()
        best = min(best, clock(ctx.device) - start) if number else best
    return best


def estimate(
    args: Any, file: DataFile, model: MiniMindForCausalLM, speed: MachineSpeed
) -> Estimate:
    """What a stage takes by its trainer's defaults."""
    parameters, decoded = count_parameters(model), 0.0
    tokens, passes = file.tokens * args.epochs, 1.0
    if hasattr(args, "reward"):  # reinforcement learning
        completions = file.rows * args.epochs * getattr(args, "num_generations", 1)
        tokens = decoded = completions * ANSWER_TOKENS
        steps = file.rows * args.epochs / args.batch_size / args.accumulation_steps
        passes = args.update_epochs + 1 / 3 * (1 + args.needs_reference)  # log-probs: forward only
    else:
        passes += is_dpo(args) / 3  # the reference's log-probs, once
        step_tokens = args.batch_size * args.accumulation_steps * args.max_seq_len
        steps = max(1.0, tokens / step_tokens)
    if args.max_steps:
        tokens, decoded = (count * min(1, args.max_steps / steps) for count in (tokens, decoded))
        steps = min(steps, args.max_steps)
    seconds = passes * tokens / speed.train + decoded / speed.decode + steps * speed.step
    return Estimate(
        data=file.name,
        minutes=0,
        tokens=tokens,
        seconds=seconds,
        memory=memory_of(args, model),
        # cached tokens, float16 weights, and a checkpoint with the optimizer's moments
        disk=CACHED_BYTES * file.tokens + (2 + 4 * 2.5) * parameters,
    )


def is_dpo(args: Any) -> bool:
    return hasattr(args, "label_smoothing")


def memory_of(args: Any, model: MiniMindForCausalLM) -> float:
    """Bytes, by the estimate that a trainer prints."""
    device = next(model.parameters()).device
    dtype = hardware.resolve_dtype(args.dtype, device)
    fixed, per_token = hardware.training_memory(
        model.config, model, device, dtype, args.optimizer, args.gradient_checkpointing
    )
    longest = args.max_seq_len + getattr(args, "max_gen_len", 0) * hasattr(args, "reward")
    sides = 1 + (rules_of(type(args))["data_path"]["released"] == "preferences")
    samples = getattr(args, args.batch_size_flag) * sides
    reference = 4 * count_parameters(model) if args.needs_reference else 0
    return fixed + reference + per_token * samples * longest


def evaluation_seconds(stages: list[str], speed: MachineSpeed) -> float:
    """Of bits per byte on 300 texts of some 150 tokens, and 40 answers of 200, by each stage; and
    the starts of the three commands that do this and make the page."""
    each = 300 * 150 / (3 * speed.train) + 40 * 200 / speed.decode
    return 3 * speed.start + len(stages) * each


def seconds_besides(speed: MachineSpeed) -> float:
    """Of a trainer, besides its training: its start, and an evaluation at its end."""
    return speed.start + HELD_OUT_TOKENS / (3 * speed.train)
