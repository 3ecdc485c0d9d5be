"""JSON lines: the one reader of data files, and the one form of its errors.

    for number, row in read_rows("data.jsonl.gz"):
        with error_at(path, number):
            ...

A file is read line by line, so that its size does not matter; forms/files.py says which files can
be read. Whatever is wrong with a line is a UserError "line 7 of data.jsonl is not JSON: …": the
functions that check a row raise one that begins with a verb, and `error_at` adds the place. With a
`BadRows` it counts such rows instead, and the reading goes on.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.forms.files import CLEAN, counts_values, is_gbk, open_lines
from dataset.released import download_hint
from model.errors import UserError, reading

Row = dict[str, Any]  # the JSON object of a line
MAX_EXAMPLES = 3


# -- files -----------------------------------------------------------------------------------------


def check_file(path: str | Path) -> Path:
    """The absolute path of a data file; UserError if it cannot be read."""
    path = Path(path)
    try:
        path = path.resolve()
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop, before Python 3.13
        raise UserError(f"the data file {path} cannot be read: {error}") from None
    if not path.exists():
        hint = download_hint(path.name)
        raise UserError(f"the data file {path} does not exist; {hint}--data_path names another")
    if not path.is_file():
        raise UserError(f"the data file {path} is a folder; name the .jsonl file in it")
    if not os.access(path, os.R_OK):
        raise UserError(f"the data file {path} may not be read by this user")
    return path


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of all lines, empty ones included."""
    with open_lines(path) as (_, lines):
        yield from enumerate(lines, start=1)


@dataclass
class LineChunk:
    """Consecutive lines of a file: the work of one task of a worker."""

    path: Path
    first: int  # number of its first line, from 1
    lines: list[bytes]
    bytes_read: int  # of the file on disk, compressed or not


def read_chunks(path: str | Path, lines: int) -> Iterator[LineChunk]:
    """A file in chunks of so many lines."""
    path = Path(path)
    with open_lines(path) as (raw, file):
        chunk, first, start = [], 1, 0
        for number, line in enumerate(file, start=1):
            chunk.append(line)
            if len(chunk) == lines:
                position = raw.tell()
                yield LineChunk(path, first, chunk, position - start)
                chunk, first, start = [], number + 1, position
        if chunk:
            yield LineChunk(path, first, chunk, raw.tell() - start)


def read_rows(path: str | Path, bad_rows: "BadRows | None" = None) -> Iterator[tuple[int, Row]]:
    """(line number, row) of each line that is not empty.

    Args:
        bad_rows: counts the lines that are no JSON object, which are then left out.

    Raises:
        UserError: the file cannot be read, or, with its number, a line is no JSON object.
    """
    for number, line in read_lines(path):
        if line.strip():
            row = None
            with error_at(path, number, bad_rows):
                row = parse_row(line)
            if row is not None:
                yield number, row


def load_rows(path: str | Path) -> list[Row]:
    """All rows of a small file."""
    return [row for _, row in read_rows(path)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One object a line; a reader sees the whole file or none."""
    from model.weights import atomic_write  # imports torch, which reading does not need

    with atomic_write(path) as file:
        file.writelines(as_line(row).encode() for row in rows)


def as_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


# -- bad rows --------------------------------------------------------------------------------------


@dataclass
class BadRows:
    """The rows that --skip_bad_rows leaves out: how many, and what is wrong with the first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, *errors: str) -> None:
        self.merge(BadRows(len(errors), list(errors)))

    def merge(self, other: "BadRows") -> None:
        self.count += other.count
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def __str__(self) -> str:
        first = "\n  ".join(self.examples)
        return f"{self.count:,} bad rows are left out, the first of them:\n  {first}"

    def refuse_if_all(self, kept: int) -> None:
        """UserError if no row is left."""
        if self.count and not kept:
            raise UserError(f"all {self.count:,} rows are bad; {self.examples[0]}")


@contextmanager
def error_at(path: str | Path, number: int, bad_rows: BadRows | None = None) -> Iterator[None]:
    """Put "line NUMBER of PATH" before what a UserError says of a row; with `bad_rows`, count the
    row there instead of raising it. Whatever else a row does to the code that reads it is said in
    the same way."""
    try:
        with reading(""):
            yield
    except UserError as error:
        unit = "value" if counts_values(path) else "line"
        sentence = f"{unit} {number} of {path} {error}"
        if bad_rows is None:
            raise UserError(sentence) from None
        bad_rows.add(sentence)


# -- lines -----------------------------------------------------------------------------------------


def parse_row(line: bytes) -> Row:
    """The JSON object in a line; UserError if it is anything else."""
    row = parse_json(decode(line))
    if not isinstance(row, dict):
        raise UserError("is no JSON object")
    return row


def decode(line: bytes) -> str:
    """A line of UTF-8 as text, without a byte order mark. UserError if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if is_gbk(line):
            raise UserError(
                f"is GBK (GB18030), not UTF-8; {CLEAN} or `iconv -f GB18030 -t UTF-8` converts it"
            ) from None
        raise UserError(
            f"is not UTF-8 ({error.reason} at byte {error.start}); {CLEAN} converts other encodings"
        ) from None


def parse_json(text: str) -> Any:
    """json.loads, with everything that can be wrong as a UserError."""
    try:
        value = json.loads(text)
        if "\\u" in text:  # an escape may spell half of a surrogate pair, which is no UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("has half a character (a surrogate without its pair)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON that can be read: {error}") from None
    return value
