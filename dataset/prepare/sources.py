"""Files in common formats → rows in MiniMind's formats.

Plain text, JSON lines, JSON lists, CSV, TSV and Parquet are read, all but Parquet also as .gz. The
fields of a row decide what it is: forms/rows.py knows conversations and preference pairs as other
tools write them, and a row with "text", "content" or "raw_content" is a text.
"""

import csv
import io
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from dataset.encoding import check_messages
from dataset.forms.files import BinaryFile, detect_encoding, open_data, open_lines
from dataset.forms.messages import answered_part
from dataset.forms.rows import (
    as_conversation,
    as_pair,
    as_prompt,
    as_text,
    has_exchange,
    has_messages,
    is_pair,
)
from dataset.jsonl import parse_json
from model.errors import UserError, reading
from model.paths import check_input_file

# A table may stand for so many times its size: what compression makes of ordinary texts is less.
MAX_EXPANSION, MIN_BOMB = 1000, 2**28
TEXT_FIELDS = ("text", "content", "raw_content")
MESSAGES = ("conversations", "chosen", "rejected")


@dataclass(slots=True)
class RawRow:
    """A row as a file has it: a line of JSON, a text, or the fields of a table."""

    path: str
    number: int  # of the line or row, from 1
    content: str | dict[str, Any]
    is_json: bool = False

    def value(self) -> Any:
        """The content, a line of JSON parsed."""
        if self.is_json and isinstance(self.content, str):
            return parse_json(self.content)
        return self.content

    def place(self) -> str:
        return f"{Path(self.path).name}:{self.number}"

    def size(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return 1000 + sum(len(v) for v in self.content.values() if isinstance(v, str))


# -- reading ---------------------------------------------------------------------------------------


def check_input(paths: list[str]) -> list[Path]:
    """The files, or a UserError about the first that cannot be read."""
    if not paths:
        raise UserError("there is nothing to read; name the files with --input")
    for path in paths:
        check_input_file(path)
    return [Path(path) for path in paths]


def read_raw(
    files: list[Path], encoding: str = "", per_document: str = "file", about: str = "reading"
) -> Iterator[RawRow]:
    """All rows of all files, with a progress bar in bytes.

    Args:
        encoding: of text, JSON and CSV; "": detected from the beginning of the file.
        per_document: unit of a plain text that is one document: "file", "paragraph" or "line".

    Raises:
        UserError: a file is damaged, or is not what its name says.
    """
    size = sum(path.stat().st_size for path in files)
    done = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=about, leave=False) as bar:
        for path in files:
            try:
                with reading(path), table_errors(path):
                    for row, bytes_read in rows_of(path, encoding, per_document):
                        yield row
                        bar.update(max(0, done + bytes_read - bar.n))
            except UserError as error:
                said = str(error)
                raise UserError(said if str(path) in said else f"{path} {said}") from error
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
            done += path.stat().st_size


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, csv.Error) as error:
        raise UserError(f"{path} is damaged, or no {path.suffix} file: {error}") from error
    except (UnicodeError, LookupError) as error:
        raise UserError(f"{path}: {error}; name its --encoding") from error


