"""JSON lines: the one reader of data files, and the one form of its errors.

    for number, row in read_rows("data.jsonl.gz"):
        with error_at(path, number):
            ...

A file is plain or gzip-compressed (.gz). It is read line by line, so that its size does not matter.
Whatever is wrong with a line is a UserError "line 7 of data.jsonl is not JSON: …": the functions
that check a row raise one that begins with a verb, and `error_at` adds the place.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dataset.released import download_hint
from model.errors import UserError

Row = dict[str, Any]  # the JSON object of a line


# -- files -----------------------------------------------------------------------------------------

BinaryFile = BinaryIO | gzip.GzipFile  # in typeshed a GzipFile is no BinaryIO


def check_file(path: str | Path) -> Path:
    """The absolute path of a data file; UserError if it cannot be read."""
    path = Path(path).resolve()
    if not path.exists():
        hint = download_hint(path.name)
        raise UserError(f"the data file {path} does not exist; {hint}--data_path names another")
    if not path.is_file():
        raise UserError(f"the data file {path} is a folder; name the .jsonl file in it")
    if not os.access(path, os.R_OK):
        raise UserError(f"the data file {path} may not be read by this user")
    return path


@contextmanager
def open_data(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryFile]]:
    """The file on disk, whose position says how far it is read, and its decompressed content.

    Raises:
        UserError: it cannot be read, or a .gz file is damaged.
    """
    path = Path(path)
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    with raw:
        try:
            yield raw, gzip.open(raw) if path.suffix == ".gz" else raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged, or no gzip file: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of all lines, empty ones included."""
    with open_data(path) as (_, file):
        yield from enumerate(file, start=1)


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
    with open_data(path) as (raw, file):
        chunk, first, start = [], 1, 0
        for number, line in enumerate(file, start=1):
            chunk.append(line)
            if len(chunk) == lines:
                position = raw.tell()
                yield LineChunk(path, first, chunk, position - start)
                chunk, first, start = [], number + 1, position
        if chunk:
            yield LineChunk(path, first, chunk, raw.tell() - start)


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """(line number, row) of each line that is not empty. UserError, with file and line, if the file
    cannot be read or a line is no JSON object."""
    for number, line in read_lines(path):
        if line.strip():
            with error_at(path, number):
                row = parse_row(line)
            yield number, row


def load_rows(path: str | Path) -> list[Row]:
    """All rows of a small file."""
    return [row for _, row in read_rows(path)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One object a line; a reader sees the whole file or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# -- lines -----------------------------------------------------------------------------------------


@contextmanager
def error_at(path: str | Path, number: int) -> Iterator[None]:
    """Put "line NUMBER of PATH" before what a UserError says of a row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"line {number} of {path} {error}") from None


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
        raise UserError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None


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
