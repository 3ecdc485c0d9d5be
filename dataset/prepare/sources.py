"""Files in common formats → rows in MiniMind's formats.

Plain text, JSON lines, JSON lists, CSV, TSV and Parquet are read, all but Parquet also as .gz. The
fields of a row decide what it is:

| fields | is | becomes |
|---|---|---|
| text, content or raw_content | text | {"text"} |
| conversations of from/value | ShareGPT | {"conversations"} |
| messages of role/content | OpenAI | {"conversations"} |
| instruction, input, output, system, history | Alpaca | {"conversations"} |
| prompt and response or completion, question and answer | a pair | {"conversations"} |
| chosen and rejected, as messages or as text with a prompt | preferences | {"chosen", "rejected"} |
"""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charset_normalizer
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dataset.encoding import Message, check_messages
from dataset.jsonl import BinaryFile, open_data, parse_json
from model.errors import UserError
from model.paths import check_input_file

SAMPLE = 2**20  # bytes from which an encoding is guessed
TEXT_FIELDS = ("text", "content", "raw_content")
QUESTION_ANSWER_FIELDS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


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
        return len(self.content) if isinstance(self.content, str) else 1000


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
                with open_data(path) as (raw, file):
                    for row in rows_of(path, file, encoding, per_document):
                        yield row
                        bar.update(max(0, done + raw.tell() - bar.n))
            except (pa.ArrowInvalid, csv.Error) as error:
                raise UserError(f"{path} is damaged, or no {path.suffix} file: {error}") from error
            except (UnicodeError, LookupError) as error:
                raise UserError(f"{path}: {error}; name its --encoding") from error
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
            done += path.stat().st_size


def rows_of(path: Path, file: BinaryFile, encoding: str, per_document: str) -> Iterator[RawRow]:
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind == ".parquet":
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=500):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(str(path), number, row)
        return
    text = io.TextIOWrapper(
        file, encoding=encoding or detect_encoding(path), errors="replace", newline=""
    )
    if kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield RawRow(str(path), number, line, is_json=True)
    elif kind == ".json":
        for number, row in enumerate(json_list(path, text.read()), start=1):
            yield RawRow(str(path), number, row)
    elif kind in (".csv", ".tsv"):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        table = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
        for number, row in enumerate(table, start=2):
            yield RawRow(str(path), number, {k: v for k, v in row.items() if k and v is not None})
    else:
        for number, document in documents_of(text, per_document):
            yield RawRow(str(path), number, document)