def rows_of(path: Path, encoding: str, per_document: str) -> Iterator[tuple[RawRow, int]]:
    """Each row, and how far the file on disk is read."""
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind != ".parquet":
        encoding = encoding or detect_encoding(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        with open_lines(path, encoding) as (raw, lines):
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = line.decode("utf-8-sig", "replace")
                    yield RawRow(str(path), number, text, is_json=True), raw.tell()
        return
    with open_data(path) as (raw, file):
        for number, content in table_or_texts(kind, file, encoding, per_document):
            yield RawRow(str(path), number, content), raw.tell()


def table_or_texts(
    kind: str, file: BinaryFile, encoding: str, per_document: str
) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """(number, content) of each row of a table, or document of a plain text."""
    if kind == ".parquet":
        yield from enumerate(parquet_rows(file), start=1)
        return
    text = io.TextIOWrapper(file, encoding, errors="replace", newline="")  # type: ignore[type-var]
    try:
        if kind in (".csv", ".tsv"):
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
            table = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
            for number, row in enumerate(table, start=2):
                yield number, {k: v for k, v in row.items() if k and v is not None}
        else:
            yield from documents_of(text, per_document)
    finally:
        with suppress(ValueError):  # the file is closed already
            text.detach()  # or it would close the file


def parquet_rows(file: BinaryFile) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file. UserError if it stands for far more than a file of its size can
    hold: a text that is repeated takes a few bytes."""
    table = pq.ParquetFile(file)
    # repeated texts stay references until they have been counted
    texts = [field.name for field in table.schema_arrow if pa.types.is_string(field.type)]
    table = pq.ParquetFile(file, read_dictionary=texts)
    limit = max(MIN_BOMB, MAX_EXPANSION * file.seek(0, io.SEEK_END))
    about, expanded = table.metadata, 0
    bomb = UserError(
        f"holds more than {limit / 1e6:,.0f} MB, a thousand times its size, so it is damaged "
        "or made to fill a memory"
    )
    stored = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
    if max(stored, about.num_rows * about.num_columns) > limit:
        raise bomb
    for batch in table.iter_batches(batch_size=500):
        expanded += sum(map(expanded_size, batch.columns))
        if expanded > limit:
            raise bomb
        yield from batch.to_pylist()


def expanded_size(column: pa.Array) -> int:
    """Bytes of a column as Python has it."""
    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pc.binary_length(column.dictionary)
    return (pc.sum(lengths.take(column.indices)).as_py() or 0) + column.indices.nbytes


def documents_of(lines: Iterator[str], per_document: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each document of a plain text."""
    if per_document == "file":
        yield 1, "".join(lines)
        return
    gathered, first = [], 1
    for number, line in enumerate(lines, start=1):
        if per_document == "line":
            yield number, line
        elif line.strip():
            first = first if gathered else number
            gathered.append(line)
        elif gathered:
            yield first, "".join(gathered)
            gathered = []
    if gathered:
        yield first, "".join(gathered)


# -- rows ------------------------------------------------------------------------------------------


def to_row(
    raw: RawRow, text_field: str = "", kind: str = "auto", drop_keys: Collection[str] = ()
) -> dict[str, Any]:
    """The row in one of MiniMind's formats. UserError if its format is unknown.

    Args:
        text_field: the field that holds the text, where it is none of TEXT_FIELDS.
        kind: "prompts" if a question may come without an answer.
        drop_keys: of the row and of its messages, left out before it is read.
    """
    fields = raw.value()
    if isinstance(fields, str):
        return {"text": fields}
    if not isinstance(fields, dict):
        raise UserError("is no JSON object")
    if drop_keys:
        fields = without(fields, drop_keys)
    if text_field:
        if not isinstance(fields.get(text_field), str):
            raise UserError(f"has no text in {text_field!r}")
        return {"text": as_text(fields, text_field)}
    if kind == "prompts":
        return checked(as_prompt(fields))
    if is_pair(fields):
        return checked(as_pair(fields))
    if has_messages(fields) or has_exchange(fields):
        return checked(as_conversation(fields))
    for name in TEXT_FIELDS:
        if isinstance(fields.get(name), str):
            return {"text": as_text(fields, name)}
    names = ", ".join(map(str, fields)) or "none"
    raise UserError(f"has no known fields ({names}); --text_field names the one with the text")


def checked(row: dict[str, Any]) -> dict[str, Any]:
    for name in MESSAGES:
        if name in row:
            check_messages(row[name], f'"{name}"')
    return row


def without(value: Any, keys: Collection[str]) -> Any:
    """A JSON value without these keys, at any depth."""
    if isinstance(value, list):
        return [without(item, keys) for item in value]
    if isinstance(value, dict):
        return {k: without(item, keys) for k, item in value.items() if k not in keys}
    return value


def kind_of(row: dict[str, Any]) -> str:
    """text, conversations, preferences, or prompts: conversations whose last answer is to be
    written by the model."""
    if "chosen" in row:
        return "preferences"
    if "text" in row:
        return "text"
    messages = row["conversations"]
    return "conversations" if answered_part(messages[-1:]) else "prompts"


def texts_of(row: dict[str, Any]) -> Iterator[str]:
    """Every text of a row, for statistics and deduplication."""
    if "text" in row:
        yield row["text"]
    for name in MESSAGES:
        for message in row.get(name) or ():
            yield message.get("content") or ""
            yield message.get("reasoning_content") or ""
            for field in ("tools", "tool_calls"):
                value = message.get(field) or ""
                yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def whole_text(row: dict[str, Any]) -> str:
    return "\n".join(text for text in texts_of(row) if text)
