"""What small models gain most from: changes of the default pretraining, compared at equal time.

    python benchmarks/learning/small_models.py --data_dir DIR                   all, in their order
    python benchmarks/learning/small_models.py --data_dir DIR --variant qk_norm --seeds 42 43

DIR holds pretrain, pretrain_val, sft and sft_val (.jsonl.gz). The default recipe trains one epoch
of --tokens random tokens of pretrain. Every other variant trains for the same time: as many tokens
as its speed allows, which is measured beside the default's, 20 steps of each in turn, in CPU
seconds of this process (on one thread: OMP_NUM_THREADS=1). So other work on the machine matters
little.

Results are lines of --results, written as they come. A training that is there is not repeated, and
one that was interrupted goes on, so that the same command does what is left. Several processes may
share the work. The table is printed at the end, or at once with --table 1.
"""

from dataclasses import dataclass
from pathlib import Path

from model.command_line import option, parse_command_line
from model.errors import exit_on_user_error
from model.paths import OUT, ROOT

RESULTS = ROOT / "benchmarks" / "learning" / "small_models.jsonl"


@dataclass
class Args:
    data_dir: str = option("", "folder of the data files")
    variant: list[str] = option([], "which variants; default: all")
    tokens: int = option(1_000_000, "tokens of the default recipe", at_least=10_000)
    sft_tokens: int = option(200_000, "tokens of fine-tuning, where a variant is fine-tuned")
    seeds: list[int] = option([42], "seeds of weights, choice and order of the data")
    hidden_size: int = option(192, "hidden size")
    num_hidden_layers: int = option(4, "number of layers")
    documents: int = option(500, "held-out documents; 0: all", at_least=0)
    results: str = option(str(RESULTS), "file of the results, JSON lines")
    output: str = option(str(OUT / "small_models"), "folder of weights, logs and checkpoints")
    table: bool = option(False, "print the table of what there is, without training")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import json
import statistics
import time
from collections.abc import Iterator
from datetime import date
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from small_model_training import (
    HeldOut,
    Variant,
    embedding_from_counts,
    fine_tune,
    make_data,
    make_model,
    train,
)

from dataset.lm_dataset import load_documents
from dataset.packing import collate
from model.errors import UserError
from model.weights import count_parameters, load_tokenizer
from trainer import train_pretrain
from trainer.common.optimizers import make_optimizer

SPEED_STEPS, SPEED_TOKENS = 20, 2048  # of each of the two; a step of the middle of the training
NOISE = 0.01  # bits per byte: smaller differences of one seed mean nothing

# In the order in which they are run: what promises most comes first. `same_speed` where only the
# data or their order differ.
VARIANTS = {
    "default": Variant("one epoch", averages=True, then_sft=True, same_speed=True),
    "pmi_embedding": Variant(
        "initial embedding from counts of neighbouring tokens", embedding_from_counts=0.02
    ),
    "heads_4_kv_4": Variant(
        "4 heads of 48, 4 KV heads", dict(num_attention_heads=4, num_key_value_heads=4)
    ),
    "mix_sft": Variant(
        "half of the last 30% are conversations", mix_last=0.3, then_sft=True, same_speed=True
    ),
    "epochs_4": Variant("4 epochs of a quarter", epochs=4, same_speed=True),
    "seq_256": Variant("sequences of 256", dict(max_seq_len=256, batch_size=64)),
    "cut_first": Variant("pieces of 128 tokens in the first 30%", cut_first=0.3, same_speed=True),
    "trapezoid": Variant(
        "learning rate constant for the first half",
        dict(lr_schedule="trapezoid"),
        averages=True,
        same_speed=True,
    ),
    "qk_norm": Variant("q/k norm", dict(qk_norm=True)),
    "kv_heads_4": Variant("4 KV heads", dict(num_key_value_heads=4)),
    "deep": Variant("160×6, 2.70M", dict(hidden_size=160, num_hidden_layers=6)),
    "wide": Variant(
        "256×2, 2.85M", dict(hidden_size=256, num_hidden_layers=2, intermediate_size=576)
    ),
    "momentum": Variant("momentum from 0.8 to 0.95", last_momentum=0.95, same_speed=True),
    "epochs_4_residual_dropout": Variant(
        "4 epochs, dropout 0.1 except in attention",
        dict(dropout=0.1),
        epochs=4,
        residual_dropout=True,
    ),
    "pmi_embedding_large": Variant(
        "initial embedding from counts, three times as large", embedding_from_counts=0.06
    ),
    "short_first": Variant(
        "the first 30% from the half with more documents", short_first=0.3, same_speed=True
    ),
    "constant": Variant(
        "constant learning rate", dict(lr_schedule="constant"), averages=True, same_speed=True
    ),
    "epochs_8": Variant("8 epochs of an eighth", epochs=8, same_speed=True),
    "epochs_8_residual_dropout": Variant(
        "8 epochs, dropout 0.1 except in attention",
        dict(dropout=0.1),
        epochs=8,
        residual_dropout=True,
    ),
    "mix_sft_mask": Variant(
        "the same conversations, loss on answers only",
        mix_last=0.3,
        mix_loss_mask=True,
        then_sft=True,
        same_speed=True,
    ),
    "heads_4": Variant("4 heads of 48, 2 KV heads", dict(num_attention_heads=4)),
    "heads_4_kv_4_qk_norm": Variant(
        "4 heads of 48, 4 KV heads, q/k norm",
        dict(num_attention_heads=4, num_key_value_heads=4, qk_norm=True),
    ),
    "kv_heads_8": Variant("8 KV heads", dict(num_key_value_heads=8)),
    "epochs_2": Variant("2 epochs of a half", epochs=2, same_speed=True),
    "deeper": Variant("128×10, 2.70M", dict(hidden_size=128, num_hidden_layers=10)),
    "epochs_4_dropout": Variant("4 epochs, dropout 0.1", dict(dropout=0.1), epochs=4),
    "residual_dropout": Variant(
        "one epoch, dropout 0.1 except in attention", dict(dropout=0.1), residual_dropout=True
    ),
}


