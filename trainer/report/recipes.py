"""Recipes: trainings that anyone can repeat, each with the log of a baseline to compare with.

benchmarks/recipes/NAME.json has the flags, the seed, the hashes of data and tokenizer, and the log
of the baseline, the run that it was made from. `--recipe NAME` gives a trainer these flags, and at
every evaluation the run says whether it is on track: its held-out bits per byte are within
`tolerance` of the baseline's at the same number of tokens. Flags on the command line override the
recipe's, and the run lists them. scripts/make_recipe.py writes a recipe from a finished run.

Here is what the command line needs, without slow imports; recipe_comparison.py compares.
"""

import argparse
from dataclasses import fields
from os.path import normpath
from pathlib import Path
from typing import Any

from model.command_line import default_of, names_where
from model.errors import UserError, reading
from model.formats.files import read_json
from model.paths import ROOT
from trainer.common.arguments import TrainArgs
from trainer.report.old_keys import with_new_keys

RECIPES = ROOT / "benchmarks" / "recipes"
METRIC = "eval_bpb"
KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "stage", "data"), str),
    **{"flags": dict, "tolerance": int | float, "records": list},
}
PATHS = names_where(TrainArgs, "path", True)  # a recipe has them relative to ROOT


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name, or from a .json file. UserError if there is none."""
    path = Path(name) if name.endswith(".json") else RECIPES / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in RECIPES.glob("*.json"))) or "none"
        raise UserError(f"there is no recipe {path}; --recipe takes a file, or of these: {there}")
    recipe = read_json(path, "copy it again, or name another with --recipe")
    if "band" in recipe:  # its name until 2026-11
        recipe["tolerance"] = recipe.pop("band")
    for key, kind in KINDS.items():
        if not isinstance(recipe.get(key), kind):
            raise UserError(f"{path} is no recipe: its {key} is {recipe.get(key)!r:.50}")
    for key in PATHS & recipe["flags"].keys():
        value = recipe["flags"][key]
        if not all(
            isinstance(each, str) for each in (value if isinstance(value, list) else [value])
        ):
            raise UserError(f"{path} is no recipe: its {key} names no files")
    with reading(path):
        records = with_new_keys(recipe["records"], recipe["stage"])
        for record in records:
            if METRIC in record and not record["num_tokens"] + record[METRIC] >= 0:
                raise ValueError("a record has a negative metric")
    return recipe | {"records": records}


def recipe_argv(recipe: dict[str, Any], args_class: type) -> list[str]:
    """The recipe's flags as the arguments of a command line."""
    known = {field.name: default_of(field) for field in fields(args_class)}
    allowed = names_where(args_class, "recipe", True)
    argv = []
    for name, value in with_absolute_paths(recipe["flags"]).items():
        if name in known and name not in allowed:
            if value == known[name]:  # recipes until 2026-11 have all flags
                continue
            raise UserError(
                f"recipe {recipe['name']} sets --{name}, which is for you to say: a recipe may set "
                "what a training computes, not where it writes, whom it asks or what code it runs"
            )
        if name not in known:
            raise UserError(
                f"recipe {recipe['name']} is for a trainer of {recipe['stage']}: this one has no "
                f"--{name}"
            )
        argv += flag_of(recipe["name"], name, value, isinstance(known[name], list))
    return argv


def flag_of(recipe: str, name: str, value: Any, takes_list: bool) -> list[str]:
    """A flag with its value or values, none of which can be read as another flag."""
    values = value if isinstance(value, list) else [value]
    unfit = isinstance(value, list) and not takes_list
    for each in values:
        unfit |= isinstance(each, list | dict)
        unfit |= takes_list and isinstance(each, str) and each.startswith("-")
    if unfit:
        raise UserError(f"recipe {recipe} sets --{name} to {value!r:.80}, which is no value of it")
    return [f"--{name}", *map(str, values)] if takes_list else [f"--{name}={value}"]


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
        for path in with_absolute_paths(recipe["flags"]).get("data_path", []):
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


def prepare_hint(recipe: dict[str, Any]) -> str:
    return f"; `{recipe['prepare']}` makes it" if recipe.get("prepare") else ""
