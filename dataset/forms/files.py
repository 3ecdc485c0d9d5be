"""The kinds of data files: compressed or not, in which encoding, JSON lines or a JSON list.

    with open_lines("data.json") as (raw, lines):
        for line in lines: ...

`open_lines` gives each of them as lines of UTF-8, one row a line, without reading a whole file into
memory. Of plain JSON lines these are the lines of the file itself. A list, or objects that are
spread over several lines, are taken apart value by value. A file that is something else, such as
Parquet, is refused in a sentence that says what it is.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dataset.text import CHINESE
from model.errors import UserError

PEEK = 4096  # bytes by which a kind of file is recognised
SAMPLE = 2**20  # bytes from which an encoding is guessed
BLOCK = 2**20  # bytes of a list that are read at once
MAX_VALUE = 2**26  # characters of one value of a list; a longer one is taken for damaged
MAX_LINE = 2**28  # bytes of a line of a compressed file
CLEAN = "`python scripts/prepare_data.py clean`"
# How a file begins that is no JSON, what it is, and what helps.
FOREIGN = {
    b"par1": f"is a Parquet file; {CLEAN} makes JSON lines of it",
    b"arrow1": "is an Arrow file; load it with the datasets library and save it by to_json",
    b"pk\x03\x04": "is a zip archive or an Excel file; unpack it, or export it as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; `zstd -d` unpacks it",
    b"bzh": "is compressed with bzip2; `bunzip2` unpacks it",
    b"\xfd7zxz": "is compressed with xz; `unxz` unpacks it",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file; `git lfs pull` fetches it",
    b"<!doctype": "is a web page, so its download failed; download it again",
    b"<html": "is a web page, so its download failed; download it again",
}
TABLES_AND_TEXTS = (".csv", ".tsv", ".txt", ".md")

BinaryFile = BinaryIO | gzip.GzipFile  # in typeshed a GzipFile is no BinaryIO


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
        compressed = path.suffix == ".gz" or raw.peek(2).startswith(b"\x1f\x8b")
        try:
            yield raw, gzip.open(raw) if compressed else raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged, or no gzip file: {error}") from error


@contextmanager
def open_lines(path: str | Path, encoding: str = "") -> Iterator[tuple[BinaryIO, Iterable[bytes]]]:
    """The file on disk, as of `open_data`, and its rows as lines of UTF-8; empty lines included.

    Args:
        encoding: of the file; "": UTF-8, or UTF-16 and UTF-32, which are recognised. Lines of
            UTF-8 are passed on as they are; if another encoding is named, what cannot be decoded
            becomes U+FFFD.

    Raises:
        UserError: it cannot be read, is damaged, or is not JSON.
    """
    path = Path(path)
    with open_data(path) as (raw, file):
        start = file.peek(PEEK)[:PEEK]  # type: ignore[union-attr]
        errors = "replace" if encoding else "strict"
        encoding = encoding or wide_encoding(start) or "utf-8-sig"
        beginning = start.decode(encoding, "ignore").lstrip()
        refuse_foreign(path, start, beginning)
        try:
            if is_list(beginning):
                yield raw, list_lines(path, file, encoding, errors)
            elif encoding == "utf-8-sig":
                if start.startswith(codecs.BOM_UTF8):
                    file.read(len(codecs.BOM_UTF8))
                yield raw, file if raw is file else bounded_lines(file)
            else:
                yield raw, decoded_lines(file, encoding, errors)
        except UnicodeError as error:
            raise UserError(f"{path} is damaged: {error}") from error


@contextmanager
def open_text(
    path: str | Path, newline: str | None = None
) -> Iterator[tuple[BinaryIO, Iterable[str]]]:
    """The file on disk, as of `open_data`, and the lines of a plain text.

    Args:
        newline: as of `open`.

    Raises:
        UserError: it cannot be read, or is neither UTF-8 nor marked as UTF-16 or UTF-32.
    """
    with open_data(path) as (raw, file):
        start = file.peek(PEEK)[:PEEK]  # type: ignore[union-attr]
        encoding = wide_encoding(start) or "utf-8-sig"
        text = io.TextIOWrapper(file, encoding, newline=newline)  # type: ignore[type-var]
        try:
            yield raw, text
        except UnicodeDecodeError as error:
            kind = "GBK (GB18030), not UTF-8" if is_gbk(start) else f"not UTF-8 ({error.reason})"
            raise UserError(f"{path} is {kind}; {CLEAN} converts other encodings") from error
        finally:
            with suppress(ValueError):
                text.detach()


def counts_values(path: str | Path) -> bool:
    """Whether rows of this file are numbered as values of a list, not as lines."""
    try:
        with open_data(path) as (_, file):
            start = file.peek(PEEK)[:PEEK]  # type: ignore[union-attr]
    except UserError:  # it is gone
        return False
    return is_list(start.decode(wide_encoding(start) or "utf-8-sig", "ignore").lstrip())


def is_plain(path: Path) -> bool:
    """Whether the bytes on disk are JSON lines of UTF-8, uncompressed and without a BOM."""
    with open_data(path) as (raw, file):
        start = file.peek(PEEK)[:PEEK]  # type: ignore[union-attr]
    marked = wide_encoding(start) or start.startswith(codecs.BOM_UTF8)
    return raw is file and not marked and not counts_values(path)


def is_list(beginning: str) -> bool:
    """Whether a text is a JSON list, or objects that are spread over several lines."""
    return beginning.startswith("[") or re.match(r"\{[ \t\r]*\n", beginning) is not None


def refuse_foreign(path: Path, start: bytes, beginning: str) -> None:
    for magic, what in FOREIGN.items():
        if start.lower().startswith(magic):
            raise UserError(f"{path} {what}")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in TABLES_AND_TEXTS and beginning and beginning[0] not in "{[":
        raise UserError(f"{path} is no JSON but a {suffix} file; {CLEAN} makes JSON lines of it")


# -- encodings -------------------------------------------------------------------------------------


def wide_encoding(start: bytes) -> str:
    """UTF-16 or UTF-32, by the byte order mark or the zeros of JSON's first character; else ""."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if start[:2] in (b"{\0", b"[\0"):
        return "utf-16-le"
    return "utf-16-be" if start[:2] in (b"\0{", b"\0[") else ""


