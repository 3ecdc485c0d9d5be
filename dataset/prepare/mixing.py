"""Several files → one shuffled file: weighted, split, and sorted by length if asked for.

Which split a row belongs to follows from a hash of its text, so that a text and all its copies are
on the same side in every mixture. The order is that of another hash, which depends on the seed.
About 30 bytes a row are in memory; the rows stay on disk.
"""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.forms.files import is_plain, open_lines
from dataset.jsonl import BadRows, decode, error_at, read_lines
from dataset.prepare.deduplication import exact_key, row_of
from dataset.prepare.resumable import ChunkResult
from dataset.prepare.sources import RawRow, whole_text
from model.errors import UserError


@dataclass
class Index:
    """Position, size and hash of the rows of all files."""

    files: list[Path]  # of plain JSON lines
    names: list[str]  # as the user knows them
    file: np.ndarray  # [rows] uint16
    start: np.ndarray  # [rows] int64, bytes
    size: np.ndarray  # [rows] int32, bytes, with the line break
    key: np.ndarray  # [rows] uint64

    def __len__(self) -> int:
        return len(self.key)


def plain_files(files: list[Path], folder: Path) -> list[Path]:
    """The files as JSON lines of UTF-8: those that are compressed, a list, or in another encoding
    are written to `folder`."""
    plain = []
    for number, path in enumerate(files):
        if is_plain(path):
            plain.append(path)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        plain.append(folder / f"{number}.jsonl")
        with open_lines(path) as (_, lines), open(plain[-1], "wb") as target:
            target.writelines(line if line.endswith(b"\n") else line + b"\n" for line in lines)
    return plain


