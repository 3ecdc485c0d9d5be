"""Real tokens a second of training: this project against transformers' Trainer and trl.

    pip install trl
    python benchmarks/speed/train_speed.py --data_path FILE [--rounds 5] [--json FILE]

All train a Llama of the same size on the same tokenised documents with the same labels (of
conversations only what the assistant writes), from random weights, in float32 on the CPU with the
same number of threads, sdpa attention, fused AdamW, gradients clipped to norm 1, and --batch_size
rows of at most --max_seq_len tokens an update. A real token is one that is not padding.

- minimind: this project's trainer, called as its command line calls it, on packed rows. Documents
  longer than a row are split.
- padded_max: transformers' Trainer with LlamaForCausalLM, a row a document, cut off at max_seq_len
  and padded to it.
- padded_longest: the same, padded to the longest row of the batch; the order is random, so
  Trainer's group_by_length is not used.
- trl_bfd_joined: trl's SFTTrainer with packing=True, packing_strategy="bfd". It joins the rows of a
  batch to one sequence, whose position_ids begin anew with each document ("padding-free"). Made for
  flash attention, it works on a CPU too: from such position_ids transformers' Llama makes a mask
  under which documents do not see each other. But that mask is as wide as all rows together, and
  attention computes the square of it.
- trl_bfd_single: the same with one row a batch and --batch_size batches an update, which avoids
  that. The ratio "trl_bfd" is to the faster of the two.

What is timed is whole steps: fetching and collating the batch, forward, backward, clipping, update.
Tokenising, packing, evaluation, saving and logging are not, nor is the first step of a round. In
each round every contestant trains for about --seconds, one after the other; a first round of a step
or two is not counted. The table shows medians over the rounds; a ratio is the median of the rounds'
own ratios, since other work on a machine slows down neighbours in time alike.

Then (--gemm 0: not) the share of the machine's matrix speed that forward and backward of a 512×8
model (25.8M parameters) reach, without the optimizer:

    share = needed floating point operations / seconds / the fastest matrix product's rate

    needed = 6 · (weights of the blocks' matrices) · tokens     2 forward, 4 backward
           + 6 · hidden · vocabulary · labelled tokens          the head, computed for these only
           + 12 · layers · hidden · Σ n(n+1)/2                  attention: over documents' lengths n

Attention counts the pairs of tokens that see each other, and nothing for those that are masked;
what a kernel computes in vain, or twice, lowers the share. The rate is that of the fastest of
several large float32 products, measured in turn with the model. "packed" is rows of the data,
"whole" is rows of one document each, all of it labelled.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any, Literal

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from data_speed import kind_of
from datasets import Dataset, disable_progress_bars
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

from dataset.lm_dataset import check_file, load_documents
from dataset.packing import Batch, Rows, collate
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.losses import IGNORED
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer, write_json
from trainer import train_full_sft, train_pretrain
from trainer.common.hardware import describe_machine, flops_per_token

STAGES = {"text": train_pretrain, "conversations": train_full_sft}
PRODUCTS = [  # m×k times k×n of the matrix products whose rate is the machine's
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 512, 1408),  # the projections of the 512×8 model on 8 rows of 512
    (4096, 1408, 512),
    (4096, 512, 6400),  # its head
]
PRODUCT_SECONDS = 0.4  # a round, for each
MODEL_SECONDS = 2.0  # a round, for each
ENDLESS = 10**6


@dataclass
class Args:
    data_path: str = option("", "what to train on, .jsonl or .jsonl.gz")
    kind: Literal["", "text", "conversations"] = option("", "default: what the first row is")
    hidden_size: int = option(256, "width")
    num_hidden_layers: int = option(6, "depth")
    max_seq_len: int = option(512, "tokens in a row")
    batch_size: int = option(8, "rows an update")
    rounds: int = option(5, "how often each contestant is timed")
    seconds: float = option(10.0, "how long, each time")
    gemm: bool = option(True, "also measure the share of the machine's matrix speed")
    json: str = option("", "also write the figures to this file")


def main(args: Args) -> dict[str, Any]:
    if min(args.rounds, args.batch_size) < 1 or args.seconds <= 0:
        raise UserError("--rounds, --batch_size and --seconds must be more than 0")
    source = check_file(args.data_path)
    kind = args.kind or kind_of(source)
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
        report["gemm"] = share_of_gemm(args, documents)
        print_gemm(report["gemm"])
    print(f"{report['machine']}, {report['date']}")
    if args.json:
        write_json(args.json, report)
    return report


# -- the race --------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Some steps of training."""

    tokens: int  # that are not padding
    places: int  # padding included
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