def detect_encoding(path: Path) -> str:
    """The encoding of a text: UTF-8 if the beginning of the file is, else the likeliest other."""
    with open_data(path) as (_, file):
        sample = file.read(SAMPLE)
    if wide := wide_encoding(sample):
        return wide
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # may end within a character
        return "utf-8-sig"
    except UnicodeDecodeError as error:
        if error.start > SAMPLE // 100:  # a damaged place in a file of UTF-8
            return "utf-8-sig"
    if is_gbk(sample):
        return "gb18030"
    import charset_normalizer  # slow to import, and seldom needed

    best = charset_normalizer.from_bytes(sample).best()
    guess = best.encoding if best else "utf-8-sig"
    return "gb18030" if guess in ("gb2312", "gbk", "hz") else guess


def is_gbk(sample: bytes) -> bool:
    """Whether bytes are Chinese in GBK or GB18030: four fifths of the characters that they spell
    are in the first level of GB2312, which holds the common ones. Other encodings that can be
    decoded so spell rare ones."""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    chinese = CHINESE.findall(text)
    lead_bytes = "".join(chinese).encode("gb2312", "ignore")[::2]
    return sum(byte <= 0xD7 for byte in lead_bytes) > 0.8 * len(chinese)


def bounded_lines(file: BinaryFile) -> Iterator[bytes]:
    """The lines of a compressed file, of which a few kilobytes may hold gigabytes in one."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise UserError(f"{file.name} has a line of more than {MAX_LINE / 1e6:,.0f} MB")
        yield line


def decoded_lines(file: BinaryFile, encoding: str, errors: str) -> Iterator[bytes]:
    text = io.TextIOWrapper(file, encoding, errors, newline="\n")  # type: ignore[type-var]
    try:
        for line in text:
            yield line.encode()
    finally:
        with suppress(ValueError):  # the file is closed already
            text.detach()  # or it would close the file


# -- lists -----------------------------------------------------------------------------------------


def list_lines(path: Path, file: BinaryFile, encoding: str, errors: str) -> Iterator[bytes]:
    decode = codecs.getincrementaldecoder(encoding)(errors).decode
    blocks = (decode(block) for block in iter(lambda: file.read(BLOCK), b""))
    for value in json_values(path, blocks):
        # a line break in JSON is white space: within a text it is written \n
        yield value.replace("\r", " ").replace("\n", " ").encode()


def json_values(path: Path, blocks: Iterator[str]) -> Iterator[str]:
    """The texts of the values of a JSON list, or of values that follow one another.

    A value that is not JSON is passed on with all that follows, for its reader to complain about.
    """
    scan, separator = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    buffer, at, in_list = "", 0, False

    def read_more() -> bool:
        """Double what is unread in the buffer, so that a long value is not scanned too often."""
        nonlocal buffer, at
        parts, size = [buffer[at:]], 0
        for block in blocks:
            parts.append(block)
            size += len(block)
            if size >= len(parts[0]):
                break
        buffer, at = "".join(parts), 0
        return size > 0

    while True:
        at = separator.match(buffer, at).end()  # type: ignore[union-attr]
        if at == len(buffer):
            if read_more():
                continue
            if in_list:
                raise UserError(f"{path} is cut off: its JSON list does not end")
            return
        if not in_list and buffer[at] == "[":
            in_list, at = True, at + 1
            continue
        if in_list and buffer[at] == "]":
            if (buffer[at + 1 :] + "".join(blocks)).strip():
                raise UserError(f"{path} is a JSON list that text follows; write one row a line")
            return
        try:
            end = scan(buffer, at)[1]
        except (ValueError, RecursionError):
            end = len(buffer)
        if end == len(buffer) and end - at < MAX_VALUE and read_more():
            continue  # it may go on in what has been read now
        yield buffer[at:end]
        at = end