# -- results, a line of JSON each ------------------------------------------------------------------


class Results:
    """The lines of a file that belong to these settings."""

    def __init__(self, args: Args):
        self.path = Path(args.results)
        names = ("tokens", "sft_tokens", "hidden_size", "num_hidden_layers", "documents")
        self.setting = {name: getattr(args, name) for name in names}

    def lines(self, kind: str) -> Iterator[dict]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == kind and record["setting"] == self.setting:
                yield record

    def add(self, kind: str, **values) -> dict:
        record = {"kind": kind, "date": str(date.today()), **values, "setting": self.setting}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return record

    def speed(self, name: str) -> dict | None:
        return next((each for each in self.lines("speed") if each["variant"] == name), None)

    def runs(self, name: str) -> dict[int, dict]:
        """By seed."""
        return {each["seed"]: each for each in self.lines("run") if each["variant"] == name}


# -- equal time ------------------------------------------------------------------------------------


def trainer_args(args: Args, name: str, seed: int) -> train_pretrain.Args:
    variant, out = VARIANTS[name], str(Path(args.output) / f"{name}-{seed}")
    sizes = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers")}
    common: dict[str, Any] = dict(
        data_path=[f"{args.data_dir}/pretrain.jsonl.gz"],
        val_path=[f"{args.data_dir}/pretrain_val.jsonl.gz"],
        save_dir=out,
        checkpoint_dir=out,
        device="cpu",
        epochs=variant.epochs,
        seed=seed,
        num_workers=0,
        log_interval=20,
        save_interval=50,
        resume=True,
    )
    return train_pretrain.Args(**(common | sizes | variant.flags))


def measure_speed(args: Args, name: str) -> dict[str, float]:
    """CPU seconds of a token, of the default recipe and of a variant, step by step in turn; and the
    seconds that the variant takes before its first step."""
    steps, begun = [], {}
    for each in ("default", name):
        variant, flags = VARIANTS[each], trainer_args(args, each, seed=42)
        start = time.process_time()
        if variant.embedding_from_counts:
            documents = load_documents(flags.data_path, "text", load_tokenizer())
            embedding_from_counts(documents, 6400, args.hidden_size, 0.02)
        begun[each] = time.process_time() - start
        steps.append(training_step(args, each, flags))
    seconds: list[list[float]] = [[], []]
    for _ in range(SPEED_STEPS + 2):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.process_time()
            num_tokens = step()
            taken.append((time.process_time() - start) / num_tokens)
    default, this = (statistics.median(taken[2:]) for taken in seconds)
    ratio = statistics.median(b / a for a, b in list(zip(*seconds, strict=True))[2:])
    return {
        "seconds_per_token": round(this, 9),
        "default_seconds_per_token": round(default, 9),
        "slower": round(ratio, 4),
        "seconds_before": round(begun[name], 2),
    }


