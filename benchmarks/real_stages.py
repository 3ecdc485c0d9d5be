"""Does each stage learn by its default flags, on real data?

    python benchmarks/real_stages.py --data_dir DIR [--stage dpo grpo] [--seeds 42 43 44]
    python benchmarks/real_stages.py --data_dir DIR --base FILE.pth      a base that exists
    python benchmarks/real_stages.py --data_dir DIR --sweep 1 --scale 0.3 --folds 1

DIR has pretrain, sft, sft_val, dpo, dpo_val, rlaif, r1_mix_1024 and lora_medical as .jsonl or
.jsonl.gz, in the formats of docs/data.md. The base is one model of 7M parameters, pretrained and
fine-tuned once with default flags (about 2.5 hours of one thread) and kept in --output. From it
each later stage is trained with nothing given but paths, sizes and a number of steps that takes
about 15 minutes of one thread:

    reward, dpo           five folds of the preference pairs, each held out once
    ppo, grpo, spo        against a reward model, on prompts without answers; a second reward model,
                          from other pairs, judges too
    ppo_rule, grpo_rule, spo_rule    against `answer similarity`, on prompts with short answers
    lora                  medical answers
    distillation          a student of a quarter of the base's size, against cross-entropy alone on
                          the same tokens, and on as many as take the same CPU time
    reason                grade-school problems in the think/answer form
    tools                 five folds of the conversations with tools

Each result is written to --output as it comes and not made again, unless a default has changed
since; an interrupted training goes on from its checkpoint. Several processes may share an --output
if their stages differ. The report has for each stage its metrics with standard errors, and its
targets. --sweep trains with other flags instead of the defaults (later_stages/stages.py has the
list), on fold 0 or the first seed.
"""

import re
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT

BASE_SIZE = "256x8"
BASE_STEPS = {"pretrain": 1052, "full_sft": 450}  # 8.2M and 3.3M tokens


@dataclass
class Args:
    data_dir: str = option("", "folder of the data", required=True)
    base: str = option("", "weights that the stages start from; default: made in --output")
    stage: list[str] = option([], "stages to run; default: all")
    seeds: list[int] = option([42], "random seeds of the stages without folds")
    folds: int = option(5, "how many of the five folds to train", at_least=1, at_most=5)
    sweep: bool = option(False, "try other flags than the defaults")
    flags: list[str] = option([], "try these flags (one text each) instead of the sweep's list")
    scale: float = option(1.0, "share of the steps of each training", above=0)
    held_out: int = option(600, "most held-out rows, where there are no folds", at_least=2)
    student: str = option("160x4", "width x depth of distillation's student")
    output: str = option(str(OUT / "real_stages"), "folder of data, weights, results and plot")
    json: str = option("", "file of the report; default: report.json in --output")
    max_steps: int = option(0, "most optimizer steps of each training, for a quick test; 0: all")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import torch
from later_stages.data import write_splits
from later_stages.report import draw, make_rows, show
from later_stages.stages import STAGES
from later_stages.world import Job, World, changed_defaults, read_json
from learning.trainings import run_trainer

from model.model_minimind import MiniMindForCausalLM
from model.weights import count_parameters, write_json
from trainer.common.hardware import describe_machine


def main(args: Args) -> dict[str, Any]:
    names = args.stage or list(STAGES)
    if unknown := set(names) - set(STAGES):
        raise UserError(f"--stage: {min(unknown)} is unknown; known are {', '.join(STAGES)}")
    if not (student := re.fullmatch(r"(\d+)x(\d+)", args.student)):
        raise UserError(f"--student is width x depth, such as 160x4, not {args.student}")
    out = Path(args.output)
    world = World(
        base=Path(args.base),
        out=out,
        student=(int(student[1]), int(student[2])),
        held_out=args.held_out,
        scale=args.scale,
        most_steps=args.max_steps,
    )
    write_splits(Path(args.data_dir), world.data, args.held_out)
    if not args.base:
        world.base = make_base(world, Path(args.data_dir))
    check_base(world)
    for job in jobs(args, names):
        path = out / "results" / f"{job.name}.json"
        if path.exists():
            changed = changed_defaults(read_json(path)["defaults"])
            if not changed:
                world.console.print(f"{job.name} is there already")
                continue
            world.console.print(f"{job.name} again: {', '.join(changed)}")
        world.console.rule(job.name)
        write_json(path, run(world, job))
        for checkpoint in out.glob(f"**/checkpoints/**/{job.name}*.checkpoint.pt"):
            checkpoint.unlink()  # it has done its work, and is the largest file
        report = write_report(world, args)
    report = write_report(world, args)
    show(world.console, report["rows"])
    return report


