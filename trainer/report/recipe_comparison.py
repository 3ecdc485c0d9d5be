"""Compares a run that follows a recipe (trainer/report/recipes.py) with the recipe's baseline."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataset.packing import TrainingData
from model.errors import UserError
from model.weights import tokenizer_hash
from trainer.common.context import Context
from trainer.report.recipes import METRIC, PATHS, prepare_hint, read_recipe, with_absolute_paths


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


def resolve_paths(paths: list[str]) -> list[Path]:
    return [Path(path).resolve() for path in paths]
