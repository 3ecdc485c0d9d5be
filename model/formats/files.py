"""Files that are written whole or not at all, with a checksum that is checked when they are read.

The checksum is 31 bytes at the end of a file: "MiniMind xxh3: " and the 64-bit XXH3 hash, in hex,
of all that comes before. Whoever does not know it reads the file as ever: in a `.pth`, a zip
archive, it is the archive's comment; in JSON the last key, "checksum"; Arrow streams and `.npy` end
before it.
Files without one, of other programs and earlier versions, are read as they are.

It is there against bit rot and bad copies, and proves nothing about who wrote a file.
"""

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64_hexdigest

from model.errors import UserError, reason_of

MARK = b"MiniMind xxh3: "
LENGTH = len(MARK) + 16
JSON_KEY, JSON_END = b',\n  "checksum": "', b'"\n}\n'
MAX_JSON = 2**28  # bytes; what is longer is none of the files that are read at once


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Write to a temporary file, then rename it to `path`: a reader sees the old file or the new
    one, never half of it, even if the process is killed. UserError if it cannot be written.

    The `.{name}.partial` that a killed process leaves is overwritten next time.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w+b") as file:  # readable too: add_checksum reads it
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # on a full disk, torch.save raises a RuntimeError from the OSError
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        why = reason.strerror or reason
        raise UserError(
            f"cannot write {path}: {why}; a file that was there before is unchanged"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def add_checksum(file: BinaryIO, zipped: bool = False) -> None:
    """Append the checksum to a file that is open for reading and writing.

    Args:
        zipped: it is a zip archive: the checksum becomes its comment, whose length stands in the
            archive's last two bytes.
    """
    if zipped:
        file.seek(-2, os.SEEK_END)
        file.write(LENGTH.to_bytes(2, "little"))
    file.flush()
    digest = hash_of_file(file, file.seek(0, os.SEEK_END))
    file.write(MARK + digest)


def write_json(path: Path | str, content: Any, checksum: bool = False) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # half a surrogate, as in names of files that are not UTF-8, becomes an escape of JSON
    data = text.encode(errors="backslashreplace")
    if checksum and content:
        data = data.removesuffix(b"\n}") + JSON_KEY
        data += MARK + xxh3_64_hexdigest(data).encode() + JSON_END
    else:
        data += b"\n"
    with atomic_write(path) as file:
        file.write(data)


# -- reading ---------------------------------------------------------------------------------------


def verify(path: Path | str, advice: str, end: bytes = b"") -> bool:
    """Whether a file has a checksum. UserError if its content is not what the checksum says.

    Args:
        advice: what to do about a damaged file.
        end: what follows the checksum.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        hashed = size - LENGTH - len(end)
        if hashed < 0:
            return False
        file.seek(hashed)
        tail = file.read()
        # a bit of the mark itself may have flipped
        if sum(a == b for a, b in zip(tail, MARK, strict=False)) < len(MARK) - 3:
            return False
        if tail != MARK + hash_of_file(file, hashed) + end:
            raise UserError(
                f"{path} is damaged: its content is not what was written (its checksum differs); "
                f"{advice}"
            )
    return True


def hash_of_file(file: BinaryIO, size: int) -> bytes:
    """The hash of its first bytes. Mapped, so that they need not be copied first."""
    if not size:
        return xxh3_64_hexdigest(b"").encode()
    with (
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        return xxh3_64_hexdigest(content).encode()


def read_json(path: Path | str, advice: str) -> dict[str, Any]:
    """The JSON object in a file, without its checksum. UserError if it is damaged, or no object.

    Args:
        advice: what to do then.
    """
    path = Path(path)
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON:
            raise ValueError("it is no file" if path.exists() else "it does not exist")
        verify(path, f"if you changed it, remove its checksum; else {advice}", JSON_END)
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else reason_of(error)
        raise UserError(f"{path} is damaged or cannot be read ({reason}); {advice}") from error
    content.pop("checksum", None)
    return content
