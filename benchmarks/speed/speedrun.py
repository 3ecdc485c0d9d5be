"""Time to quality: how soon a recipe reaches the final quality of a plain baseline.

    python benchmarks/speed/speedrun.py --data_path FILE --val_path FILE [--json FILE] [--long 1]
    python benchmarks/speed/speedrun.py --stage full_sft --from_weight W.pth --data_path …

The model has a fixed size: 256×6 (5.87M parameters), or 512×8 with --long. Quality is held-out bits
per byte as in eval_ppl.py, or with --stage full_sft the loss per answer token, on the first 300
documents of the validation file. Only training is timed: not tokenising, evaluation or saving.

- The baseline is a plain training loop, written out below: a Llama of transformers, one document
  per row, truncated or padded to 512 tokens, 32 rows per step (16 in fine-tuning), AdamW at 5e-4
  (in fine-tuning the best of --baseline_lrs, each tried for a third of the time), cosine decay over
  one epoch to a tenth, no warmup, gradient clipping at 1, in the type that --dtype auto chooses.
  12 minutes.
- The recipe is the trainer with its defaults and as many steps as fit the time (by a trial run):
  for each of --budgets in order, until a run ends below the baseline; and for 4 minutes.

seconds_to_baseline is when the shortest such run reached the baseline's final value, interpolated
between two evaluations; ratio is the baseline's time divided by it.
"""

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dataset.jsonl import read_lines
from model.command_line import option, parse_arguments, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from trainer.common.arguments import TrainArgs


@dataclass
class Args:
    stage: Literal["pretrain", "full_sft"] = option("pretrain", "stage to train")
    data_path: str = option("", "JSONL to train on, .jsonl or .jsonl.gz", required=True)
    val_path: str = option("", "held-out documents, in the same format", required=True)
    from_weight: str = option("", "with --stage full_sft: the initial weights of all")
    long: bool = option(False, "512×8 instead of 256×6")
    size: str = option("", "another size, such as 768x16")
    baseline_minutes: float = option(12.0, "training time of the baseline")
    baseline_lrs: list[float] = option([1e-4, 2e-4, 5e-4], "learning rates tried in fine-tuning")
    baseline_figure: float = option(0.0, "skip the baseline and use this as its final value")
    device: str = option("cpu", "cpu or cuda")
    budgets: list[float] = option([20, 25, 30, 40, 50, 60, 75, 90], "seconds to try, ascending")
    minutes: float = option(4.0, "training time of the recipe's second run; 0: skip")
    recipe: str = option("", "more flags of the trainer, for experiments")
    seed: int = option(42, "random seed of weights and order")
    plot: str = option(str(OUT / "speedrun.png"), "file of the plot")
    json: str = option("", "also write the results to this file")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+x\d+)?", self.size):
            raise UserError(f"--size is hidden size x layers, such as 768x16, not {self.size}")
        if self.stage == "full_sft" and not self.from_weight:
            raise UserError("--stage full_sft needs initial weights: --from_weight FILE")

    @property
    def sizes(self) -> dict[str, int]:
        named = self.size or ("512x8" if self.long else "256x6")
        width, depth = map(int, named.split("x"))
        return {"hidden_size": width, "num_hidden_layers": depth}


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from peers import peer_of
from tqdm import tqdm
from transformers import PreTrainedModel

from dataset.lm_dataset import load_documents
from dataset.packing import PackedDataset, collate
from dataset.sampler import GlobalBatchSampler
from model.losses import IGNORE_INDEX
from model.model_minimind import MiniMindConfig
from model.weights import load_model, load_tokenizer, write_json
from scripts.eval_ppl import bits_per_byte, read_texts
from trainer import train_full_sft, train_pretrain
from trainer.common.compute_optimal import Speed
from trainer.common.context import Context
from trainer.common.hardware import autocast, describe_machine, resolve_device, resolve_dtype
from trainer.common.loop import initial_batch_size
from trainer.report.forecast import seconds_per_step
from trainer.report.plots import save_figure

DOCUMENTS, ROW = 300, 512  # documents of the validation file, tokens of a row
Curve = list[tuple[float, float]]  # (seconds of training, held-out metric)
STAGES = {  # stage → trainer, format of the data, metric, label of the metric
    "pretrain": (train_pretrain, "text", "bpb", "bits per byte"),
    "full_sft": (train_full_sft, "conversations", "loss", "loss, nats a token of the answers"),
}


