"""What each step of the way to the default costs and gains on a CUDA GPU.

    python benchmarks/speed/gpu_speed.py --data_path FILE [--json FILE]

For the 512×8 (25.8M parameters) and the 768×16 model (104M), in bfloat16 autocast, with
--batch_size rows of 512 tokens an update, each way of training on the same documents:

- plain: a Llama of transformers, one document (or one piece of at most 512 tokens) a row, padded to
  the longest; AdamW.
- packed: this project's model and Muon on packed rows, with a dense mask of the documents.
- varlen: attention over documents laid end to end instead, which computes nothing between them.
- compiled: each block compiled too (torch.compile); the trainers' default on a GPU.

Timed are whole updates (forward, backward, clipping, optimizer) on one batch that lies on the GPU,
and the optimizer alone. The first update, which compiles, is not among them. Real tokens are those
that are not padding. MFU is the operations that they need (the formula in train_speed.py) over the
data sheet's dense bf16 rate. The loss is that before the first update, of random weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from peers import peer_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from train_speed import needed_operations

from dataset.lm_dataset import load_documents
from dataset.packing import Rows, collate
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer, write_json
from trainer.common.hardware import autocast, describe_machine, peak_flops
from trainer.common.optimizers import make_optimizer

DEVICE = torch.device("cuda")
ROW = 512
SIZES = {"512×8": (512, 8), "768×16": (768, 16)}
WAYS = ("plain", "packed", "varlen", "compiled")


@dataclass
class Args:
    data_path: str = option("", "pretraining text, .jsonl or .jsonl.gz")
    batch_size: int = option(32, "rows an update")
    updates: int = option(20, "updates that are timed, of each way")
    json: str = option("", "also write the figures to this file")


def main(args: Args) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise UserError("this PyTorch sees no CUDA GPU, of which this would tell the speed")
    documents = load_documents(args.data_path, "text", load_tokenizer())
    report = {
        "date": str(date.today()),
        "machine": describe_machine(DEVICE),
        "torch": torch.__version__,
        "batch_size": args.batch_size,
        "models": {},
    }
    console = Console()
    for name, (width, depth) in SIZES.items():
        config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
        figures = {way: measure(way, config, documents, args) for way in WAYS}
        report["models"][name] = figures
        table = Table(
            title=f"{name}, {args.batch_size} rows of {ROW} an update", title_justify="left"
        )
        table.add_column("way")
        for column in figures["plain"]:
            table.add_column(column, justify="right")
        for way, row in figures.items():
            table.add_row(way, *(f"{value:,.4g}" for value in row.values()))
        console.print(table)
    print(f"{report['machine']}, torch {report['torch']}, {report['date']}")
    if args.json:
        write_json(args.json, report)
    return report


def measure(way: str, config: MiniMindConfig, documents, args: Args) -> dict[str, float]:
    """The figures of one way to train a model of this config."""
    rows = Rows(documents, ROW, packing=way != "plain")
    picked = [rows[row] for row in range(0, len(rows), max(1, len(rows) // args.batch_size))]
    picked = picked[: args.batch_size]
    batch = collate(picked).to(DEVICE)
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    if way == "plain":
        model = peer_of(config, use_cache=False).to(DEVICE)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=5e-4)
        padding = dict(attention_mask=(batch.input_ids != 0).long())
        loss_of = lambda: model(batch.input_ids, labels=batch.labels, **padding).loss  # noqa: E731
    else:
        model = MiniMindForCausalLM(config).to(DEVICE).train()
        optimizer = make_optimizer(model, "muon", 5e-4, 0.1)
        if way == "packed":
            model.model.uses_varlen = lambda hidden: False
        if way == "compiled":
            for block in model.model.layers:
                block.compile()
        inputs = dict(**batch.inputs, labels=batch.labels, return_logits=False)
        loss_of = lambda: model(**inputs).loss  # noqa: E731

    def update() -> Tensor:
        optimizer.zero_grad()
        with autocast(DEVICE, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    start = time.perf_counter()
    loss = update().item()
    first = time.perf_counter() - start
    for _ in range(5):
        update()
    each = seconds(update, args.updates)
    needed = needed_operations(config, picked, batch.labelled)
    return {
        "real tokens/s": batch.tokens / each,
        "ms an update": 1000 * each,
        "of it optimizer": 1000 * seconds(optimizer.step, args.updates),
        "MFU %": 100 * needed / each / (peak_flops(DEVICE, torch.bfloat16) or float("nan")),
        "GB": torch.cuda.max_memory_allocated() / 1e9,
        "first update, s": first,
        "loss": loss,
    }


def seconds(work: Callable[[], Any], times: int) -> float:
    """How long it takes each time."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in tqdm(range(times), leave=False):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
