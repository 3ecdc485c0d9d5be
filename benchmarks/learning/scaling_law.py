"""The scaling law of the default recipe, and the size that a time of training wants.

    python benchmarks/learning/scaling_law.py --data_dir DIR --budgets 1 2 4
    python benchmarks/learning/scaling_law.py                        # the fit again, no training

DIR holds pretrain.jsonl.gz and pretrain_val.jsonl.gz. Every run is train_pretrain.py with its
defaults, the learning rate that --minutes gives its width and a schedule of its own length; the
figure is its held-out bits per byte. A budget is minutes of this machine's two cores: first each
size's speed is measured (for this the machine must be free), which turns minutes into tokens; the
runs may then share the machine. For each budget there are the size that --minutes of the trainer
would choose and its neighbours, or --sizes.

Speeds and runs are appended to --results as they come, a JSON line each. What is there already is
not repeated, an interrupted run goes on, and further budgets add to what is there. From all runs
but those of --held_out budgets, the law of trainer/common/compute_optimal.py is fitted:

    L(N, D) = E + A/N^α + B/D^β         (arXiv 2203.15556, eq. 2)

with least squares of the relative error. Its error is a bootstrap: the fit again, 200 times, to its
own predictions with residuals that are drawn from its residuals.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT, ROOT


@dataclass
class Args:
    data_dir: str = option("", "folder of the data files; none: fit what there is")
    results: str = option(
        str(ROOT / "benchmarks/learning/scaling_law.jsonl"), "file of the results, JSON lines"
    )
    output: str = option(str(OUT / "scaling_law"), "folder of checkpoints")
    budgets: list[float] = option([], "minutes of two cores, such as 5 10 20")
    sizes: list[str] = option([], "hidden size x layers, such as 256x6; default: see above")
    tokens: list[float] = option([], "tokens of the runs of --sizes, instead of budgets")
    learning_rates: list[float] = option(
        [], "peak learning rates; default: that of --minutes for the width"
    )
    recipe: str = option("", "more flags of the trainer, for experiments")
    seed: int = option(42, "random seed of weights and order")
    held_out: list[float] = option([3.0, 7.0, 30.0], "budgets that are not used for the fit")
    plot: str = option(str(ROOT / "benchmarks/figures/scaling_law.png"), "file of the plot")

    def __post_init__(self) -> None:
        if (self.budgets or self.tokens) and not self.data_dir:
            raise UserError("--budgets and --tokens train, and need --data_dir")
        if self.tokens and not self.sizes:
            raise UserError("--tokens needs --sizes")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scaling_fit import (
    DATA_TOKENS,
    SEQUENCE,
    Results,
    best_on_gpu,
    bootstrap,
    default_sampler,
    fit,
    parameters_of,
    plot,
)

from dataset.jsonl import as_line
from model.command_line import parse_arguments
from model.weights import count_parameters, load_tokenizer
from trainer import train_pretrain
from trainer.common.compute_optimal import (
    LAW,
    SIZES,
    ScalingLaw,
    Speed,
    effective_tokens,
    learning_rate,
    measure_speed,
)
from trainer.common.context import Context
from trainer.common.setup import init_model, load_packed

CORES = 2
NAMES = [f"{width}x{depth}" for width, depth in SIZES]


def main(args: Args) -> dict[str, Any]:
    if args.budgets:
        measure_speeds(args)
    for budget in args.budgets:
        for size in args.sizes or around_the_choice(budget, speeds_of(read_results(args.results))):
            speed = speeds_of(read_results(args.results))[size]
            steps, _ = speed.steps_within(60 * budget, default_sampler())
            train_all(args, size, steps, budget)
    for tokens in args.tokens:
        for size in args.sizes:
            train_all(args, size, steps_for(tokens), None)
    return report(args)


# -- speeds and runs -------------------------------------------------------------------------------


def steps_for(tokens: float) -> int:
    """The optimizer steps that train so many tokens."""
    for step, (_, after) in enumerate(default_sampler().bounds(), start=1):
        if after * SEQUENCE >= tokens:
            return step
    raise AssertionError


def measure_speeds(args: Args) -> None:
    """The time of a step of every size on both cores, in seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(CORES)
    tokenizer = load_tokenizer()
    for width, depth in SIZES[: NAMES.index("512x8") + 1]:
        size = f"{width}x{depth}"
        if size in speeds_of(read_results(args.results)):
            continue
        settings = train_pretrain.Args(
            data_path=[str(Path(args.data_dir) / "pretrain_val.jsonl.gz")],
            hidden_size=width,
            num_hidden_layers=depth,
            device="cpu",
        )
        ctx = Context.create(settings)
        train_data, _ = load_packed(ctx, tokenizer, "text")
        model = init_model(settings, tokenizer)
        speed = measure_speed(ctx, model, tokenizer, train_data)
        record = {"kind": "speed", "size": size, "parameters": count_parameters(model)}
        append(args.results, record | {k: round(v, 5) for k, v in speed._asdict().items()})
    torch.set_num_threads(threads)


def around_the_choice(budget: float, speeds: dict[str, Speed]) -> list[str]:
    """The size that --minutes chooses for a budget, and its neighbours."""
    choice = NAMES.index(choose(LAW, budget, speeds))
    return [size for size in NAMES[max(0, choice - 1) : choice + 2] if size in speeds]


def choose(law: ScalingLaw, budget: float, speeds: dict[str, Speed]) -> str:
    """The size that --minutes would choose."""

    def loss(size: str) -> float:
        _, samples = speeds[size].steps_within(60 * budget, default_sampler())
        parameters = parameters_of(*map(int, size.split("x")))
        return law.loss(parameters, samples * SEQUENCE, DATA_TOKENS)

    return min((size for size in NAMES if size in speeds), key=loss)


