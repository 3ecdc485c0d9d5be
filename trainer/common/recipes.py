"""Recipes: trainings that anyone can repeat, each with the log of a baseline to compare with.

benchmarks/recipes/NAME.json has the flags, the seed, the hashes of data and tokenizer, and the log
of the baseline, the run that it was made from. `--recipe NAME` gives a trainer these flags, and at
every evaluation the run says whether it is on track: its held-out bits per byte are within
`tolerance` of the baseline's at the same number of tokens. Flags on the command line override the
recipe's, and the run lists them. scripts/make_recipe.py writes a recipe from a finished run.
"""

import argparse
import json
from dataclasses import fields
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataset.packing import TrainingData
from model.command_line import names_where
from model.errors import UserError
from model.weights import ROOT, tokenizer_hash
from trainer.common.arguments import TrainArgs
from trainer.common.context import Context
from trainer.common.metrics import with_new_keys

RECIPES = ROOT / "benchmarks" / "recipes"
METRIC = "eval_bpb"
PATHS = names_where(TrainArgs, "path", True)  # a recipe has them relative to ROOT
UNPINNED = names_where(TrainArgs, "pinned", False)  # places, the machine, what is shown


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name, or from a .json file. UserError if there is none."""
    path = Path(name) if name.endswith(".json") else RECIPES / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in RECIPES.glob("*.json"))) or "none"
        raise UserError(f"there is no recipe {path}; --recipe takes a file, or of these: {there}")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        if "band" in recipe:  # its name until 2026-11
            recipe["tolerance"] = recipe.pop("band")
        missing = {"name", "stage", "flags", "data", "tolerance", "records"} - recipe.keys()
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a recipe: {error}") from error
    if missing:
        raise UserError(f"{path} is no recipe: it has no {min(missing)}")
    return recipe | {"records": with_new_keys(recipe["records"], recipe["stage"])}


def recipe_argv(recipe: dict[str, Any], args_class: type) -> list[str]:
    """The recipe's flags as the arguments of a command line."""
    known = {field.name for field in fields(args_class)}
    argv = []
    for name, value in with_absolute_paths(recipe["flags"]).items():
        if name not in known:
            raise UserError(
                f"recipe {recipe['name']} is for a trainer of {recipe['stage']}: this one has no "
                f"--{name}"
            )
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def with_recipe(argv: list[str], args_class: type) -> list[str]:
    """A command line with the flags of its --recipe in front, which the others override."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    parser.add_argument("--data_path", nargs="*")
    given, _ = parser.parse_known_args(argv)
    if not given.recipe:
        return argv
    recipe = read_recipe(given.recipe)
    if given.data_path is None:
        for path in with_absolute_paths(recipe["flags"])["data_path"]:
            if not Path(path).is_file():
                raise UserError(
                    f"recipe {recipe['name']} needs the data file {path}" + prepare_hint(recipe)
                )
    return recipe_argv(recipe, args_class) + argv


def with_absolute_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with absolute paths."""

    def at(value: Any) -> Any:  # a path or a list of them
        return [at(each) for each in value] if isinstance(value, list) else normpath(ROOT / value)

    return {name: at(value) if name in PATHS else value for name, value in flags.items()}


def resolve_paths(paths: list[str]) -> list[Path]:
    return [Path(path).resolve() for path in paths]


def prepare_hint(recipe: dict[str, Any]) -> str:
    return f"; `{recipe['prepare']}` makes it" if recipe.get("prepare") else ""


class RecipeComparison:
    """Compares a run that follows a recipe with the recipe's baseline.

    Raises:
        UserError: the recipe is for another stage, or its data have changed.
    """

    def __init__(
        self,
        ctx: Context,
        stage: str,
        tokenizer: PreTrainedTokenizerBase,
        train_data: TrainingData,
        val_data: TrainingData | None,
    ):
        args = ctx.args
        recipe = read_recipe(args.recipe)
        self.name, self.tolerance = recipe["name"], recipe["tolerance"]
        self.history = recipe["records"]
        self.provenance = f"{recipe.get('date', '')}, {recipe.get('machine', '')}"
        if recipe["stage"].split("/")[0] != stage.split("/")[0]:
            raise UserError(f"recipe {self.name} is for {recipe['stage']}, and this is {stage}")
        pinned = with_absolute_paths(recipe["flags"])
        self.overrides = [
            f"--{name} {getattr(args, name, None)} instead of {value}"
            for name, value in pinned.items()
            if getattr(args, name, None) != value and name not in PATHS
        ]
        hashes = {
            "data": train_data.fingerprint,
            "held_out": val_data and val_data.fingerprint,
            "tokenizer": tokenizer_hash(tokenizer),
        }
        differ = [what for what, found in hashes.items() if recipe.get(what, found) != found]
        same_files = all(
            resolve_paths(getattr(args, name)) == resolve_paths(pinned.get(name, []))
            for name in ("data_path", "val_path")
        )
        if differ and same_files:
            what = differ[0]
            raise UserError(
                f"recipe {self.name} pins {what} {recipe[what]}, and this is {hashes[what]}"
                f"{prepare_hint(recipe)}, as it was then; or name other data with --data_path"
            )
        self.overrides += [f"other {what}" for what in differ]
        points = [(r["num_tokens"], r[METRIC]) for r in self.history if METRIC in r]
        self.curve = [] if "held_out" in differ or "data" in differ else points

    def lines(self) -> list[str]:
        """What to print before the first step."""
        lines = [f"recipe {self.name}: compared with its baseline of {self.provenance}"]
        if self.overrides:
            lines = [f"{lines[0]}, but with {'; '.join(self.overrides)}"]
        if not self.curve:
            lines.append("bits per byte of other data are not compared")
        return lines

    def expected(self, num_tokens: int) -> float | None:
        """The metric after this many tokens, interpolated; None before the first evaluation."""
        if not self.curve or num_tokens < self.curve[0][0]:
            return None
        tokens, values = zip(*self.curve, strict=True)
        return float(np.interp(num_tokens, tokens, values))

    def expected_metrics(self, record: dict[str, Any]) -> dict[str, float]:
        """The baseline's metric at this record of a log, to be written into it."""
        expected = self.expected(record["num_tokens"]) if METRIC in record else None
        return {} if expected is None else {f"recipe_{METRIC}": round(expected, 4)}

    def status(self, history: list[dict[str, Any]]) -> str:
        """Whether a run is on track at its latest evaluation; "" if there is nothing to compare."""
        found = [record for record in history if METRIC in record]
        if not found or f"recipe_{METRIC}" not in found[-1]:
            return ""
        value, expected = found[-1][METRIC], found[-1][f"recipe_{METRIC}"]
        difference = value / expected - 1
        word = "behind" if difference > 0 else "ahead"
        if abs(difference) <= self.tolerance:
            word = "on track"
        return (
            f"{word}: {value:.4f} bits per byte at step {found[-1]['step']}, where {self.name} "
            f"had {expected:.4f} ({difference:+.1%}; ±{self.tolerance:.0%} is on track)"
        )
