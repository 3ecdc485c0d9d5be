"""The log of a finished run, found and read: for scripts/make_recipe.py and compare_runs.py."""

from pathlib import Path
from typing import Any

from dataset.jsonl import error_at, read_rows
from model.errors import UserError
from trainer.report.old_keys import with_new_keys


def files_of(run: str) -> tuple[Path, Path]:
    """The weights and the log of a run, from the path of either, with or without its suffix."""
    stem = run.removesuffix(".pth").removesuffix(".metrics.jsonl")
    return Path(f"{stem}.pth"), Path(f"{stem}.metrics.jsonl")


def read_log(path: Path, stage: str) -> list[dict[str, Any]]:
    """The records of a stage's metrics.jsonl, with today's keys. UserError if it is no log."""
    records = []
    for number, record in read_rows(path):
        with error_at(path, number):
            if "step" not in record:
                raise UserError("has no step: this is not a training log")
        records.append(record)
    if not records:
        raise UserError(f"{path} is empty")
    return with_new_keys(records, stage)