def json_list(path: Path, text: str) -> list[Any]:
    """The rows of a .json file that is a list, which is read into memory as a whole."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; name JSON lines .jsonl") from None
    return rows if isinstance(rows, list) else [rows]


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


def detect_encoding(path: Path) -> str:
    """UTF-8 if the beginning of the file is, UTF-16 with a byte order mark, else a guess.

    GB18030 replaces its subsets GB2312 and GBK, as in browsers.
    """
    with open_data(path) as (_, file):
        sample = file.read(SAMPLE)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # may end within a character
        return "utf-8-sig"
    except UnicodeDecodeError as error:
        if error.start > SAMPLE // 100:  # a damaged place in a file of UTF-8
            return "utf-8-sig"
    best = charset_normalizer.from_bytes(sample).best()
    guess = best.encoding if best else "utf-8-sig"
    return "gb18030" if guess in ("gb2312", "gbk", "hz") else guess


# -- rows ------------------------------------------------------------------------------------------


def to_row(raw: RawRow, text_field: str = "") -> dict[str, Any]:
    """The row in one of MiniMind's formats. UserError if its format is unknown.

    Args:
        text_field: the field that holds the text, where it is none of TEXT_FIELDS.
    """
    fields = raw.value()
    if isinstance(fields, str):
        return {"text": fields}
    if not isinstance(fields, dict):
        raise UserError("is no JSON object")
    if text_field:
        if not isinstance(fields.get(text_field), str):
            raise UserError(f"has no text in {text_field!r}")
        return {"text": fields[text_field]}
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        return preferences(fields)
    for name in ("conversations", "messages"):
        if fields.get(name) is not None:
            kept = {name: fields[name] for name in ("answer",) if fields.get(name) is not None}
            return {"conversations": messages_of(fields, fields[name]), **kept}
    if isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str):
        return {"conversations": alpaca(fields)}
    for question, answer in QUESTION_ANSWER_FIELDS:
        if isinstance(fields.get(question), str) and isinstance(fields.get(answer), str):
            return {"conversations": check_messages(turns((fields[question], fields[answer])))}
    for name in TEXT_FIELDS:
        if isinstance(fields.get(name), str):
            return {"text": fields[name]}
    names = ", ".join(map(str, fields)) or "none"
    raise UserError(f"has no known fields ({names}); --text_field names the one with the text")


def kind_of(row: dict[str, Any]) -> str:
    """text, conversations or preferences"""
    return "preferences" if "chosen" in row else "text" if "text" in row else "conversations"


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def alpaca(fields: dict[str, Any]) -> list[Message]:
    """Alpaca: instruction and input make one message; history holds earlier turns."""
    given = [fields["instruction"], fields.get("input") or ""]
    question = "\n".join(part for part in given if part.strip())
    earlier = fields.get("history") or []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in earlier):
        raise UserError('has a "history" that is no list of pairs')
    messages = turns(*map(tuple, earlier), (question, fields["output"]))
    if fields.get("system"):
        messages.insert(0, {"role": "system", "content": fields["system"]})
    return check_messages(messages)


def messages_of(fields: dict[str, Any], given: Any) -> list[Message]:
    """OpenAI's messages, ShareGPT's from and value, and MiniMind's own."""
    if isinstance(given, str):  # a column of a table
        given = parse_json(given)
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise UserError("has messages that are no list of objects")
    messages = [message_of(message) for message in given]
    system = {"role": "system", "content": fields.get("system") or ""}
    if (fields.get("system") or fields.get("tools")) and (
        not messages or messages[0]["role"] != "system"
    ):
        messages.insert(0, system)
    if fields.get("tools") and not messages[0].get("tools"):
        messages[0]["tools"] = fields["tools"]
    return check_messages(messages)


def message_of(given: dict[str, Any]) -> Message:
    if "from" not in given:
        message = {name: value for name, value in given.items() if value is not None}
        if isinstance(message.get("content"), list):  # OpenAI's parts
            parts = [part for part in message["content"] if isinstance(part, dict)]
            message["content"] = "".join(part.get("text") or "" for part in parts)
        if message.get("role") == "developer":
            message["role"] = "system"
        return message
    role = SHAREGPT_ROLES.get(str(given["from"]).lower())
    if role is None:
        raise UserError(f"has a message from {given['from']!r}, whose role is unknown")
    if given["from"] == "function_call":
        return {"role": role, "content": "", "tool_calls": given.get("value")}
    return {"role": role, "content": given.get("value")}


def preferences(fields: dict[str, Any]) -> dict[str, Any]:
    """Both sides as whole conversations."""
    sides = {}
    prompt = fields.get("prompt") or fields.get("instruction") or fields.get("question") or []
    for name in ("chosen", "rejected"):
        side = fields[name]
        if isinstance(side, str):
            side = [{"role": "assistant", "content": side}]
        if isinstance(side, dict):
            side = [message_of(side)]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        whole = messages_of({}, side)
        repeated = any(message["role"] == "user" for message in whole)
        sides[name] = whole if repeated else messages_of({}, before) + whole
    return sides


def texts_of(row: dict[str, Any]) -> Iterator[str]:
    """Every text of a row, for statistics and deduplication."""
    if "text" in row:
        yield row["text"]
    for name in ("conversations", "chosen", "rejected"):
        for message in row.get(name) or ():
            yield message.get("content") or ""
            yield message.get("reasoning_content") or ""
            for field in ("tools", "tool_calls"):
                value = message.get(field) or ""
                yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def whole_text(row: dict[str, Any]) -> str:
    return "\n".join(text for text in texts_of(row) if text)
