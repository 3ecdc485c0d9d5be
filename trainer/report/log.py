"""The log of a run, found and read, also while it is written: for the web page's curves, and for
scripts/make_recipe.py and compare_runs.py."""

from pathlib import Path
from typing import Any

from dataset.forms.files import open_data
from dataset.jsonl import error_at, parse_row
from model.errors import UserError
from trainer.report.old_keys import with_new_keys

Record = dict[str, Any]  # a line of metrics.jsonl


def files_of(run: str) -> tuple[Path, Path]:
    """The weights and the log of a run, from the path of either, with or without its suffix."""
    stem = run.removesuffix(".pth").removesuffix(".metrics.jsonl")
    return Path(f"{stem}.pth"), Path(f"{stem}.metrics.jsonl")


def read_log(path: Path, stage: str) -> list[Record]:
    """The records of a stage's metrics.jsonl, with today's keys. UserError if it is no log."""
    records, _ = LogReader(path, stage).read()
    if not records:
        raise UserError(f"{path} is empty")
    return records


class LogReader:
    """Reads a log piece by piece: each `read` returns what has been written since the last."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage
        self.inode, self.position, self.lines = 0, 0, 0

    def read(self) -> tuple[list[Record], bool]:
        """The new records, with today's keys, and whether the log has begun anew: --resume writes
        it again as far as the checkpoint, --force from the start. A last line that is only half
        there is left for the next time.

        Raises:
            UserError: the file cannot be read, or is no log.
        """
        with open_data(self.path) as (_, file):
            about = self.path.stat()
            anew = about.st_ino != self.inode or about.st_size < self.position
            if anew:
                self.inode, self.position, self.lines = about.st_ino, 0, 0
            file.seek(self.position)
            new = file.read()
        end = new.rfind(b"\n") + 1
        records = []
        for number, line in enumerate(new[:end].split(b"\n"), start=self.lines + 1):
            if line.strip():
                with error_at(self.path, number):
                    record = parse_row(line)
                    if "step" not in record:
                        raise UserError("has no step: this is not a training log")
                records.append(record)
        self.position += end
        self.lines += new.count(b"\n")
        return with_new_keys(records, self.stage), anew
