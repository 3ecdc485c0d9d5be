"""The scaling law of this project's recipe: held-out bits per byte by parameters and tokens.

    python benchmarks/learning/scaling_law.py --data_dir DIR --sizes 128x4 256x6 --tokens 2e5 8e5

DIR holds pretrain.jsonl.gz and pretrain_val.jsonl.gz. Every run is train_pretrain.py with its
defaults, and a schedule of its own length. Results are appended to --results as they come, a JSON
line each; a run that is there already is not repeated, and an interrupted one goes on.
"""

import json
import os
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT, ROOT


@dataclass
class Args:
    data_dir: str = option("", "folder of the data files", required=True)
    results: str = option(
        str(ROOT / "benchmarks/learning/scaling_law.jsonl"), "file of the results, JSON lines"
    )
    output: str = option(str(OUT / "scaling_law"), "folder of weights and checkpoints")
    sizes: list[str] = option([], "hidden size x layers, such as 256x6")
    tokens: list[float] = option([], "tokens of the runs of each size")
    learning_rates: list[float] = option([5e-4], "peak learning rates")
    recipe: str = option("", "more flags of the trainer, for experiments")
    seed: int = option(42, "random seed of weights and order")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from dataset.jsonl import as_line
from dataset.sampler import GlobalBatchSampler
from model.command_line import parse_arguments
from model.weights import read_info
from trainer import train_pretrain

SEQUENCE = 512


def main(args: Args) -> None:
    for tokens, size, rate in product(args.tokens, args.sizes, args.learning_rates):
        train(args, size, tokens, rate)


def train(args: Args, size: str, tokens: float, rate: float) -> None:
    """One run, unless the results have it."""
    width, depth = map(int, size.split("x"))
    steps = steps_for(tokens)
    key = dict(size=size, steps=steps, learning_rate=rate, seed=args.seed, recipe=args.recipe)
    if any(key.items() <= record.items() for record in read_results(args.results)):
        return
    name = f"{size}_{steps}_{rate:g}_{args.seed}{args.recipe.replace(' ', '')}"
    folder = Path(args.output) / name
    data = Path(args.data_dir)
    flags: dict[str, Any] = {
        "data_path": data / "pretrain.jsonl.gz",
        "val_path": data / "pretrain_val.jsonl.gz",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "learning_rate": rate,
        "max_steps": steps,
        "epochs": 1000,
        "eval_interval": 0,
        "log_interval": 20,
        "save_interval": 100,
        "save_dir": folder,
        "checkpoint_dir": folder,
        "resume": 1,
        "seed": args.seed,
    }
    argv = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    started = time.process_time()
    run = train_pretrain.main(parse_arguments(train_pretrain.Args, argv=argv + args.recipe.split()))
    if run["stopped"]:
        raise UserError("stopped; the same command goes on")
    info = read_info(folder / f"pretrain_{width}.pth") or {}
    record = key | {
        "parameters": info["parameters"],
        "tokens": run["num_tokens"],
        "bits_per_byte": run["eval_bpb"],
        "loss": run["eval_loss"],
        "core_seconds": round(time.process_time() - started, 1),
    }
    with open(args.results, "a", encoding="utf-8") as file:
        file.write(as_line(record))
    for file in folder.glob("*.checkpoint.pt"):
        os.remove(file)


def steps_for(tokens: float) -> int:
    """The optimizer steps of the default batch-size warmup that train so many tokens."""
    sampler = GlobalBatchSampler(
        10**9, batch_size=32, accumulation_steps=8, batch_ramp=200, initial_batch_size=2
    )
    for step, (_, after) in enumerate(sampler.bounds(), start=1):
        if after * SEQUENCE >= tokens:
            return step
    raise AssertionError


def read_results(path: str) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
