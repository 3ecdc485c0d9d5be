"""What each step from a plain training loop to the default gains on a CUDA GPU.

    python benchmarks/speed/gpu_speed.py --data_path FILE [--json FILE]

For the 512×8 (25.8M parameters) and the 768×16 model (104M), in bfloat16 autocast, with
--batch_size rows of 512 tokens per step, on the same documents:

- plain: a Llama of transformers, one document (or a part of at most 512 tokens) per row, padded to
  the longest; AdamW.
- packed: this project's model and Muon on packed rows, with a dense block-diagonal mask.
- varlen: variable-length attention instead of the mask, which computes nothing across documents.
- compiled: each block is also compiled (torch.compile); the trainers' default on a GPU.

Timed are whole steps (forward, backward, clipping, optimizer) on one batch that is on the GPU, and
the optimizer alone, without the first step, which compiles. Real tokens are those that are not
padding. MFU is their required operations (the formula in gemm_share.py) over the data sheet's dense
bf16 rate. The loss is that of random weights, before the first step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    data_path: str = option("", "pretraining text, .jsonl or .jsonl.gz")
    batch_size: int = option(32, "rows per step")
    updates: int = option(20, "timed steps of each method")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import torch
from gemm_share import required_operations
from peers import peer_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from dataset.lm_dataset import load_documents
from dataset.packing import PackedDataset, collate
from model import attention
from model.attention import supports_varlen
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer, write_json
from trainer.common.hardware import autocast, describe_machine, peak_flops
from trainer.common.optimizers import make_optimizer

DEVICE = torch.device("cuda")
ROW = 512
SIZES = {"512×8": (512, 8), "768×16": (768, 16)}
METHODS = ("plain", "packed", "varlen", "compiled")


def main(args: Args) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU, and PyTorch finds none")
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
        metrics = {method: measure(method, config, documents, args) for method in METHODS}
        report["models"][name] = metrics
        table = Table(
            title=f"{name}, {args.batch_size} rows of {ROW} per step", title_justify="left"
        )
        table.add_column("method")
        for column in metrics["plain"]:
            table.add_column(column, justify="right")
        for method, row in metrics.items():
            table.add_row(method, *(f"{value:,.4g}" for value in row.values()))
        console.print(table)
    print(f"{report['machine']}, torch {report['torch']}, {report['date']}")
    if args.json:
        write_json(args.json, report)
    return report


def measure(method: str, config: MiniMindConfig, documents, args: Args) -> dict[str, float]:
    """Metrics of one method of training a model of this config."""
    rows = PackedDataset(documents, ROW, packing=method != "plain")
    picked = [rows[row] for row in range(0, len(rows), max(1, len(rows) // args.batch_size))]
    picked = picked[: args.batch_size]
    batch = collate(picked).to(DEVICE)
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    if method == "plain":
        model = peer_of(config, use_cache=False).to(DEVICE)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=5e-4)
        padding = dict(attention_mask=(batch.input_ids != 0).long())
        loss_of = lambda: model(batch.input_ids, labels=batch.labels, **padding).loss  # noqa: E731
    else:
        model = MiniMindForCausalLM(config).to(DEVICE).train()
        optimizer = make_optimizer(model, "muon", 5e-4, 0.1)
        packed = method == "packed"  # with a mask instead of varlen attention
        attention.supports_varlen = (lambda *_: False) if packed else supports_varlen
        if method == "compiled":
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
    step_seconds = mean_seconds(update, args.updates)
    required = required_operations(config, picked, batch.num_label_tokens)
    return {
        "real tokens/s": batch.num_tokens / step_seconds,
        "ms per step": 1000 * step_seconds,
        "of it optimizer": 1000 * mean_seconds(optimizer.step, args.updates),
        "MFU %": 100
        * required
        / step_seconds
        / (peak_flops(DEVICE, torch.bfloat16) or float("nan")),
        "GB": torch.cuda.max_memory_allocated() / 1e9,
        "first step, s": first,
        "loss": loss,
    }


def mean_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Mean time of a run on the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in tqdm(range(repeats), leave=False):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