# A contestant trains for about so many seconds, on data in an order that the seed determines.
Contestant = Callable[[float, int], Measured]


def race(contestants: dict[str, Contestant], args: Args) -> dict[str, Any]:
    """Let all contestants train in turn, round after round."""
    results: dict[str, list[Measured]] = {name: [] for name in contestants}
    with tqdm(total=(args.rounds + 1) * len(contestants), leave=False) as bar:
        for number in range(args.rounds + 1):
            for name, train in contestants.items():
                bar.set_description(f"round {number} of {args.rounds}, {name}")
                measured = train(args.seconds if number else 1.0, number)
                if number:  # round 0 warms up
                    results[name].append(measured)
                bar.update()

    speeds = {name: [each.tokens_per_second for each in some] for name, some in results.items()}
    medians = {name: statistics.median(some) for name, some in speeds.items()}
    ratios = {
        name: [ours / other for ours, other in zip(speeds["minimind"], some, strict=True)]
        for name, some in speeds.items()
        if name != "minimind"
    }
    ratios["trl_bfd"] = ratios[max(("trl_bfd_joined", "trl_bfd_single"), key=medians.get)]
    return {
        "contestants": {
            name: {
                "tokens_per_second": round(medians[name], 1),
                "rounds": [round(speed, 1) for speed in speeds[name]],
                "padding": round(1 - sum(m.tokens for m in some) / sum(m.places for m in some), 4),
                "tokens": sum(measured.tokens for measured in some),
            }
            for name, some in results.items()
        },
        "ratios": {name: round(statistics.median(some), 3) for name, some in ratios.items()},
        "ratios_of_rounds": {name: [round(r, 3) for r in some] for name, some in ratios.items()},
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
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # trl would send some
    transformers.logging.set_verbosity_error()
    sizes = MiniMindConfig(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    dataset = with_labels(documents)
    cut = with_labels(documents, args.max_seq_len)
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
                cut,
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


def with_labels(documents: Dataset, longest: int | None = None) -> Dataset:
    """The documents in memory, as transformers and trl take them: input_ids and labels; perhaps cut
    off behind the first `longest` tokens."""
    table = documents.with_format("arrow")[:]
    input_ids, loss_mask = (
        pc.list_slice(table[name], 0, longest).combine_chunks()
        for name in ("input_ids", "loss_mask")
    )
    ids = input_ids.flatten().to_numpy().astype(np.int32)
    labels = np.where(loss_mask.flatten().to_numpy(zero_copy_only=False), ids, np.int32(IGNORED))
    ends = np.cumsum(pc.list_value_length(input_ids).to_numpy())
    offsets = pa.array(np.concatenate(([0], ends)), pa.int32())
    columns = {"input_ids": ids, "labels": labels}
    return Dataset(
        pa.table({name: pa.ListArray.from_arrays(offsets, ids) for name, ids in columns.items()})
    )


class MiniMind:
    """The project's own trainer. Its log has the tokens and the seconds of its steps."""

    def __init__(self, args: Args, kind: str, folder: str):
        self.args, self.stage, self.folder = args, STAGES[kind], folder
        self.step_seconds: float | None = None  # as measured the last time

    def __call__(self, seconds: float, seed: int) -> Measured:
        steps = 1 + max(1, round(seconds / (self.step_seconds or seconds)))
        settings = self.stage.Args(
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
            log_interval=steps,  # besides the first
            eval_interval=0,
            save_interval=0,
            num_workers=0,
            device="cpu",
            seed=seed,
            save_dir=self.folder,
            checkpoint_dir=self.folder,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            records = self.stage.main(settings)["records"]
        first, last = (record for record in records if "tokens_per_second" in record)
        tokens = last["tokens"] - first["tokens"]
        measured = tokens / last["tokens_per_second"]
        self.step_seconds = measured / (steps - 1)
        places = (steps - 1) * self.args.batch_size * self.args.max_seq_len
        return Measured(tokens, places, measured)


class HuggingFace(TrainerCallback):
    """A Trainer of transformers or trl, stopped when the time is over."""

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase):
        self.trainer, self.pad_token_id = trainer, tokenizer.pad_token_id
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def __call__(self, seconds: float, seed: int) -> Measured:
        self.limit = seconds
        torch.manual_seed(seed)  # from which the order of the data follows
        self.trainer.train()
        return Measured(self.tokens, self.places, self.seconds)

    def count(self, model: LlamaForCausalLM, args: tuple, inputs: dict[str, Tensor]) -> None:
        """Before each forward pass."""
        self.places += inputs["input_ids"].numel()
        self.tokens += int((inputs["input_ids"] != self.pad_token_id).sum())

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.places = self.tokens = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self.start, self.places, self.tokens = now, 0, 0
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


# -- the share of the machine's matrix speed -------------------------------------------------------


def share_of_gemm(args: Args, documents: Dataset) -> dict[str, Any]:
    """Forward and backward of the 512×8 model and matrix products in turn, --rounds times."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig()).train()
    ids = torch.randint(3, model.config.vocab_size, (args.batch_size, args.max_seq_len)).numpy()
    whole = [[{"input_ids": row, "loss_mask": np.ones(len(row), bool)}] for row in ids]
    packed = Rows(documents, args.max_seq_len)
    rng = np.random.default_rng(0)

    products = {"{}×{}×{}".format(*sizes): product(*sizes) for sizes in PRODUCTS}
    rates: dict[str, list[float]] = {name: [] for name in (*products, "packed", "whole")}
    for _ in tqdm(range(args.rounds), desc="matrix products and the 512×8 model", leave=False):
        chosen = rng.choice(len(packed), min(args.batch_size, len(packed)), replace=False)
        for name, (work, operations) in products.items():
            rates[name].append(rate(work, operations, PRODUCT_SECONDS))
        for name, rows in (("packed", [packed[int(row)] for row in chosen]), ("whole", whole)):
            batch = collate(rows)
            operations = needed_operations(model.config, rows, batch.labelled)
            work = partial(forward_and_backward, model, batch)
            rates[name].append(rate(work, operations, MODEL_SECONDS))

    medians = {name: statistics.median(some) / 1e9 for name, some in rates.items()}
    best = max(products, key=medians.__getitem__)
    shares = {
        name: [ours / peak for ours, peak in zip(rates[name], rates[best], strict=True)]
        for name in ("packed", "whole")
    }
    return {
        "gflops": round(medians[best], 1),
        "product": best,
        "products": {name: round(medians[name], 1) for name in products},
        "model_gflops": round(medians["packed"], 1),
        "share": round(statistics.median(shares["packed"]), 4),
        "whole_model_gflops": round(medians["whole"], 1),
        "whole_share": round(statistics.median(shares["whole"]), 4),
        "shares_of_rounds": {name: [round(s, 4) for s in some] for name, some in shares.items()},
    }


def product(m: int, k: int, n: int) -> tuple[Callable[[], Any], float]:
    """A matrix product to time, and its floating point operations."""
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    return partial(torch.mm, left, right, out=out), 2 * m * k * n


def forward_and_backward(model: MiniMindForCausalLM, batch: Batch) -> None:
    model(**batch.inputs, labels=batch.labels, return_logits=False).loss.backward()
    model.zero_grad(set_to_none=True)


def needed_operations(config: MiniMindConfig, rows: list[list[dict]], labelled: int) -> float:
    """The formula at the top of this page."""
    lengths = [len(piece["input_ids"]) for row in rows for piece in row]
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    head = 6 * config.hidden_size * config.vocab_size
    blocks = flops_per_token(config, row_length=0) - head  # without its attention
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return blocks * tokens + head * labelled + attention * pairs


def rate(work: Callable[[], Any], operations: float, seconds: float) -> float:
    """Floating point operations a second of `work`, repeated for about `seconds`."""
    work()
    times, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds:
        work()
        times += 1
        elapsed = time.perf_counter() - start
    return times * operations / elapsed


def print_gemm(gemm: dict[str, Any]) -> None:
    products = ", ".join(f"{name} {speed:,.0f}" for name, speed in gemm["products"].items())
    print(f"matrix products, GFLOP/s: {products}")
    for name, model_gflops, share in (
        ("packed rows", gemm["model_gflops"], gemm["share"]),
        ("whole rows", gemm["whole_model_gflops"], gemm["whole_share"]),
    ):
        print(
            f"512×8, forward and backward, {name}: {model_gflops:,.0f} GFLOP/s, "
            f"{share:.1%} of {gemm['product']}'s {gemm['gflops']:,.0f}"
        )


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
