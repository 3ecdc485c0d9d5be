"""A part of the data, for a run whose minutes are too short to read all of it.

    python scripts/runs/cut_data.py --save_dir out/minimind --data_dir DIR

Tokenising some gigabytes takes a CPU longer than a short training. The plan of the run says how
many megabytes of which file are enough; they are taken from all over the file, in blocks of whole
lines, and written to data/ in the folder of the run, beside links to the other files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.released import default_data, validation_file
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from scripts.runs.stages import STAGES, read_plan, stopped_quietly


@dataclass
class Args:
    save_dir: str = option(str(OUT / "minimind"), "folder of the run")
    data_dir: str = option("", "folder of the whole data; default: dataset/")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import os
import shutil

from dataset.forms.files import open_lines
from model.weights import atomic_write

BLOCK = 2**16  # bytes that are taken from one place of a file


def main(args: Args) -> list[Path]:
    """The files in data/, which are made once."""
    plan, folder = read_plan(args.save_dir), Path(args.save_dir) / "data"
    if not plan.get("cut"):
        raise UserError(f"the plan in {args.save_dir} needs all of the data")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for stage in plan["stages"]:
        source = Path(default_data(STAGES[stage].data, args.data_dir)).resolve()
        limit = plan["cut"].get(source.name)
        target = folder / (source.name.removesuffix(".gz") if limit else source.name)
        if limit and not target.exists():
            print(f"{target}: {limit / 1e6:.0f} MB of {source}")
            with atomic_write(target) as file:
                file.writelines(some_lines(source, limit))
        wanted = [] if limit else [(target, source)]
        if held_out := validation_file(str(source)):
            wanted.append((folder / Path(held_out).name, Path(held_out)))
        for link, path in wanted:
            if not link.exists():
                link.unlink(missing_ok=True)  # a link to what is not there any more
                try:
                    link.symlink_to(path)
                except OSError:  # Windows, by default
                    shutil.copyfile(path, link)
        made.append(target)
    return made


def some_lines(path: Path, limit: int) -> Iterator[bytes]:
    """About `limit` bytes of whole lines, from evenly spaced places of a file."""
    size = os.path.getsize(path)
    if path.suffix == ".gz":  # can only be read from its beginning
        yield from every_so_many(path, limit)
        return
    places = max(1, limit // BLOCK)
    with open(path, "rb") as file:
        for place in range(places):
            start = place * size // places
            file.seek(start)
            if start:
                file.readline()  # the rest of a line that began before
            while file.tell() < start + BLOCK and (line := file.readline()):
                yield line if line.endswith(b"\n") else line + b"\n"


def every_so_many(path: Path, limit: int) -> Iterator[bytes]:
    """Every nth line; n from the file's first megabytes and its size."""
    unpacked = 0
    with open_lines(path) as (raw, lines):
        for line in lines:
            unpacked += len(line)
            if unpacked > 2_000_000:
                break
        whole = unpacked * max(1.0, os.path.getsize(path) / raw.tell())
    n = max(1, round(whole / limit))
    with open_lines(path) as (_, lines):
        for number, line in enumerate(lines):
            if number % n == 0:
                yield line if line.endswith(b"\n") else line + b"\n"


if __name__ == "__main__":
    with exit_on_user_error(), stopped_quietly():
        main(args)
