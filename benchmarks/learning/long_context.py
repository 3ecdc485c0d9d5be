"""Perplexity against length on texts longer than in training, with and without YaRN.

    python benchmarks/learning/long_context.py --data_path FILE --val_path FILE [--minutes 5]

Pretrains a model (256×6) on rows of --trained_length tokens, and evaluates it on held-out sequences
16 times as long: without YaRN, and with YaRN by a factor of 4 and of 16. The metric is the
perplexity of the tokens between one length and the next, each of which has all tokens before it as
context; it falls with the length if a model uses long context. The validation file must have
documents that long, or --join is needed. A model trained on little text hardly uses positions, so
that YaRN changes nothing; this is so with the demo's model:

    python benchmarks/learning/long_context.py \\
        --weight out/demo/pretrain_192.pth --trained_length 256 \\
        --val_path out/demo/data/pretrain_hq_val.jsonl --join 1
"""

import json
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT


@dataclass
class Args:
    data_path: str = option("", "JSONL to train on, .jsonl or .jsonl.gz")
    val_path: str = option("", "held-out documents, in the same format")
    weight: str = option("", "a .pth of this trained length, instead of training one")
    trained_length: int = option(128, "length of a row in training, in tokens")
    minutes: float = option(5.0, "training time")
    join: bool = option(False, "join the documents, for files of short ones")
    stretches: int = option(40, "maximum number of held-out sequences")
    plot: str = option(str(OUT / "long_context.png"), "file of the plot")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, ScalarFormatter
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dataset.lm_dataset import load_documents
from model.weights import load_model, load_tokenizer, write_json
from trainer import train_pretrain
from trainer.common.hardware import describe_machine
from trainer.report.forecast import seconds_per_step
from trainer.report.plots import save_figure

LENGTH_FACTOR = 16  # evaluated length / trained length
CALIBRATION_STEPS = 20


def main(args: Args) -> dict[str, Any]:
    if not args.val_path or not (args.data_path or args.weight):
        raise UserError("--val_path is required, and --data_path or --weight")
    tokenizer = load_tokenizer()
    length = LENGTH_FACTOR * args.trained_length
    sequences = long_sequences(args, length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.weight) if args.weight else pretrain(args, Path(folder))
        yarn = dict(inference_rope_scaling=True, yarn_original_length=args.trained_length)
        models = {
            "plain RoPE": load_model(path, tokenizer=tokenizer),
            "YaRN, factor 4": load_model(path, tokenizer=tokenizer, **yarn, yarn_factor=4.0),
            "YaRN, factor 16": load_model(path, tokenizer=tokenizer, **yarn, yarn_factor=16.0),
        }
    lengths = [args.trained_length // 4 * 2**n for n in range(7)]  # a quarter to 16 times
    perplexities = {}
    for name, model in models.items():
        by_position = loss_by_position(model, sequences, name)
        edges = [0, *lengths]
        perplexities[name] = [
            round(float(by_position[a:b].mean().exp()), 2)
            for a, b in zip(edges, edges[1:], strict=False)
        ]
    report = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "trained_length": args.trained_length,
        "stretches": len(sequences),
        "lengths": lengths,
        "perplexities": perplexities,
    }
    show(report)
    plot(report, args.plot)
    if args.json:
        write_json(args.json, report)
    return report


def long_sequences(args: Args, length: int) -> torch.Tensor:
    """[sequences, length + 1] token ids from documents that are long enough."""
    documents = load_documents(args.val_path, "text", load_tokenizer())
    texts = documents["input_ids"]
    if args.join:
        texts = [np.concatenate(list(texts))]
    sequences = []
    for ids in texts:
        sequences += [ids[at : at + length + 1] for at in range(0, len(ids) - length, length)]
    if not sequences:
        raise UserError(f"no document in {args.val_path} has {length + 1:,} tokens")
    indices = np.random.default_rng(0).permutation(len(sequences))[: args.stretches]
    return torch.from_numpy(np.stack([sequences[n] for n in indices]).astype(np.int64))


def pretrain(args: Args, folder: Path) -> Path:
    """Pretrain for args.minutes on rows of args.trained_length; returns the weights."""

    def train(steps: int) -> dict[str, Any]:
        return train_pretrain.main(
            train_pretrain.Args(
                data_path=[args.data_path],
                hidden_size=256,
                num_hidden_layers=6,
                max_seq_len=args.trained_length,
                device="cpu",
                epochs=100,
                max_steps=steps,
                log_interval=5,
                save_interval=0,
                eval_interval=0,
                save_dir=str(folder),
                checkpoint_dir=str(folder),
            )
        )

    step_seconds = seconds_per_step(train(CALIBRATION_STEPS)["history"])
    # the batch-size warmup makes later steps slower than the first
    train(max(1, round(args.minutes * 60 / step_seconds / 1.5)))
    return folder / "pretrain_256.pth"


@torch.inference_mode()
def loss_by_position(model, sequences: torch.Tensor, name: str) -> torch.Tensor:
    """[length] nats of the token at each position, mean over the sequences."""
    total = torch.zeros(sequences.shape[1] - 1)
    for ids in tqdm(sequences, desc=name, leave=False):
        logits = model(ids[None, :-1], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return total / len(sequences)


def show(report: dict[str, Any]) -> None:
    table = Table(
        title="perplexity between lengths",
        title_justify="left",
    )
    table.add_column("")
    for length in report["lengths"]:
        table.add_column(f"{length:,}", justify="right")
    for name, perplexities in report["perplexities"].items():
        table.add_row(name, *(f"{perplexity:.0f}" for perplexity in perplexities))
    Console().print(table)
    summary = {k: v for k, v in report.items() if k not in ("perplexities", "lengths")}
    print(json.dumps(summary))


def plot(report: dict[str, Any], path: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, perplexities in report["perplexities"].items():
        axes.plot(report["lengths"], perplexities, "o-", label=name)
    axes.axvline(report["trained_length"], color="grey", linestyle=":", label="trained length")
    axes.set(xlabel="length of the text, tokens", ylabel="perplexity", xscale="log", yscale="log")
    axes.set_xticks(report["lengths"], [f"{length:,}" for length in report["lengths"]])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