def index_rows(files: list[Path], given: list[Path], bad_rows: BadRows | None = None) -> Index:
    """Read every row once. UserError for a line that is no row of MiniMind's formats.

    Args:
        files: plain JSON lines, made of the `given` files.
        bad_rows: counts such lines, which are then left out.
    """
    names = [path.name for path in given]
    columns: list[tuple[int, int, int, int]] = []
    parts: list[list[np.ndarray]] = []

    def pack() -> None:
        if columns:
            kinds = (np.uint16, np.int64, np.int32, np.uint64)
            parts.append([np.array(*c) for c in zip(zip(*columns), kinds, strict=True)])  # noqa: B905
            columns.clear()

    size = sum(path.stat().st_size for path in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", leave=False) as bar:
        for number, path in enumerate(files):
            start = 0
            for at, line in read_lines(path):
                row = None
                if line.strip():
                    with error_at(given[number], at, bad_rows):
                        row = row_of(RawRow(str(given[number]), at, decode(line), is_json=True))
                if row is not None:
                    key = int.from_bytes(exact_key(whole_text(row))[:8], "little")
                    columns.append((number, start, len(line), key))
                start += len(line)
                bar.update(len(line))
                if len(columns) == 50_000:
                    pack()
    pack()
    if bad_rows:
        bad_rows.refuse_if_all(len(parts))
    if not parts:
        raise UserError(f"{', '.join(names)} hold no rows")
    return Index(files, names, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def uniform_hash(key: np.ndarray, purpose: str) -> np.ndarray:
    """[rows] float64 in [0, 1): numbers that depend on the hash and the purpose alone."""
    salt = np.uint64(int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little"))
    mixed = key ^ salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)  # splitmix64
    return (mixed >> np.uint64(11)) / 2.0**53


def repeats_of_rows(
    index: Index, weights: list[float], size: float, max_repeat: float
) -> np.ndarray:
    """[rows] how often each row is repeated.

    Args:
        weights: of the files, as shares of the output's bytes; none: every row once.
        size: bytes of the output; 0: as many as fill the shares without repeating a row.
        max_repeat: how often a row may be repeated.

    Raises:
        UserError: a file is too small for its share.
    """
    if not weights:
        return np.ones(len(index), np.int64)
    held = np.bincount(index.file, index.size, len(index.files))
    shares = np.array(weights) / sum(weights)
    if not held[shares > 0].all():
        raise UserError(f"{index.names[int(held.argmin())]} has a --weight and no rows")
    if not size:
        size = min(h / s for h, s in zip(held, shares, strict=True) if s)
    repeats = np.divide(shares * size, held, out=np.zeros(len(held)), where=held > 0)
    for name, repeat in zip(index.names, repeats, strict=True):
        if repeat > max_repeat + 1e-9:
            raise UserError(
                f"{name} would have to be repeated {repeat:.1f} times; give it less --weight, "
                f"a smaller --megabytes, or raise --max_repeat {max_repeat:g}"
            )
    wanted = repeats[index.file]
    whole = np.floor(wanted + 1e-9)
    # the rows of a file that are repeated once more are chosen by hash, up to the exact size
    more = np.zeros(len(index), bool)
    for number in range(len(index.files)):
        rows = np.flatnonzero(index.file == number)
        rows = rows[np.argsort(uniform_hash(index.key[rows], "part"), kind="stable")]
        bytes_wanted = shares[number] * size - (whole[rows] * index.size[rows]).sum()
        more[rows] = np.cumsum(index.size[rows]) <= bytes_wanted + 0.5
    return (whole + more).astype(np.int64)


@dataclass
class Mixture:
    """The rows of each output, in their order."""

    parts: list[np.ndarray]
    val: np.ndarray


def draw_mixture(
    index: Index, times: np.ndarray, val_share: float, stages: int, order: str, seed: int
) -> Mixture:
    """Which rows go into which output.

    Args:
        times: [rows] how often each is repeated.
        val_share: share of the texts that is held out, each once.
        stages: number of outputs, of about equal bytes; several: from short rows to long ones.
        order: "shuffled", "length" (short rows first) or "kept" (as in the files).
    """
    held_out = uniform_hash(index.key, "held out") < val_share
    rows = np.repeat(np.arange(len(index)), np.where(held_out, 0, times))
    copy = np.arange(len(rows)) - np.searchsorted(rows, rows)  # which copy of its row
    place = uniform_hash(index.key[rows] + copy.astype(np.uint64), f"order {seed}")
    by = {
        "shuffled": lambda: np.argsort(place, kind="stable"),
        "length": lambda: np.lexsort((place, index.size[rows])),
        "kept": lambda: np.arange(len(rows)),
    }
    if stages == 1:
        parts = [rows[by[order]()]]
    else:
        rising = rows[by["length"]()]
        ends = np.cumsum(index.size[rising])
        stage = np.minimum((ends - 1) * stages // max(1, ends[-1:].sum()), stages - 1)
        parts = [rising[stage == number] for number in range(stages)]
        if order == "shuffled":
            parts = [np.random.default_rng([seed, n]).permutation(p) for n, p in enumerate(parts)]
    val = np.flatnonzero(held_out & (times > 0))
    _, first = np.unique(index.key[val], return_index=True)  # a text is held out once
    return Mixture(parts, val[np.sort(first)])


@dataclass
class LineReader:
    """A chunk of rows of the index → their lines."""

    files: list[Path]
    names: list[str]

    def __call__(self, chunk: list[tuple[int, int, int]]) -> ChunkResult:
        lines, opened = [], {}
        try:
            for number, start, size in chunk:
                if number not in opened:
                    opened[number] = open(self.files[number], "rb")
                opened[number].seek(start)
                line = opened[number].read(size)
                lines.append(line if line.endswith(b"\n") else line + b"\n")
        finally:
            for file in opened.values():
                file.close()
        counts = Counter(f"rows of {self.names[number]}" for number, *_ in chunk)
        counts["rows"] = len(chunk)
        return ChunkResult([b"".join(lines)], counts)


def positions(index: Index, rows: np.ndarray):
    """(file, start, size) of each."""
    for begin in range(0, len(rows), 50_000):
        some = rows[begin : begin + 50_000]
        columns = (index.file[some], index.start[some], index.size[some])
        yield from zip(*(column.tolist() for column in columns), strict=True)
