"""What scripts/runs/minimind.sh is going to do, and what that takes: time, disk, memory, money.

    python scripts/runs/plan.py --save_dir out/minimind --minutes 60
    python scripts/runs/plan.py --save_dir out/minimind --stage full_sft

The first prints the table that comes before everything else, and keeps it as plan.json in the
folder; --minutes is divided over the stages. A folder with a plan has it printed again, with what
is finished. The second prints the flags that the plan has for the command of one step, and nothing
if there is nothing left to do.

Tokens are counted in a sample of the data, speeds are measured here with the model itself, memory
is the trainers' own estimate (trainer/report/forecast.py).
"""

import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dataset.released import SETS, SIZES, STAGE_FILES, default_data
from model.command_line import option, parse_arguments, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from scripts.runs.stages import (
    DEFAULT,
    NUMBER,
    STAGES,
    flags_of,
    in_hours,
    in_order,
    is_finished,
    missing_data,
    read_plan,
    stopped_quietly,
)


@dataclass
class Args:
    save_dir: str = option(str(OUT / "minimind"), "folder of the run")
    data_dir: str = option("", "folder of the data files; default: dataset/, after a download")
    stages: list[str] = option(DEFAULT, f"what to train, of {', '.join(STAGES)}")
    minutes: float = option(0.0, "time for everything; 0: whole epochs", at_least=0)
    price: str = option("", "of an hour of this machine, such as 1.5 or '1.5 RMB'")
    flags: str = option("", "what is given to every trainer, as --flags='--preset minimind-3'")
    stage: str = option("", "print the flags of one step only: a stage, data, benchmarks, chat")

    def __post_init__(self) -> None:
        if self.price and not re.search(NUMBER, self.price):
            raise UserError(f"PRICE is a number, such as 1.5 or '1.5 RMB', not {self.price}")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)
    with exit_on_user_error():
        if args.stage:
            print(flags_of(args.stage, args.save_dir))
            sys.exit()
        args.stages = in_order(args.stages, args.save_dir)


import importlib
import shlex
import shutil

import psutil
import torch
from rich.console import Console
from rich.table import Table

from model.weights import count_parameters, load_tokenizer, write_json
from scripts.runs.estimates import (
    DataFile,
    Estimate,
    MachineSpeed,
    estimate,
    evaluation_seconds,
    measure_file,
    measure_machine,
    released_file,
    seconds_besides,
)
from trainer.common import hardware
from trainer.common.compute_optimal import candidates, guess, sizes_given
from trainer.common.context import Context
from trainer.common.setup import init_model
from trainer.report.forecast import duration

SMALLEST_CUT = 5_000_000  # bytes of a file that are always read
LONGEST = 24 * 3600  # seconds that a run without --minutes may take on a CPU
console = Console(highlight=False)


def main(args: Args) -> dict[str, Any]:
    folder, plan = Path(args.save_dir), read_plan(args.save_dir)
    check_alone(folder)
    for name, before, now in (
        ("MINUTES", f"{plan.get('minutes', 0):g}", f"{args.minutes:g}"),
        ("DATA", plan.get("data_dir", ""), args.data_dir),
    ):
        if plan and before != now:
            raise UserError(
                f"{folder} has a run that was begun with {name}={before}: go on with the same, or "
                "begin another one with another OUT"
            )
    if missing := set(args.stages) - plan.get("stages", {}).keys():  # or more stages than before
        new = make_plan(args, [each for each in args.stages if each in missing], plan.get("size"))
        both = plan.get("stages", {}) | new["stages"]
        plan = plan | new | {"stages": {stage: both[stage] for stage in STAGES if stage in both}}
    plan |= {"price": args.price, "flags": args.flags}
    show(plan, folder)
    write_json(folder / "plan.json", plan)
    return plan