def main(args: Args) -> dict[str, Any]:
    metric = STAGES[args.stage][2]
    curves: dict[str, Curve] = {}
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(resolve_device(args.device)),
        "stage": args.stage,
        "data": Path(args.data_path).name,
        "recipe": args.recipe,
        **args.sizes,
    }
    goal = args.baseline_figure
    if not goal:
        curves["baseline"], more = baseline(args)
        report |= more
        goal = curves["baseline"][-1][1]
    report |= {f"baseline_{metric}": round(goal, 4), "baseline_minutes": args.baseline_minutes}
    report |= {"seconds_to_baseline": None, "ratio": None}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(args, Path(folder))
        for seconds in sorted(args.budgets):
            curve = recipe.curve(seconds)
            if curve[-1][1] <= goal:
                curves[f"recipe, {seconds:g} s"] = curve
                reached = time_to_reach(curve, goal)
                report["seconds_to_baseline"] = round(reached, 1)
                report["ratio"] = round(args.baseline_minutes * 60 / reached, 2)
                break
        else:
            print(f"no run of {args.budgets} s reached the baseline's {goal:.4f}")
        if args.minutes:
            curve = recipe.curve(args.minutes * 60)
            curves[f"recipe, {args.minutes:g} min"] = curve
            report[f"{metric}_at_{args.minutes:g}min"] = round(curve[-1][1], 4)
            report[f"seconds_at_{args.minutes:g}min"] = round(curve[-1][0], 1)
    report["curves"] = {
        name: [[round(seconds, 1), round(value, 4)] for seconds, value in curve]
        for name, curve in curves.items()
    }
    print(json.dumps({k: v for k, v in report.items() if k != "curves"}, indent=2))
    plot(curves, goal, args)
    if args.json:
        write_json(args.json, report)
    return report


# -- the baseline ----------------------------------------------------------------------------------


def baseline(args: Args) -> tuple[Curve, dict[str, Any]]:
    """The baseline's curve, and more entries of the report."""
    tokenizer = load_tokenizer()
    documents = load_documents(args.data_path, STAGES[args.stage][1], tokenizer)
    evaluate = make_evaluate(args)
    seconds = args.baseline_minutes * 60
    if args.stage == "pretrain":
        torch.manual_seed(args.seed)
        model = peer_of(MiniMindConfig(**args.sizes), use_cache=False).to(args.device)
        curve, speed = train_baseline(model, documents, evaluate, 5e-4, 32, seconds, args.seed)
        return curve, {"baseline_tokens_per_second": round(speed, 1)}

    def tuned(lr: float, seconds: float) -> tuple[Curve, float]:
        model = load_model(Path(args.from_weight), tokenizer=tokenizer)
        peer = peer_of(model.config, use_cache=False)
        peer.load_state_dict(model.state_dict())
        return train_baseline(peer.to(args.device), documents, evaluate, lr, 16, seconds, args.seed)

    tried = {lr: tuned(lr, seconds / 3)[0][-1][1] for lr in args.baseline_lrs}
    best = min(tried, key=tried.get)
    if len(tried) > 1 and best in (min(tried), max(tried)):
        print(f"warning: the best learning rate, {best:g}, is at the end of those tried")
    curve, speed = tuned(best, seconds)
    return curve, {
        "baseline_tokens_per_second": round(speed, 1),
        "baseline_lr": best,
        "baseline_lrs": {str(lr): round(loss, 4) for lr, loss in tried.items()},
    }


def make_evaluate(args: Args) -> Callable[[PreTrainedModel], float]:
    """The function that evaluates a model of transformers as the trainer evaluates its own."""
    tokenizer = load_tokenizer()
    if args.stage == "pretrain":
        texts = read_texts(args.val_path, DOCUMENTS)
        return lambda model: bits_per_byte(model, tokenizer, texts)
    documents = load_documents(args.val_path, "conversations", tokenizer)
    rows = PackedDataset(documents, ROW, np.arange(min(DOCUMENTS, len(documents))), packing=False)
    order = np.argsort(rows.chunks.length, kind="stable")

    @torch.inference_mode()
    def loss(model: PreTrainedModel) -> float:
        nats = labelled = 0.0
        for at in range(0, len(rows), 16):
            batch = collate([rows[row] for row in order[at : at + 16].tolist()]).to(args.device)
            logits = model(batch.input_ids).logits[
                :, :-1
            ]  # padding is on the right: causal attention ignores it
            labels = batch.labels[:, 1:]
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            ).item()
            labelled += batch.num_label_tokens
        return nats / labelled

    return loss


