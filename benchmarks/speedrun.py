"""Time to quality: how soon a recipe reaches the bits per byte that the plain way has at its end.

    python benchmarks/speedrun.py --data_path FILE --val_path FILE [--json FILE] [--long 1]

The model has a fixed size: 256×6 (5.87M parameters), or 512×8 with --long. Held-out bits per byte
are those of bits_per_byte.py, on the first 300 documents of the validation file. Only training is
timed: not tokenising, evaluation or saving.

- The baseline is the plain way, written out below: a Llama of transformers, one document a row,
  cut off at 512 tokens and padded to them, 32 rows an update, AdamW at 5e-4, cosine over one epoch
  to a tenth, no warm-up, gradients clipped to norm 1, float32. 12 minutes.
- The recipe is what train_pretrain.py does by default, its schedule fitted to the time it is given
  (some steps before tell how many go into it): for each of --budgets, from the shortest, until a
  run ends below the baseline; and for 4 minutes.

seconds_to_baseline is when the shortest such run passed the baseline's figure, interpolated between
two evaluations; ratio is the baseline's time over it.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bits_per_byte import bits_per_byte, read_texts
from datasets import Dataset
from matplotlib import pyplot as plt
from peers import peer_of
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import load_documents
from model.command_line import option, parse_arguments
from model.errors import exit_on_user_error
from model.model_minimind import MiniMindConfig
from model.weights import OUT, load_tokenizer, write_json
from trainer import train_pretrain
from trainer.hardware import describe_machine
from trainer.plots import save_figure

DOCUMENTS = 300  # of the validation file
ROW = 512
Curve = list[tuple[float, float]]  # (seconds of training, bits per byte)


@dataclass
class Args:
    data_path: str = option("", 'JSONL of {"text": …}, .jsonl or .jsonl.gz')
    val_path: str = option("", "held-out documents, likewise")
    long: bool = option(False, "512×8 instead of 256×6")
    baseline_minutes: float = option(12.0, "how long the plain way trains")
    baseline_bpb: float = option(0.0, "do not run the baseline, it came to this")
    budgets: list[float] = option([40, 50, 60, 75, 90, 120, 180], "seconds to try, ascending")
    minutes: float = option(4.0, "how long the recipe trains in its second run; 0: leave it out")
    recipe: str = option("", "further flags of train_pretrain.py, for experiments")
    seed: int = option(42, "of weights and order")
    plot: str = option(str(OUT / "speedrun.png"), "the curves")
    json: str = option("", "also write the figures to this file")

    @property
    def sizes(self) -> dict[str, int]:
        width, depth = (512, 8) if self.long else (256, 6)
        return {"hidden_size": width, "num_hidden_layers": depth}


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer()
    texts = read_texts(args.val_path, DOCUMENTS)
    curves: dict[str, Curve] = {}
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "data": Path(args.data_path).name,
        "recipe": args.recipe,
        **args.sizes,
    }
    if not args.baseline_bpb:
        curves["baseline"], speed = train_plainly(args, tokenizer, texts)
        args.baseline_bpb = curves["baseline"][-1][1]
        report["baseline_tokens_per_second"] = round(speed, 1)
    report["baseline_bpb"] = round(args.baseline_bpb, 4)
    report["baseline_minutes"] = args.baseline_minutes
    for seconds in sorted(args.budgets):
        curve = train_by_recipe(args, texts, seconds)
        if curve[-1][1] <= args.baseline_bpb:
            curves[f"recipe, {seconds:g} s"] = curve
            reached = passing(curve, args.baseline_bpb)
            report["seconds_to_baseline"] = round(reached, 1)
            report["ratio"] = round(args.baseline_minutes * 60 / reached, 2)
            break
    if args.minutes:
        curve = train_by_recipe(args, texts, args.minutes * 60)
        curves[f"recipe, {args.minutes:g} min"] = curve
        report[f"bpb_at_{args.minutes:g}min"] = round(curve[-1][1], 4)
    report["curves"] = {
        name: [[round(seconds, 1), round(bpb, 4)] for seconds, bpb in curve]
        for name, curve in curves.items()
    }
    print(json.dumps({k: v for k, v in report.items() if k != "curves"}, indent=2))
    plot(curves, args)
    if args.json:
        write_json(args.json, report)
    return report


# -- the plain way ---------------------------------------------------------------------------------


def train_plainly(
    args: Args, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[Curve, float]:
    """The baseline's curve, and its real tokens a second."""
    documents = load_documents(args.data_path, "text", tokenizer)
    torch.manual_seed(args.seed)
    model = peer_of(MiniMindConfig(**args.sizes), use_cache=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    steps = math.ceil(len(documents) / 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, step / steps)))
    )
    limit = args.baseline_minutes * 60
    curve: Curve = [(0.0, bits_per_byte(model, tokenizer, texts))]
    seconds = tokens = 0.0
    bar = tqdm(total=round(limit), unit="s", desc="baseline")
    for ids in padded_batches(documents, args.seed):
        start = time.perf_counter()
        real = ids != tokenizer.pad_token_id
        labels = ids.masked_fill(~real, -100)
        model(input_ids=ids, attention_mask=real.long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        tokens += int(real.sum())
        bar.update(round(seconds) - bar.n)
        over = seconds >= limit
        if over or seconds - curve[-1][0] > limit / 12:
            curve.append((seconds, bits_per_byte(model, tokenizer, texts)))
            bar.set_postfix(bpb=f"{curve[-1][1]:.3f}")
        if over:
            break
    bar.close()
    return curve, tokens / seconds


def padded_batches(documents: Dataset, seed: int) -> Iterator[torch.Tensor]:
    """[32, 512] token ids, a document a row, shuffled anew in every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(documents))
        for at in range(0, len(order), 32):
            batch = np.zeros((32, ROW), dtype=np.int64)
            for row, ids in zip(batch, documents[order[at : at + 32]]["input_ids"], strict=False):
                row[: min(ROW, len(ids))] = ids[:ROW]
            yield torch.from_numpy(batch)


# -- the recipe ------------------------------------------------------------------------------------


def train_by_recipe(args: Args, texts: list[str], seconds: float) -> Curve:
    """The curve of train_pretrain.py with as many steps as fit the time."""
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "val.jsonl"
        held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

        def train(max_steps: int, eval_interval: int) -> list[dict]:
            flags = {
                "data_path": args.data_path,
                "val_path": held_out,
                "val_documents": DOCUMENTS,
                "epochs": 100,
                "max_steps": max_steps,
                "eval_interval": eval_interval,
                "log_interval": 5,
                "save_interval": 0,
                "save_dir": folder,
                "checkpoint_dir": folder,
                "seed": args.seed,
                **args.sizes,
            }
            words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            words += args.recipe.split()
            return train_pretrain.main(parse_arguments(train_pretrain.Args, None, words))["records"]

        trial = [record for record in train(20, 0) if "loss" in record]
        per_step = (trial[-1]["seconds"] - trial[1]["seconds"]) / (
            trial[-1]["step"] - trial[1]["step"]
        )
        steps = round(seconds / per_step)
        records = train(steps, math.ceil(steps / 12))
    return [(r["seconds"], r["val_bpb"]) for r in records if "val_bpb" in r]


def passing(curve: Curve, bpb: float) -> float:
    """When the curve falls below that figure."""
    before = (0.0, math.inf)
    for seconds, value in curve:
        if value <= bpb:
            if before[1] == math.inf:
                return seconds
            share = (before[1] - bpb) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    raise ValueError(f"the curve ends at {curve[-1][1]}, above {bpb}")


def plot(curves: dict[str, Curve], args: Args) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*[p for p in curve if p[0] > 0], strict=True), "o-", ms=3, label=name)
    axes.axhline(args.baseline_bpb, color="grey", lw=0.8, ls="--")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, args.plot)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