def training_step(args: Args, name: str, flags: train_pretrain.Args):
    """What trains SPEED_TOKENS tokens, and returns their number."""
    variant = VARIANTS[name]
    model = make_model(variant, flags)
    optimizer = make_optimizer(model, flags.optimizer, flags.learning_rate, flags.weight_decay)
    data, _ = make_data(variant, flags, 50_000, f"{args.data_dir}/sft.jsonl.gz")
    size = SPEED_TOKENS // flags.max_seq_len
    starts = iter(range(0, 10**9, size))

    def step() -> int:
        at = next(starts)
        batch = collate([data[n % len(data)] for n in range(at, at + size)])
        model(**batch.inputs, labels=batch.labels, return_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch.num_tokens

    return step


def tokens_in_equal_time(args: Args, results: Results, name: str) -> tuple[int, float]:
    """The tokens that a variant trains in the default's time, and how much slower a token is."""
    if VARIANTS[name].same_speed:
        return args.tokens, 1.0
    speed = results.speed(name)
    if speed is None:
        speed = results.add("speed", variant=name, **measure_speed(args, name))
    seconds = args.tokens * speed["default_seconds_per_token"] - speed["seconds_before"]
    return int(seconds / speed["default_seconds_per_token"] / speed["slower"]), speed["slower"]


# -- the work and its table ------------------------------------------------------------------------


def run(args: Args, results: Results, name: str, seed: int, held_out: HeldOut) -> None:
    variant = VARIANTS[name]
    tokens, slower = tokens_in_equal_time(args, results, name)
    flags = trainer_args(args, name, seed)
    weights, extra, model, trained = train(variant, flags, tokens, f"{args.data_dir}/sft.jsonl.gz")
    record = {
        "variant": name,
        "seed": seed,
        "parameters": count_parameters(model),
        "slower": slower,
        "trained_tokens": trained.progress.tokens,
        "steps": trained.step,
        "cpu_seconds": round(extra.seconds),
        **held_out.evaluate(model),
    }
    if variant.averages:
        record["averages"] = held_out.evaluate_averages(model, extra)
    if variant.then_sft:
        record["sft"] = fine_tune(weights, args.data_dir, args.sft_tokens, seed, held_out)
    results.add("run", **record)
    for checkpoint in weights.parent.glob("*.checkpoint.pt"):  # ten times as large as the weights
        checkpoint.unlink()


def show(results: Results) -> None:
    table = Table(title=f"bits per byte, {results.setting['tokens']:,} tokens of the default")
    columns = "variant, change, time of a token, tokens, seeds, bits per byte, against default, "
    columns += "zh, en, long texts, loss after SFT, bits per byte after SFT, best average"
    for column in columns.split(", "):
        table.add_column(column)
    default = results.runs("default")
    for name, variant in VARIANTS.items():
        runs = results.runs(name)
        if not runs:
            continue
        seeds = list(runs.values())
        both = sorted(set(runs) & set(default))
        gains = [runs[s]["bits_per_byte"] - default[s]["bits_per_byte"] for s in both]
        sft = [each["sft"] for each in seeds if "sft" in each]
        averages = [
            (mean(each["averages"][average] for each in seeds), average)
            for average in seeds[0].get("averages", {})
        ]
        cells = [
            name,
            variant.about,
            f"{seeds[0]['slower']:.2f}",
            f"{seeds[0]['trained_tokens']:,}",
            str(len(runs)),
            mean(each["bits_per_byte"] for each in seeds),
            f"{statistics.mean(gains):+.4f}" if gains else "",
            *(mean(each["languages"][language] for each in seeds) for language in ("zh", "en")),
            mean(each["long"] for each in seeds),
            mean(each["loss"] for each in sft) if sft else "",
            mean(each["bits_per_byte"] for each in sft) if sft else "",
            " ".join(min(averages, default=())),
        ]
        table.add_row(*cells)
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    console.print(f"one seed: a change of less than {NOISE} is noise")
    if left := [name for name in VARIANTS if not results.runs(name)]:
        console.print(f"not run yet: {', '.join(left)}")


def mean(values) -> str:
    return f"{statistics.mean(values):.4f}"


def main(args: Args) -> None:
    if unknown := set(args.variant) - set(VARIANTS):
        raise UserError(f"--variant knows {', '.join(VARIANTS)}, not {', '.join(sorted(unknown))}")
    results = Results(args)
    if args.table:
        return show(results)
    held_out = HeldOut(f"{args.data_dir}/pretrain_val.jsonl.gz", args.documents)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.variant or VARIANTS:
            try:  # another process may be at it
                with FileLock(Path(args.output) / f"{name}-{seed}.lock", timeout=0):
                    if seed not in results.runs(name):
                        run(args, results, name, seed, held_out)
            except Timeout:
                continue
    show(results)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