def check_alone(folder: Path) -> None:
    """UserError if a trainer writes to the folder, as one does whose script was killed."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and any("trainer/train_" in word for word in words):
            raise UserError(
                f"process {process.pid} trains in {folder}: wait until it has ended, or end it "
                f"with `kill {process.pid}`, which saves first"
            )


# -- estimates -------------------------------------------------------------------------------------


def make_plan(args: Args, stages: list[str], size: dict[str, int] | None) -> dict[str, Any]:
    """Measure data and machine. UserError if a stage has no data, or a CPU would take days.

    Args:
        size: of the model, if the run has one already.
    """
    missing = missing_data(stages, args.data_dir)
    if missing and args.data_dir:
        default_data(STAGES[missing[0]].data, args.data_dir)  # raises, with the names it looked for
    trainers = {stage: trainer_args(stage, args) for stage in stages}
    tokenizer, files = load_tokenizer(trainers[stages[0]].tokenizer_path), {}
    for stage in stages:
        name = default_name(stage, args, stage in missing)
        files[stage] = measure_file(name, tokenizer) if Path(name).exists() else released_file(name)
    first = trainers[stages[0]]
    first.minutes = args.minutes * STAGES[stages[0]].share / sum(STAGES[s].share for s in stages)
    device = hardware.resolve_device(first.device)
    ctx = Context(first, device, hardware.resolve_dtype(first.dtype, device), compile=False)
    if not size and first.minutes and not sizes_given(first):
        sizes = candidates(ctx, tokenizer)
        size = sizes[guess(ctx, tokenizer, sizes, round(files[stages[0]].tokens))]
    if size:  # its weights may not be there yet
        first = replace(first, from_weight="none", **size)
    model = init_model(first, tokenizer)
    speed = measure_machine(ctx, model, tokenizer)
    cut = cut_files(60 * args.minutes, files, speed) if args.minutes else {}
    estimates = {stage: estimate(trainers[stage], files[stage], model, speed) for stage in stages}
    evaluation = evaluation_seconds(stages, speed)
    reading = reading_seconds(files, speed)
    if args.minutes:
        divide(60 * args.minutes, estimates, reading, evaluation, seconds_besides(speed))
    else:
        for each in estimates.values():
            each.seconds += seconds_besides(speed)
    total = reading + sum(each.seconds for each in estimates.values())
    if device.type == "cpu" and not args.minutes and total > LONGEST:
        raise UserError(
            f"without a GPU this would take about {total / 86400:.0f} days here; MINUTES=60 fits "
            "model and data to this machine and an hour, and more minutes make a better model"
        )
    return {
        "data_dir": args.data_dir,
        "minutes": args.minutes,
        "flags": args.flags,
        "machine": hardware.describe_machine(device),
        "device": device.type,
        "parameters": count_parameters(model),
        "size": {n: getattr(model.config, n) for n in ("hidden_size", "num_hidden_layers")},
        "speed": speed._asdict(),
        "download": sum(SIZES[name] for name in SETS["mini"]) if missing else 0,
        "reading": reading,
        "evaluation": evaluation,
        "cut": cut,
        "stages": {stage: asdict(each) for stage, each in estimates.items()},
    }


def reading_seconds(files: dict[str, DataFile], speed: MachineSpeed) -> float:
    """To tokenise each file once, though several stages may read it."""
    return sum(size for _, size in {(f.name, f.bytes) for f in files.values()}) / speed.tokenize


def cut_files(seconds: float, files: dict[str, DataFile], speed: MachineSpeed) -> dict[str, int]:
    """Where reading all would take a tenth of the time or more: {file: bytes of it that are twice
    what its stages can train in their shares}, and `files` with these."""
    if reading_seconds(files, speed) < seconds / 10:
        return {}
    shares, enough = sum(STAGES[stage].share for stage in files), {}
    for stage, file in files.items():
        tokens = 2 * speed.train * seconds * STAGES[stage].share / shares
        needed = max(SMALLEST_CUT, round(tokens * file.bytes / max(1, file.tokens)))
        enough[file.name] = max(needed, enough.get(file.name, 0))
    for stage, file in files.items():
        part = min(1.0, enough[file.name] / file.bytes)
        files[stage] = DataFile(file.name, *(part * count for count in file[1:]))
        if part == 1:
            enough.pop(file.name, None)
    return enough


def divide(
    seconds: float,
    estimates: dict[str, Estimate],
    reading: float,
    evaluation: float,
    besides: float,
) -> None:
    """Give each stage its part of the time: what it needs, or its share of what is left; and
    pretraining, which can always go on, what the others leave.

    Args:
        reading: seconds to tokenise the data, once.
        evaluation: seconds after the last stage.
        besides: seconds of each trainer's start and evaluation. At most half of the time is kept
            for all that.
    """
    left = seconds - reading
    if left < seconds / 2:
        raise UserError(
            f"to read the data takes about {duration(reading)} of MINUTES={seconds / 60:g}; give "
            "more minutes, or a DATA folder with less: `python scripts/prepare_data.py mix` cuts"
        )
    kept = evaluation + len(estimates) * besides
    left -= min(kept, left / 2)
    order = sorted(estimates, key=lambda stage: (stage == "pretrain", estimates[stage].seconds))
    for number, stage in enumerate(order):
        each, shares = estimates[stage], sum(STAGES[other].share for other in order[number:])
        given = left * STAGES[stage].share / shares
        if stage != "pretrain":
            given = min(given, 1.1 * each.seconds)
        left -= given
        each.tokens *= given / each.seconds
        each.minutes, each.seconds = round(given / 60, 2), given + besides


def trainer_args(stage: str, args: Args) -> Any:
    """The arguments that its trainer will have; a mistake in --flags is told now."""
    trainer = importlib.import_module(f"trainer.{STAGES[stage].trainer}")
    argv = ["--save_dir", args.save_dir, *shlex.split(args.flags)]
    return parse_arguments(trainer.Args, argv=argv)


def default_name(stage: str, args: Args, is_missing: bool) -> str:
    """The path of the file that a stage will read, or the name of the one to be downloaded."""
    files = STAGE_FILES[STAGES[stage].data]
    if is_missing:
        return next(name for name in files if name in SETS["mini"])
    return default_data(STAGES[stage].data, args.data_dir)


# -- the table -------------------------------------------------------------------------------------


def show(plan: dict[str, Any], folder: Path) -> None:
    stages, price = plan["stages"], plan["price"]
    left = {stage: row for stage, row in stages.items() if not is_finished(stage, folder)}
    parameters = f"{plan['parameters'] / 1e6:.1f}M parameters"
    if plan["minutes"] and "pretrain" in left:  # which measures several sizes, and chooses
        parameters = f"about {parameters}"
    title = f"{parameters}, {plan['machine']}, into {folder}"
    table = Table(title=title, title_justify="left")
    for name in ["stage", "data", "tokens", "time", "memory", "disk"] + ["cost"] * bool(price):
        table.add_column(name, justify="left" if name in ("stage", "data") else "right")

    def add(name: str, data: str, tokens: float, seconds: float, memory: float, disk: float):
        cells = [name, data, f"{tokens / 1e6:,.1f}M" if tokens else ""]
        cells += [duration(seconds) if seconds else "", gigabytes(memory), gigabytes(disk)]
        table.add_row(*cells, *[in_hours(price, seconds) if seconds else ""] * bool(price))

    download = plan["download"] if missing_data(stages) and not plan["data_dir"] else 0
    if download:
        add("download", "set mini", 0, 0, 0, download)
    reading = plan["reading"] if len(left) == len(stages) else 0
    if reading:
        add("tokenising", "", 0, reading, 0, 0)
    for stage, row in stages.items():
        if stage in left:
            add(stage, row["data"], *(row[n] for n in ("tokens", "seconds", "memory", "disk")))
        else:
            add(stage, "finished", 0, 0, 0, 0)
    add("evaluation", "", 0, plan["evaluation"], 0, 0)
    table.add_section()
    seconds = sum(row["seconds"] for row in left.values()) + plan["evaluation"] + reading
    memory = max((row["memory"] for row in left.values()), default=0)
    disk = sum(row["disk"] for row in left.values()) + download
    add("total", "", sum(row["tokens"] for row in left.values()), seconds, memory, disk)
    console.print(table)
    warn(plan, folder, memory, disk)


def warn(plan: dict[str, Any], folder: Path, memory: float, disk: float) -> None:
    """A line on what is free, with a warning where that will not do."""
    there = next(path for path in [folder.resolve(), *folder.resolve().parents] if path.exists())
    device = torch.device(plan["device"])
    free_disk, free_memory = shutil.disk_usage(there).free, hardware.memory_available(device)
    console.print(f"free: {gigabytes(free_memory)} of memory, {gigabytes(free_disk)} of disk")
    if memory > free_memory:
        console.print(
            "warning: the memory may not do; the trainers take --batch_size and "
            "--gradient_checkpointing 1 from this command line"
        )
    if disk > free_disk:
        console.print("warning: the disk will be full before the end; make room, or set OUT")


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count else ""


if __name__ == "__main__":
    with exit_on_user_error(), stopped_quietly():
        main(args)
