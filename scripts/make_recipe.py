"""Write a recipe from a finished run, so that anyone can reproduce it and compare.

    python scripts/make_recipe.py --run out/pretrain_192 --name demo_pretrain \
        --prepare "python -m dataset.demo"
    python trainer/train_pretrain.py --recipe demo_pretrain
"""

import importlib
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from model.command_line import names_where, option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import ROOT
from trainer.report.recipes import METRIC, PATHS, RECIPES

TRAINERS = sorted(path.stem for path in (ROOT / "trainer").glob("train_*.py"))


@dataclass
class Args:
    run: str = option(
        "",
        "weights of the run, such as out/pretrain_512.pth, with its log beside them",
        required=True,
    )
    name: str = option("", "name of the recipe", required=True, name=True)
    about: str = option("", "purpose of the recipe, in a sentence")
    prepare: str = option("", "command that generates or downloads the data")
    band: float = option(
        0.05,
        "largest relative difference in bits per byte of a run on track",
        above=0,
        below=1,
    )
    machine: str = option("", "machine of the run; default: as recorded")
    folder: str = option(str(RECIPES), "folder of the recipes")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from model.weights import read_info, write_json
from trainer.report.log import files_of, read_log


def main(args: Args) -> Path:
    weights, log = files_of(args.run)
    info = read_info(weights)
    records = read_log(log, (info or {}).get("stage", ""))
    if info is None:
        raise UserError(
            f"{weights.with_suffix('.json')} is missing, which records the run's settings"
        )
    origin = info["origin"]
    if not any(METRIC in record for record in records):
        raise UserError(f"{log} has no evaluation on held-out data, which a recipe compares")
    trainers = (importlib.import_module(f"trainer.{name}") for name in TRAINERS)
    allowed = {name for each in trainers for name in names_where(each.Args, "recipe", True)}
    flags = {
        name: relative_to_root(value) if name in PATHS else value
        for name, value in origin["args"].items()
        if name in allowed and value not in (None, "", [])
    }
    path = Path(args.folder) / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = {
        "name": args.name,
        "about": args.about,
        "stage": info["stage"],
        "prepare": args.prepare,
        "flags": flags,
        "data": origin["data"],
        "held_out": origin["manifest"]["held_out"]["hash"],
        "tokenizer": info["tokenizer_hash"],
        "parameters": info["parameters"],
        "machine": args.machine or origin["machine"],
        "date": str(date.today()),
        "seconds": origin["seconds"],
        "tolerance": args.band,
        "records": records,
    }
    write_json(path, recipe, checksum=True)
    print(f"{path}: {len(flags)} flags, {records[-1]['step']} steps, ±{args.band:.0%}")
    return path


def relative_to_root(value: str | list[str]) -> str | list[str]:
    """Paths relative to the project's folder."""
    if isinstance(value, list):
        return [relative_to_root(each) for each in value]
    return Path(os.path.relpath(value, ROOT)).as_posix()


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