def jobs(args: Args, names: list[str]) -> list[Job]:
    """The trainings to make: of the defaults each fold or seed, of a sweep one fold or seed."""
    found = []
    for name in names:
        stage = STAGES[name]
        parts = list(range(args.folds)) if stage.folds else args.seeds
        variants = args.flags or ([*stage.sweep] if args.sweep else [""])
        if args.sweep:
            parts = parts[: args.folds if stage.folds else 1]
        common = dict(scale=args.scale, most_steps=args.max_steps)
        found += [Job(name, part, flags, **common) for flags in variants for part in parts]
    return found


def run(world: World, job: Job) -> dict[str, Any]:
    """Train and measure."""
    stage = STAGES[job.stage]
    metrics, result = stage.run(world, job)
    changed = [each for each in result["history"] if "changed_fraction" in each]
    points = [each for each in result["history"] if each.get(stage.curve) is not None]
    return {
        **vars(job),
        "command": result["command"],
        "defaults": stage.defaults(),
        "steps": result["step"],
        "num_tokens": result["num_tokens"],
        "seconds": round(result["seconds"], 1),
        "changed_fraction": changed[-1]["changed_fraction"],
        "metrics": {name: float(value) for name, value in metrics.items()},
        "history": [{"step": each["step"], stage.curve: each[stage.curve]} for each in points],
    }


def write_report(world: World, args: Args) -> dict[str, Any]:
    """The report of all results in --output, whoever made them."""
    results = [read_json(path) for path in sorted((world.out / "results").glob("*.json"))]
    report = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "base": read_json(world.out / "base.json"),
        "judges": read_json(judges) if (judges := world.out / "judges.json").exists() else None,
        "rows": make_rows(results),
    }
    write_json(args.json or world.out / "report.json", report)
    draw(results, world.out / "curves.png")
    return report


# -- the base --------------------------------------------------------------------------------------


def make_base(world: World, data_dir: Path) -> Path:
    """Pretrain and fine-tune with default flags, or go on where that was interrupted."""
    folder, (width, depth) = world.out / "base", BASE_SIZE.split("x")
    suffix = ".jsonl.gz" if (data_dir / "pretrain.jsonl.gz").exists() else ".jsonl"
    common = f"--save_dir {folder} --checkpoint_dir {folder} --device cpu --resume 1"
    for stage, file, sizes in (
        ("pretrain", "pretrain", f"--hidden_size {width} --num_hidden_layers {depth}"),
        ("full_sft", "sft", f"--hidden_size {width}"),
    ):
        steps = min(BASE_STEPS[stage], world.most_steps or BASE_STEPS[stage])
        data = f"--data_path {data_dir / (file + suffix)}"
        argv = f"{data} {sizes} --max_steps {steps} {common}".split()
        run_trainer(world.console, import_module(f"trainer.train_{stage}"), argv, 0)
    return folder / f"full_sft_{width}.pth"


def check_base(world: World) -> None:
    """UserError if the results in --output are of another base."""
    path = world.out / "base.json"
    model: MiniMindForCausalLM = world.start
    now = {"fingerprint": world.fingerprint, "parameters": count_parameters(model)}
    if path.exists() and read_json(path)["fingerprint"] != now["fingerprint"]:
        raise UserError(f"{world.out} has results of another base; give another --output")
    write_json(path, {**now, "file": world.base.name})


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
