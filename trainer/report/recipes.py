"""Recipes: trainings that anyone can repeat, with the curve that came out when they were written.

benchmarks/recipes/NAME.json pins the flags, the seed, the hashes of data and tokenizer, and the log
of the reference run. `--recipe NAME` gives a trainer these flags, and at every evaluation the run
tells whether it is on track: its held-out bits per byte within `band` of the reference at the same
number of trained tokens. Flags on the command line count more than the recipe's, and the run says
so. scripts/make_recipe.py writes one from a finished run.
"""

import argparse
import json
from dataclasses import fields
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.packing import Rows
from model.errors import UserError
from model.weights import ROOT, tokenizer_hash

if TYPE_CHECKING:
    from trainer.trainer_utils import Run

RECIPES = ROOT / "benchmarks" / "recipes"
METRIC = "val_bpb"
PATHS = ("data_path", "val_path", "tokenizer_path")  # from the project's folder, in a recipe
# What a recipe leaves to whoever follows it: places, the machine, what is shown.
FREE = set(
    "recipe resume from_resume device num_workers save_dir checkpoint_dir save_weight compile "
    "save_interval use_wandb tracker wandb_project".split()
)


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name, or from a .json file. UserError if there is none."""
    path = Path(name) if name.endswith(".json") else RECIPES / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in RECIPES.glob("*.json"))) or "none"
        raise UserError(f"there is no recipe {path}; --recipe takes a file, or of these: {there}")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        missing = {"name", "stage", "flags", "data", "band", "records"} - recipe.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a recipe: {error}") from error
    if missing:
        raise UserError(f"{path} is no recipe: it has no {min(missing)}")
    return recipe


def words_of(recipe: dict[str, Any], kind: type) -> list[str]:
    """The recipe's flags as words of a command line of the trainer with these arguments."""
    known = {field.name for field in fields(kind)}
    words = []
    for name, value in located(recipe["flags"]).items():
        if name not in known:
            raise UserError(
                f"recipe {recipe['name']} is for a trainer of {recipe['stage']}: this one has no "
                f"--{name}"
            )
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def with_recipe(words: list[str], kind: type) -> list[str]:
    """A command line, the flags of its --recipe put in front, where any other counts more."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    parser.add_argument("--data_path", nargs="*")
    given, _ = parser.parse_known_args(words)
    if not given.recipe:
        return words
    recipe = read_recipe(given.recipe)
    if given.data_path is None:
        for path in located(recipe["flags"])["data_path"]:
            if not Path(path).is_file():
                raise UserError(
                    f"recipe {recipe['name']} needs the data file {path}" + how_to_get(recipe)
                )
    return words_of(recipe, kind) + words


def located(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags, their paths from the project's folder."""

    def at(value: str | list[str]) -> str | list[str]:
        return [at(each) for each in value] if isinstance(value, list) else normpath(ROOT / value)

    return {name: at(value) if name in PATHS else value for name, value in flags.items()}


def real(paths: list[str]) -> list[Path]:
    return [Path(path).resolve() for path in paths]


def how_to_get(recipe: dict[str, Any]) -> str:
    return f"; `{recipe['prepare']}` makes it" if recipe.get("prepare") else ""


class Reference:
    """The reference run of a recipe, for a run that follows it.

    Raises:
        UserError: the recipe is for another stage, or its data are not what they were.
    """

    def __init__(self, run: "Run", rows: Rows, held_out: Rows | None):
        recipe = read_recipe(run.args.recipe)
        self.name, self.band, self.records = recipe["name"], recipe["band"], recipe["records"]
        self.made = f"{recipe.get('date', '')}, {recipe.get('machine', '')}"
        if recipe["stage"].split("/")[0] != run.stage.split("/")[0]:
            raise UserError(f"recipe {self.name} is for {recipe['stage']}, and this is {run.stage}")
        pinned = located(recipe["flags"])
        self.departures = [  # what differs from the recipe, in words
            f"--{name} {getattr(run.args, name, None)} instead of {value}"
            for name, value in pinned.items()
            if getattr(run.args, name, None) != value and name not in PATHS
        ]
        hashes = {
            "data": rows.description,
            "held_out": held_out and held_out.description,
            "tokenizer": tokenizer_hash(run.tokenizer),
        }
        other = [what for what, found in hashes.items() if recipe.get(what, found) != found]
        named = all(
            real(getattr(run.args, name)) == real(pinned.get(name, []))
            for name in ("data_path", "val_path")
        )
        if other and named:
            raise UserError(
                f"recipe {self.name} pins {other[0]} {recipe[other[0]]}, and this is "
                f"{hashes[other[0]]}{how_to_get(recipe)}, as it was then; or name other data with "
                "--data_path"
            )
        self.departures += [f"another {what}" for what in other]
        points = [(r["tokens"], r[METRIC]) for r in self.records if METRIC in r]
        self.curve = [] if "held_out" in other or "data" in other else points

    def lines(self) -> list[str]:
        """What to say before the first step."""
        said = [f"recipe {self.name}: compared with the reference run of {self.made}"]
        if self.departures:
            said = [f"{said[0]}, but with {'; '.join(self.departures)}"]
        if not self.curve:
            said.append("bits per byte of other data are not compared")
        return said

    def at(self, tokens: int) -> float | None:
        """The reference's figure after as many tokens, interpolated; None before it has one."""
        if not self.curve or tokens < self.curve[0][0]:
            return None
        return float(np.interp(tokens, *zip(*self.curve, strict=True)))

    def beside(self, record: dict[str, Any]) -> dict[str, float]:
        """The reference's figure at a record of the log, as a part of it."""
        expected = self.at(record["tokens"]) if METRIC in record else None
        return {} if expected is None else {f"recipe_{METRIC}": round(expected, 4)}

    def verdict(self, records: list[dict[str, Any]]) -> str:
        """Whether a run is on track at its newest evaluation; "" where nothing can be said."""
        found = [record for record in records if METRIC in record]
        if not found or f"recipe_{METRIC}" not in found[-1]:
            return ""
        figure, expected = found[-1][METRIC], found[-1][f"recipe_{METRIC}"]
        share = figure / expected - 1
        word = "on track" if abs(share) <= self.band else "behind" if share > 0 else "ahead"
        return (
            f"{word}: {figure:.4f} bits per byte at step {found[-1]['step']}, where {self.name} "
            f"had {expected:.4f} ({share:+.1%}; ±{self.band:.0%} is on track)"
        )