def rate_of(size: str) -> float:
    return learning_rate(int(size.split("x")[0]))


def train_all(args: Args, size: str, steps: int, budget: float | None) -> None:
    for rate in args.learning_rates or [rate_of(size)]:
        train(args, size, steps, rate, budget)


def train(args: Args, size: str, steps: int, rate: float, budget: float | None) -> None:
    """One run, unless the results have it."""
    width, depth = map(int, size.split("x"))
    key = dict(kind="run", size=size, steps=steps, learning_rate=rate, seed=args.seed)
    key |= dict(recipe=args.recipe, minutes=budget)
    if any(key.items() <= record.items() for record in read_results(args.results)):
        return
    name = f"{size}_{steps}_{rate:g}_{args.seed}{args.recipe.replace(' ', '')}"
    folder, data = Path(args.output) / name, Path(args.data_dir)
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
        "save_interval": 50,
        "save_dir": folder,
        "checkpoint_dir": folder,
        "resume": 1,
        "seed": args.seed,
    }
    argv = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    run = train_pretrain.main(parse_arguments(train_pretrain.Args, argv=argv + args.recipe.split()))
    if run["stopped"]:
        raise UserError("stopped; the same command goes on")
    measured = {"parameters": parameters_of(width, depth), "tokens": run["num_tokens"]}
    append(args.results, key | measured | {"bits_per_byte": run["eval_bpb"]})
    for file in folder.glob("*.checkpoint.pt"):
        os.remove(file)


def append(path: str, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(as_line(record))


def read_results(path: str) -> Results:
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def speeds_of(results: Results) -> dict[str, Speed]:
    """Seconds of both cores, by size, the smallest first."""
    records = [record for record in results if record["kind"] == "speed"]
    records.sort(key=lambda record: record["parameters"])
    return {each["size"]: Speed(each["update"], each["sample"]) for each in records}


# -- what it says ----------------------------------------------------------------------------------


def report(args: Args) -> dict[str, Any]:
    """Print the law, its test on the held-out budgets and its forecasts; draw it."""
    results = read_results(args.results)
    speeds = {size: speed for size, speed in speeds_of(results).items() if size in NAMES}
    defaults = dict(kind="run", recipe="", seed=42)
    runs = [record for record in results if defaults.items() <= record.items()]
    runs = [run for run in runs if run["learning_rate"] == rate_of(run["size"])]
    fitted = [run for run in runs if run["minutes"] not in args.held_out]
    if len(fitted) < 6:
        print(f"{len(fitted)} runs: a law of five constants needs six")
        return {}
    law = fit(
        [run["parameters"] for run in fitted],
        [effective_tokens(run["tokens"], DATA_TOKENS) for run in fitted],
        [run["bits_per_byte"] for run in fitted],
    )
    laws = bootstrap(law, fitted)
    residuals = [
        run["bits_per_byte"] - law.loss(run["parameters"], run["tokens"], DATA_TOKENS)
        for run in fitted
    ]
    console = Console(highlight=False)
    console.print(f"{len(fitted)} runs, residuals of {np.std(residuals):.4f} bits per byte")
    for name, value in asdict(law).items():
        low, high = np.percentile([getattr(each, name) for each in laws], (16, 84))
        console.print(f"  {name:5} {value:9.4g}   68%: {low:.4g} to {high:.4g}")
    tests = show_tests(console, args, runs, law, speeds)
    forecasts = show_forecasts(console, law, laws)
    plot(args.plot, runs, law, speeds, args.held_out)
    return {"law": asdict(law), "tests": tests, "forecasts": forecasts}


def show_tests(
    console: Console, args: Args, runs: Results, law: ScalingLaw, speeds: dict[str, Speed]
) -> dict[float, float]:
    """At each held-out budget, how --minutes chooses against the best size tried; returns how much
    worse it is, in bits per byte."""
    table, behind = Table(title="budgets not used for the fit", title_justify="left"), {}
    for column in ("minutes", "sizes tried, bits per byte", "choice", "behind the best"):
        table.add_column(column)
    for budget in args.held_out:
        tried = {run["size"]: run["bits_per_byte"] for run in runs if run["minutes"] == budget}
        choice = choose(law, budget, speeds)
        if choice in tried:
            behind[budget] = round(tried[choice] - min(tried.values()), 4)
        listed = ", ".join(f"{size} {value:.3f}" for size, value in tried.items())
        shown = f"{behind[budget]:.3f}" if budget in behind else "not run"
        table.add_row(f"{budget:g}", listed or "none yet", choice, shown)
    console.print(table)
    return behind


def show_forecasts(
    console: Console, law: ScalingLaw, laws: list[ScalingLaw]
) -> dict[str, dict[str, Any]]:
    """What two hours of a GPU would give, on data such as these."""
    table, forecasts = Table(title="two hours of a GPU, a forecast", title_justify="left"), {}
    for column in ("GPU", "size", "parameters", "tokens", "bits per byte", "68%"):
        table.add_column(column)
    for gpu, most in (("3090", 0.25), ("H100", 1.0)):
        size, tokens, loss = best_on_gpu(law, gpu, most)
        low, high = np.percentile([best_on_gpu(each, gpu, most)[2] for each in laws], (16, 84))
        forecasts[gpu] = dict(size=size, tokens=tokens, loss=loss, low=low, high=high)
        parameters = parameters_of(*map(int, size.split("x")))
        row = (f"{parameters / 1e6:.0f}M", f"{tokens / 1e9:.2f}G", f"{loss:.2f}")
        table.add_row(gpu, size, *row, f"{low:.2f} to {high:.2f}")
    console.print(table)
    return forecasts


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