def train_baseline(
    model: PreTrainedModel,
    documents: Dataset,
    evaluate: Callable[[PreTrainedModel], float],
    learning_rate: float,
    batch_size: int,
    limit: float,
    seed: int,
) -> tuple[Curve, float]:
    """Train for `limit` seconds; returns the curve and the speed in real tokens per second."""
    device = model.device
    dtype = resolve_dtype("auto", device)

    def held_out() -> float:
        with autocast(device, dtype):  # as the trainer evaluates
            return evaluate(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    steps = math.ceil(len(documents) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, step / steps)))
    )
    curve: Curve = [(0.0, held_out())]
    seconds = tokens = 0.0
    bar = tqdm(total=round(limit), unit="s", desc=f"baseline, learning rate {learning_rate:g}")
    for ids, labels in padded_batches(documents, batch_size, seed):
        start = time.perf_counter()
        ids, labels = ids.to(device), labels.to(device)
        real = ids != 0
        with autocast(device, dtype):
            loss = model(input_ids=ids, attention_mask=real.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int(real.sum())  # synchronises with a GPU
        seconds += time.perf_counter() - start
        bar.update(round(seconds) - bar.n)
        over = seconds >= limit
        if over or seconds - curve[-1][0] > limit / 12:
            curve.append((seconds, held_out()))
            bar.set_postfix(held_out=f"{curve[-1][1]:.3f}")
        if over:
            break
    bar.close()
    return curve, tokens / seconds


def padded_batches(
    documents: Dataset, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels [batch_size, 512], one document per row, shuffled in every epoch; the
    last batch of an epoch is smaller."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(documents))
        for at in range(0, len(order), batch_size):
            some = documents[order[at : at + batch_size]]
            ids = np.zeros((len(some["input_ids"]), ROW), dtype=np.int64)
            labels = np.full_like(ids, IGNORE_INDEX)
            for row, (tokens, loss_mask) in enumerate(
                zip(some["input_ids"], some["loss_mask"], strict=True)
            ):
                tokens, loss_mask = tokens[:ROW], loss_mask[:ROW]
                ids[row, : len(tokens)] = tokens
                labels[row, : len(tokens)] = np.where(loss_mask, tokens, IGNORE_INDEX)
            yield torch.from_numpy(ids), torch.from_numpy(labels)


# -- the recipe ------------------------------------------------------------------------------------


class StepCost(NamedTuple):
    """The size of an optimizer step, and its time."""

    rows: int
    tokens: float
    seconds: float


class Recipe:
    """The stage's trainer with its defaults, with as many steps as fit a given time."""

    def __init__(self, args: Args, folder: Path):
        self.args, self.folder = args, folder
        self.trainer, kind, metric, _ = STAGES[args.stage]
        self.metric = f"eval_{metric}"
        self.held_out = folder / "val.jsonl"
        if kind == "text":
            texts = read_texts(args.val_path, DOCUMENTS)
            lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
        else:
            lines = [line for _, line in islice(read_lines(args.val_path), DOCUMENTS)]
        self.held_out.write_bytes(b"".join(lines))
        # time of a step = fixed + rows · per_row, from two measurements
        few, many = map(self.trial, (2, 8) if args.device == "cpu" else (32, 128))
        self.per_row = (many.seconds - few.seconds) / (many.rows - few.rows)
        self.fixed = few.seconds - few.rows * self.per_row
        self.tokens_per_row = many.tokens / many.rows

    @property
    def settings(self) -> TrainArgs:
        data = ["--data_path", self.args.data_path]
        return parse_arguments(self.trainer.Args, None, [*data, *self.args.recipe.split()])

    def trial(self, rows: int) -> StepCost:
        """Measure steps of about so many rows, in whole batches."""
        batch = min(rows, self.settings.batch_size)
        accumulation, steps = rows // batch, 25
        size = f"--batch_size {batch} --accumulation_steps {accumulation} --batch_ramp 0"
        records = self.train(f"{size} --val_share 0", max_steps=steps)
        tokens = max(record.get("num_tokens", 0) for record in records)
        return StepCost(batch * accumulation, tokens / steps, seconds_per_step(records))

    def curve(self, seconds: float) -> Curve:
        steps = max(1, self.steps_within(seconds))
        held_out = f"--val_path {self.held_out} --val_documents {DOCUMENTS}"
        records = self.train(held_out, max_steps=steps, eval_interval=math.ceil(steps / 12))
        return [(r["seconds"], r[self.metric]) for r in records if self.metric in r]

    def steps_within(self, seconds: float) -> int:
        settings = self.settings
        full = settings.batch_size * settings.accumulation_steps
        first = initial_batch_size(Context.create(settings), self.tokens_per_row)
        warmup = dict(batch_ramp=settings.batch_ramp, initial_batch_size=first)
        sampler = GlobalBatchSampler(10**9, batch_size=full, **warmup)
        return Speed(self.fixed, self.per_row).steps_within(seconds, sampler)[0]

    def train(self, extra: str, **settings: int) -> list[dict]:
        """Run the trainer with these flags after those of --recipe; returns its records."""
        flags = {
            "data_path": self.args.data_path,
            "from_weight": self.args.from_weight or "none",
            "device": self.args.device,
            "epochs": 100,
            "log_interval": 5,
            "save_interval": 0,
            "save_dir": self.folder,
            "checkpoint_dir": self.folder,
            "seed": self.args.seed,
            **self.args.sizes,
            **settings,
        }
        argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        argv += [*self.args.recipe.split(), *extra.split()]
        result = self.trainer.main(parse_arguments(self.trainer.Args, None, argv))
        if result["stopped"]:
            raise UserError("the benchmark was stopped")
        return result["history"]


def time_to_reach(curve: Curve, goal: float) -> float:
    """The time at which the curve falls to the goal, interpolated linearly."""
    before = (0.0, math.inf)
    for seconds, value in curve:
        if value <= goal:
            if before[1] == math.inf:
                return seconds
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    raise ValueError(f"the curve ends at {curve[-1][1]}, above {goal}")


def plot(curves: dict[str, Curve], goal: float, args: Args) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*[p for p in curve if p[0] > 0], strict=True), "o-", ms=3, label=name)
    axes.axhline(goal, color="grey", lw=0.8, ls="--")
    axes.set(xscale="log", xlabel="seconds of training")
    axes.set_ylabel(f"held-out {STAGES[args.stage][3]}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, args.plot)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
