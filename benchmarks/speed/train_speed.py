"""Training speed in real tokens per second: this project, transformers' Trainer, trl.

    pip install trl
    python benchmarks/speed/train_speed.py --data_path FILE [--rounds 5] [--json FILE]

All train a Llama of the same size on the same tokenised documents with the same labels (in
conversations only the assistant's tokens), from random weights, in float32 on the CPU with the same
number of threads, SDPA, fused AdamW, gradients clipped to norm 1, and --batch_size rows of at most
--max_seq_len tokens per step. A real token is one that is not padding.

- minimind: this project's trainer, called as by its command line, on packed rows. Documents longer
  than a row are split.
- padded_max: transformers' Trainer with LlamaForCausalLM, one document per row, truncated at
  max_seq_len and padded to it.
- padded_longest: the same, padded to the longest row of the batch, in random order (without
  Trainer's group_by_length).
- trl_bfd_joined: trl's SFTTrainer with packing=True, packing_strategy="bfd". It joins the rows of a
  batch to one sequence whose position_ids restart with each document ("padding-free"). It is made
  for flash attention but works on a CPU: from such position_ids transformers' Llama makes a
  block-diagonal mask. But that mask is as wide as all rows together, and attention computes all of
  its square.
- trl_bfd_single: the same with one row per batch and --batch_size batches per step, which avoids
  that. The ratio "trl_bfd" is to the faster of the two.

Timed are whole steps: fetching and collating the batch, forward, backward, clipping, optimizer.
Not timed are tokenising, packing, evaluation, saving, logging, and the first step of each round. In
each round every contestant trains for about --seconds, one after the other, after a warm-up round
that is not counted. The table shows medians over the rounds. A ratio is the median of the ratios of
each round, since other load on the machine slows down neighbours in time alike.

Then (--gemm 0: not) the share of the machine's matrix-multiplication speed that forward and
backward of a 512×8 model (25.8M parameters) reach, without the optimizer; see gemm_share.py.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from dataset.jsonl import check_file
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    data_path: str = option("", "training data, .jsonl or .jsonl.gz")
    kind: Literal["", "text", "conversations"] = option(
        "", "format of the data; default: that of the first row"
    )
    hidden_size: int = option(256, "hidden size")
    num_hidden_layers: int = option(6, "number of layers")
    max_seq_len: int = option(512, "length of a row, in tokens")
    batch_size: int = option(8, "rows per step")
    rounds: int = option(5, "number of rounds")
    seconds: float = option(10.0, "training time of each contestant per round")
    gemm: bool = option(True, "also measure the share of the machine's matrix-multiplication speed")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from data_speed import detect_kind
from datasets import Dataset, disable_progress_bars
from gemm_share import measure_gemm_share, print_gemm_share
from peers import peer_of
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dataset.lm_dataset import load_documents
from model.losses import IGNORE_INDEX
from model.model_minimind import MiniMindConfig
from model.weights import load_tokenizer, write_json
from trainer import train_full_sft, train_pretrain
from trainer.common.hardware import describe_machine

TRAINERS = {"text": train_pretrain, "conversations": train_full_sft}
ENDLESS = 10**6


def main(args: Args) -> dict[str, Any]:
    if min(args.rounds, args.batch_size) < 1 or args.seconds <= 0:
        raise UserError("--rounds, --batch_size and --seconds must be more than 0")
    source = check_file(args.data_path)
    kind = args.kind or detect_kind(source)
    tokenizer = load_tokenizer()
    documents = load_documents(source, kind, tokenizer)
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": source.name,
        "kind": kind,
        "documents": len(documents),
        "arguments": vars(args),
    }
    with tempfile.TemporaryDirectory() as folder:
        report |= race(make_contestants(args, kind, documents, tokenizer, folder), args)
    print_race(report)
    if args.gemm:
        report["gemm"] = measure_gemm_share(
            documents, args.batch_size, args.max_seq_len, args.rounds
        )
        print_gemm_share(report["gemm"])
    print(f"{report['machine']}, {report['date']}")
    if args.json:
        write_json(args.json, report)
    return report


# -- the race --------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """Some steps of training."""

    tokens: int  # without padding
    positions: int  # with padding
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


# (seconds, seed) → trains for about so long, on data in an order that the seed determines
Contestant = Callable[[float, int], Measurement]


def race(contestants: dict[str, Contestant], args: Args) -> dict[str, Any]:
    """Train all contestants in turn, --rounds times."""
    results: dict[str, list[Measurement]] = {name: [] for name in contestants}
    with tqdm(total=(args.rounds + 1) * len(contestants), leave=False) as bar:
        for number in range(args.rounds + 1):
            for name, train in contestants.items():
                bar.set_description(f"round {number} of {args.rounds}, {name}")
                measurement = train(args.seconds if number else 1.0, number)
                if number:  # round 0 warms up
                    results[name].append(measurement)
                bar.update()

    speeds = {name: [m.tokens_per_second for m in each] for name, each in results.items()}
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    ratios = {
        name: [ours / theirs for ours, theirs in zip(speeds["minimind"], each, strict=True)]
        for name, each in speeds.items()
        if name != "minimind"
    }
    ratios["trl_bfd"] = ratios[max(("trl_bfd_joined", "trl_bfd_single"), key=medians.get)]
    return {
        "contestants": {
            name: {
                "tokens_per_second": round(medians[name], 1),
                "rounds": [round(speed, 1) for speed in speeds[name]],
                "padding": round(
                    1 - sum(m.tokens for m in each) / sum(m.positions for m in each), 4
                ),
                "tokens": sum(m.tokens for m in each),
            }
            for name, each in results.items()
        },
        "ratios": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
        "ratios_of_rounds": {name: [round(r, 3) for r in each] for name, each in ratios.items()},
    }


def make_contestants(
    args: Args,
    kind: str,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
) -> dict[str, Contestant]:
    try:
        from trl import SFTConfig, SFTTrainer  # with accelerate, which Trainer needs
    except ImportError as error:
        raise UserError(f"this benchmark needs trl; `pip install trl` ({error})") from None
    disable_progress_bars()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # trl would send it
    transformers.logging.set_verbosity_error()
    sizes = MiniMindConfig(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    dataset = with_labels(documents)
    truncated = with_labels(documents, args.max_seq_len)
    settings = dict(
        output_dir=folder,
        max_steps=ENDLESS,
        per_device_train_batch_size=args.batch_size,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,  # slower than float32 on CPUs
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def padded(padding: str) -> HuggingFace:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=padding, max_length=args.max_seq_len)
        return HuggingFace(
            Trainer(
                peer_of(sizes, use_cache=False),
                TrainingArguments(**settings),
                collator,
                truncated,
            ),
            tokenizer,
        )

    def packed(batch_size: int) -> HuggingFace:
        config = SFTConfig(
            **settings
            | dict(
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=args.batch_size // batch_size,
                gradient_checkpointing=False,  # trl's own default is True
                max_length=args.max_seq_len,
                packing=True,
                packing_strategy="bfd",
            )
        )
        trainer = SFTTrainer(
            peer_of(sizes, use_cache=False),
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        return HuggingFace(trainer, tokenizer)

    return {
        "minimind": MiniMind(args, kind, folder),
        "padded_max": padded("max_length"),
        "padded_longest": padded("longest"),
        "trl_bfd_joined": packed(args.batch_size),
        "trl_bfd_single": packed(1),
    }


def with_labels(documents: Dataset, max_length: int | None = None) -> Dataset:
    """The documents in memory with input_ids and labels, as transformers and trl take them,
    truncated to max_length tokens."""
    table = documents.with_format("arrow")[:]
    input_ids, loss_mask = (
        pc.list_slice(table[name], 0, max_length).combine_chunks()
        for name in ("input_ids", "loss_mask")
    )
    ids = input_ids.flatten().to_numpy().astype(np.int32)
    labels = np.where(
        loss_mask.flatten().to_numpy(zero_copy_only=False), ids, np.int32(IGNORE_INDEX)
    )
    ends = np.cumsum(pc.list_value_length(input_ids).to_numpy())
    offsets = pa.array(np.concatenate(([0], ends)), pa.int32())
    columns = {"input_ids": ids, "labels": labels}
    return Dataset(
        pa.table({name: pa.ListArray.from_arrays(offsets, ids) for name, ids in columns.items()})
    )


class MiniMind:
    """This project's trainer. Tokens and seconds of its steps are in its log."""

    def __init__(self, args: Args, kind: str, folder: str):
        self.args, self.trainer, self.folder = args, TRAINERS[kind], folder
        self.step_seconds: float | None = None  # of the last round

    def __call__(self, seconds: float, seed: int) -> Measurement:
        steps = 1 + max(1, round(seconds / (self.step_seconds or seconds)))
        trainer_args = self.trainer.Args(
            data_path=[self.args.data_path],
            val_share=0.0,
            from_weight="none",
            hidden_size=self.args.hidden_size,
            num_hidden_layers=self.args.num_hidden_layers,
            max_seq_len=self.args.max_seq_len,
            batch_size=self.args.batch_size,
            batch_ramp=0,
            optimizer="adamw",
            accumulation_steps=1,
            learning_rate=5e-4,
            epochs=ENDLESS,
            max_steps=steps,
            log_interval=steps,  # the first step is always logged
            eval_interval=0,
            save_interval=0,
            num_workers=0,
            device="cpu",
            dtype="float32",
            seed=seed,
            save_dir=self.folder,
            checkpoint_dir=self.folder,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            records = self.trainer.main(trainer_args)["history"]
        first, last = (record for record in records if "tokens_per_second" in record)
        tokens = last["num_tokens"] - first["num_tokens"]
        elapsed = tokens / last["tokens_per_second"]
        self.step_seconds = elapsed / (steps - 1)
        positions = (steps - 1) * self.args.batch_size * self.args.max_seq_len
        return Measurement(tokens, positions, elapsed)


class HuggingFace(TrainerCallback):
    """A Trainer of transformers or trl, which stops when the time is over."""

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase):
        self.trainer, self.pad_token_id = trainer, tokenizer.pad_token_id
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def __call__(self, seconds: float, seed: int) -> Measurement:
        self.limit = seconds
        torch.manual_seed(seed)  # determines the order of the data
        self.trainer.train()
        return Measurement(self.tokens, self.positions, self.seconds)

    def count(self, model: LlamaForCausalLM, args: tuple, inputs: dict[str, Tensor]) -> None:
        """Before each forward pass."""
        self.positions += inputs["input_ids"].numel()
        self.tokens += int((inputs["input_ids"] != self.pad_token_id).sum())

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.positions = self.tokens = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self.start, self.positions, self.tokens = now, 0, 0
            return
        self.seconds = now - self.start
        control.should_training_stop = self.seconds >= self.limit


def print_race(report: dict[str, Any]) -> None:
    table = Table(title=f"training on {report['data']}, {report['documents']:,} documents")
    for column in ("", "tokens/s", "rounds", "padding", "minimind is faster by"):
        table.add_column(column, justify="right" if column else "left")
    ratios = report["ratios"]
    for name, row in report["contestants"].items():
        low, high = min(row["rounds"]), max(row["rounds"])
        table.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{row['padding']:.1%}",
            f"{ratios[name]:.2f}×" if name in ratios else "",
        )
    Console().print(table)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
