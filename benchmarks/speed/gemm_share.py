"""The share of the machine's matrix-multiplication speed that a training step reaches.

    share = required floating-point operations / seconds / rate of the fastest matrix product

    required = 6 · (weights of the blocks' matrices) · tokens     2 forward, 4 backward
             + 6 · hidden · vocabulary · label tokens             the head, computed for these only
             + 12 · layers · hidden · Σ n(n+1)/2                  attention, over document lengths n

Attention counts the pairs of tokens that attend to each other, and nothing for masked pairs. What a
kernel computes for masked pairs, or twice, lowers the share. The rate is that of the fastest of
several large float32 products, measured in turn with the model. "packed" is rows of the data,
"whole" is rows of one document each, with labels everywhere.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from dataset.packing import Batch, PackedDataset, collate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.common.hardware import flops_per_token

PRODUCTS = [  # (m, k, n): products of m×k and k×n matrices; the fastest gives the machine's rate
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 512, 1408),  # the projections of the 512×8 model on 8 rows of 512
    (4096, 1408, 512),
    (4096, 512, 6400),  # its head
]
PRODUCT_SECONDS = 0.4  # per round and product
MODEL_SECONDS = 2.0  # per round and kind of rows


def measure_gemm_share(
    documents: Dataset, batch_size: int, max_seq_len: int, rounds: int
) -> dict[str, Any]:
    """Time forward and backward of the 512×8 model and matrix products in turn."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig()).train()
    ids = torch.randint(3, model.config.vocab_size, (batch_size, max_seq_len)).numpy()
    whole_rows = [[{"input_ids": row, "loss_mask": np.ones(len(row), bool)}] for row in ids]
    packed_rows = PackedDataset(documents, max_seq_len)
    rng = np.random.default_rng(0)

    products = {"{}×{}×{}".format(*sizes): make_product(*sizes) for sizes in PRODUCTS}
    rates: dict[str, list[float]] = {name: [] for name in (*products, "packed", "whole")}
    for _ in tqdm(range(rounds), desc="matrix products and the 512×8 model", leave=False):
        indices = rng.choice(len(packed_rows), min(batch_size, len(packed_rows)), replace=False)
        for name, (run, operations) in products.items():
            rates[name].append(measure_rate(run, operations, PRODUCT_SECONDS))
        for name, rows in (
            ("packed", [packed_rows[int(n)] for n in indices]),
            ("whole", whole_rows),
        ):
            batch = collate(rows)
            operations = required_operations(model.config, rows, batch.num_label_tokens)
            run = partial(forward_backward, model, batch)
            rates[name].append(measure_rate(run, operations, MODEL_SECONDS))

    medians = {name: statistics.median(values) / 1e9 for name, values in rates.items()}
    fastest = max(products, key=medians.__getitem__)
    shares = {
        name: [ours / peak for ours, peak in zip(rates[name], rates[fastest], strict=True)]
        for name in ("packed", "whole")
    }
    return {
        "gflops": round(medians[fastest], 1),
        "product": fastest,
        "products": {name: round(medians[name], 1) for name in products},
        "model_gflops": round(medians["packed"], 1),
        "share": round(statistics.median(shares["packed"]), 4),
        "whole_model_gflops": round(medians["whole"], 1),
        "whole_share": round(statistics.median(shares["whole"]), 4),
        "shares_of_rounds": {name: [round(s, 4) for s in each] for name, each in shares.items()},
    }


def make_product(m: int, k: int, n: int) -> tuple[Callable[[], Any], float]:
    """A matrix product to time, and its floating-point operations."""
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    return partial(torch.mm, left, right, out=out), 2 * m * k * n


def forward_backward(model: MiniMindForCausalLM, batch: Batch) -> None:
    model(**batch.inputs, labels=batch.labels, return_logits=False).loss.backward()
    model.zero_grad(set_to_none=True)


def required_operations(
    config: MiniMindConfig, rows: list[list[dict]], num_label_tokens: int
) -> float:
    """The floating-point operations of forward and backward, by the formula at the top."""
    lengths = [len(document["input_ids"]) for row in rows for document in row]
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    head = 6 * config.hidden_size * config.vocab_size
    blocks = flops_per_token(config, seq_len=0) - head  # without its attention
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return blocks * tokens + head * num_label_tokens + attention * pairs


def measure_rate(run: Callable[[], Any], operations: float, seconds: float) -> float:
    """Floating-point operations per second of `run`, repeated for about `seconds`."""
    run()  # warm-up
    repeats, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds:
        run()
        repeats += 1
        elapsed = time.perf_counter() - start
    return repeats * operations / elapsed


def print_gemm_share(gemm: dict[str, Any]) -> None:
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
