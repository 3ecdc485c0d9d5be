"""Write a recipe from a finished run, so that anyone can reproduce it and compare.

    python scripts/make_recipe.py --run out/pretrain_192 --name demo_pretrain \
        --prepare "python -m dataset.demo"
    python trainer/train_pretrain.py --recipe demo_pretrain
"""

import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from dataset.jsonl import load_rows
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.weights import ROOT, read_info, write_json
from trainer.common.metrics import with_new_keys
from trainer.common.recipes import METRIC, PATHS, RECIPES, UNPINNED


@dataclass
class Args:
    run: str = option(
        "", "weights of the run, such as out/pretrain_512.pth, with its log next to them"
    )
    name: str = option("", "name of the recipe")
    about: str = option("", "purpose of the recipe, in a sentence")
    prepare: str = option("", "command that generates or downloads the data")
    band: float = option(0.05, "relative tolerance of bits per byte for a run on track")
    machine: str = option("", "machine of the run; default: as recorded")
    folder: str = option(str(RECIPES), "folder of the recipes")

    def __post_init__(self) -> None:
        for name in ("run", "name"):
            if not getattr(self, name):
                raise UserError(f"--{name} is required (--help explains it)")
        if not 0 < self.band < 1:
            raise UserError(f"--band must be above 0 and below 1, not {self.band}")


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
    flags = {
        name: relative_to_root(value) if name in PATHS else value
        for name, value in origin["args"].items()
        if name not in UNPINNED and value not in (None, "", [])
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
    write_json(path, recipe)
    print(f"{path}: {len(flags)} flags, {records[-1]['step']} steps, ±{args.band:.0%}")
    return path


def files_of(run: str) -> tuple[Path, Path]:
    """The weights and the log of a run, from the path of either, with or without its suffix."""
    stem = run.removesuffix(".pth").removesuffix(".metrics.jsonl")
    return Path(f"{stem}.pth"), Path(f"{stem}.metrics.jsonl")


def read_log(path: Path, stage: str) -> list[dict[str, Any]]:
    """The records of a stage's metrics.jsonl. UserError if it cannot be read."""
    try:
        records = with_new_keys(load_rows(path), stage)
        if not all("step" in record for record in records):
            raise UserError("a line has no step")
    except UserError as error:
        raise UserError(f"{path} is not a training log: {error}") from error
    if not records:
        raise UserError(f"{path} is empty")
    return records


def relative_to_root(value: str | list[str]) -> str | list[str]:
    """Paths relative to the project's folder."""
    if isinstance(value, list):
        return [relative_to_root(each) for each in value]
    return Path(os.path.relpath(value, ROOT)).as_posix()


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
