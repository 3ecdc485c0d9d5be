"""Exact duplicates, near duplicates, and rows that contain a benchmark's questions.

- exact: the same text but for white space and Unicode normalisation (NFC); the first row stays.
- near: a Jaccard similarity of the sets of 5-word runs of at least `threshold`, by MinHash (Broder
  1997; datasketch) and locality sensitive hashing: a signature of 128 minima is cut into bands of
  rows, and rows that agree in a whole band are compared by their signatures. Similarity is taken
  as transitive, and the first row of each connected component stays. A Chinese character is a word.
- evaluation: a 13-gram of words (as in GPT-3, arXiv 2005.14165) that an evaluation file has too; of
  a question of 8 to 12 words all of it, and a shorter one is not looked for.

datasketch computes the signatures and chooses the bands; its index, a dict of all of them, takes
kilobytes a row. Here signatures and bands are written to files, 0.6 kB a row, and one band at a
time is sorted, so that about 80 bytes a row are in memory, however long the rows are.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from dataset.jsonl import as_line, error_at
from dataset.prepare.resumable import ChunkResult
from dataset.prepare.sources import RawRow, read_raw, to_row, whole_text
from dataset.prepare.words import hash_ngrams, hash_words, words_of
from model.errors import UserError

SHINGLE = 5  # words
SHORTEST_QUESTION = 8  # words
# Bands that miss few near duplicates: a false candidate only costs a comparison. At a threshold of
# 0.8 and 128 minima they find 87% of pairs of similarity 0.8, and 99.9% of those of 0.9.
WEIGHTS = (0.1, 0.9)  # of false positives and false negatives
KEPT, EXACT, NEAR, EVALUATION, BAD = range(5)
REASONS = {
    EXACT: "exact duplicate",
    NEAR: "near duplicate",
    EVALUATION: "in an evaluation file",
    BAD: "bad row",
}
SHINGLES_PER_UPDATE = 10_000  # hashed at once, in a table of num_perm times as many numbers
BLOCK = 2**16  # rows of a file that are processed at once


def checked_row(raw: RawRow) -> dict:
    """As `row_of`, with the row's place in the error."""
    with error_at(raw.path, raw.number):
        return row_of(raw)


def row_of(raw: RawRow) -> dict:
    """The row in one of MiniMind's formats; a prompt may have no answer. UserError if it is in
    none."""
    try:
        return to_row(raw)
    except UserError as error:
        with suppress(UserError):
            return to_row(raw, kind="prompts")
        raise UserError(f"{error}; clean makes rows of it, or leaves it out") from None


def rows_or_none(chunk: list[RawRow], skip_bad_rows: bool) -> tuple[list[dict], list[int]]:
    """The rows, an empty text in place of a bad one, and the places of the bad ones."""
    rows, is_bad = [], []
    for number, raw in enumerate(chunk):
        try:
            rows.append(checked_row(raw))
        except UserError:
            if not skip_bad_rows:
                raise
            rows.append({"text": ""})
            is_bad.append(number)
    return rows, is_bad


def exact_key(text: str) -> bytes:
    """16 bytes, the same for texts that differ only in white space or Unicode normalisation."""
    return blake2b(
        " ".join(unicodedata.normalize("NFC", text).split()).encode(), digest_size=16
    ).digest()


# -- evaluation files ------------------------------------------------------------------------------


@dataclass
class Questions:
    """The n-grams of evaluation files: for each n, their sorted hashes."""

    ngrams: dict[int, np.ndarray] = field(default_factory=dict)

    def occur_in(self, words: np.ndarray) -> bool:
        """Whether a text with these hashed words contains one of them."""
        for n, known in self.ngrams.items():
            here = hash_ngrams(words, n)
            at = np.searchsorted(known, here)
            if len(here) and (known[np.minimum(at, len(known) - 1)] == here).any():
                return True
        return False


def read_questions(files: list[Path], overlap: int = 13) -> Questions:
    """The n-grams of all texts in evaluation files of any format: each string of each row is one.

    Args:
        overlap: n, of the n-grams by which a text is recognised.

    Raises:
        UserError: a file has no text that is long enough to be recognised.
    """
    found: dict[int, list[np.ndarray]] = {}
    for path in files:
        before = sum(map(len, found.values()))
        for raw in read_raw([path], about=f"reading {path.name}"):
            for text in strings_in(raw.value()):
                words = hash_words(words_of(text))
                n = min(overlap, len(words))
                if n >= SHORTEST_QUESTION:
                    found.setdefault(n, []).append(np.unique(hash_ngrams(words, n)))
        if sum(map(len, found.values())) == before:
            raise UserError(f"{path} holds no text of {SHORTEST_QUESTION} words or more")
    return Questions({n: np.unique(np.concatenate(some)) for n, some in found.items()})


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


# -- signatures ------------------------------------------------------------------------------------


@dataclass
class Signer:
    """A chunk of rows → a record of fixed size per row in each of `Signatures`' files."""

    threshold: float
    num_perm: int
    questions: Questions
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        lsh = MinHashLSH(self.threshold, self.num_perm, WEIGHTS)
        self.bands, self.rows = lsh.b, lsh.r  # as many bands, of as many rows each
        self.empty = MinHash(self.num_perm, hashfunc=int)  # words are already hashed

    def __call__(self, chunk: list[RawRow]) -> ChunkResult:
        rows, is_bad = rows_or_none(chunk, self.skip_bad_rows)
        texts = [whole_text(row) for row in rows]
        words = [hash_words(words_of(text)) for text in texts]
        leaks = np.array([self.questions.occur_in(some) for some in words], np.uint8)
        leaks[is_bad] = BAD
        signatures = np.stack([self.signature(some) for some in words])
        # the same question with another truth is another row
        truths = (str(row.get("answer", row.get("gt")) or "") for row in rows)
        keys = b"".join(
            exact_key(f"{text}\n{truth}") for text, truth in zip(texts, truths, strict=True)
        )
        outputs = [
            keys,
            leaks.tobytes(),
            signatures.tobytes(),
            self.band_keys(signatures).tobytes(),
        ]
        return ChunkResult(outputs, Counter({"rows read": len(chunk)}))

    def signature(self, words: np.ndarray) -> np.ndarray:
        """[num_perm] uint32; all ones, no signature, for a text of fewer than SHINGLE words."""
        minhash = self.empty.copy()
        ngrams = np.unique(hash_ngrams(words, SHINGLE) >> np.uint64(32))
        for begin in range(0, len(ngrams), SHINGLES_PER_UPDATE):
            minhash.update_batch(ngrams[begin : begin + SHINGLES_PER_UPDATE].tolist())
        return minhash.hashvalues

    def band_keys(self, signatures: np.ndarray) -> np.ndarray:
        """[rows, num_perm] → [rows, bands] uint64; 0 where there is no signature."""
        banded = signatures[:, : self.bands * self.rows].reshape(-1, self.rows)
        keys = hash_ngrams(banded.T.astype(np.uint64), self.rows)[0]
        keys = keys.reshape(len(signatures), self.bands)
        keys[signatures.min(1) == np.uint32(2**32 - 1)] = 0
        return keys


@dataclass
class Signatures:
    """The files that a Signer wrote, and what follows from them."""

    folder: Path
    threshold: float
    num_perm: int
    bands: int

    def files(self) -> list[Path]:
        return [self.folder / name for name in ("keys", "leaks", "signatures", "bands")]

    def __len__(self) -> int:
        return (self.folder / "leaks").stat().st_size

    def band(self, number: int) -> np.ndarray:
        """[rows] uint64: the keys of one band, a column of the file, read in blocks."""
        column = np.empty(len(self), np.uint64)
        with open(self.folder / "bands", "rb") as file:
            for begin in range(0, len(self), BLOCK):
                block = np.fromfile(file, np.uint64, BLOCK * self.bands).reshape(-1, self.bands)
                column[begin : begin + len(block)] = block[:, number]
        return column

    def decide(self, near: bool = True) -> np.ndarray:
        """[rows] uint8: KEPT, EXACT, NEAR (only if `near`) or EVALUATION."""
        leaks = np.fromfile(self.folder / "leaks", np.uint8)
        decision = np.select([leaks == BAD, leaks > 0], [BAD, EVALUATION], KEPT).astype(np.uint8)
        self.find_exact(decision)
        if near:
            self.find_near(decision)
        return decision

    def find_exact(self, decision: np.ndarray) -> None:
        """Mark all but the first row of each key, among those that are kept."""
        keys = np.fromfile(self.folder / "keys", "V16").view("<u8").reshape(-1, 2)
        rows = np.flatnonzero(decision == KEPT)
        order = rows[np.lexsort((rows, keys[rows, 1], keys[rows, 0]))]
        again = (keys[order[1:]] == keys[order[:-1]]).all(1)
        decision[order[1:][again]] = EXACT

    def find_near(self, decision: np.ndarray) -> None:
        """Mark all but the first row of each group of near duplicates, among those kept."""
        if not len(self):
            return
        rows = np.flatnonzero(decision == KEPT)
        group = np.arange(len(self), dtype=np.int32)  # first row of the component of each row
        signatures = np.memmap(
            self.folder / "signatures", np.uint32, "r", shape=(len(self), self.num_perm)
        )
        for number in tqdm(range(self.bands), desc="comparing bands", leave=False):
            keys = self.band(number)[rows]
            order = np.argsort(keys, kind="stable")  # rows of a bucket stay in order
            keys = keys[order]
            edges = np.flatnonzero(np.diff(keys, prepend=~keys[:1], append=~keys[-1:]))
            sizes = np.diff(edges)
            pairs = []
            for begin, size in zip(edges[:-1][sizes > 1], sizes[sizes > 1], strict=True):
                if keys[begin]:
                    bucket = rows[order[begin : begin + size]]
                    pairs += self.similar(bucket, signatures, group)
            group = merge_components(group, pairs)
        decision[rows[group[rows] != rows]] = NEAR

    def similar(
        self, bucket: np.ndarray, signatures: np.ndarray, group: np.ndarray
    ) -> list[np.ndarray]:
        """[2, …] pairs of similar rows of a bucket, enough to connect its components.

        Each row is compared with those not yet reached: only once each, if all are similar.
        """
        pairs, reached = [], []
        while len(bucket):
            if not reached:
                reached, bucket = [bucket[0]], bucket[1:]
            row = reached.pop()
            alike = group[bucket] == group[row]  # known from an earlier band
            for begin in range(0, len(bucket), BLOCK):
                some = signatures[bucket[begin : begin + BLOCK]] == signatures[row]
                alike[begin : begin + BLOCK] |= some.mean(1) >= self.threshold
            pairs.append(np.stack([np.full(alike.sum(), row), bucket[alike]]))
            reached += bucket[alike].tolist()
            bucket = bucket[~alike]
        return pairs


def merge_components(group: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """[rows] the first row of each row's component, the components of each pair merged."""
    if not pairs:
        return group
    left, right = group[np.concatenate(pairs, 1)]
    edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(group),) * 2)
    _, labels = connected_components(edges, directed=False)
    first = np.full(labels.max() + 1, len(group), group.dtype)
    np.minimum.at(first, labels, np.arange(len(group), dtype=group.dtype))
    return first[labels[group]]


@dataclass
class Selector:
    """A chunk of (row, decision) → the unchanged lines of the rows that are kept."""

    with_dropped: bool = False

    def __call__(self, chunk: list[tuple[RawRow, int]]) -> ChunkResult:
        kept: list[str] = []
        dropped: list[str] = []
        counts, examples = Counter(), {}
        for raw, decision in chunk:
            assert isinstance(raw.content, str)  # a line: what is deduplicated is cleaned JSONL
            line = raw.content if raw.content.endswith("\n") else raw.content + "\n"
            counts["rows read"] += 1
            if decision == KEPT:
                kept.append(line)
                continue
            name = f"dropped: {REASONS[decision]}"
            counts[name] += 1
            examples.setdefault(name, []).append(f"{raw.place()}: {line[:100].strip()}")
            if self.with_dropped:
                about = {"file": raw.path, "number": raw.number, "reason": REASONS[decision]}
                row = line if decision == BAD else json.loads(line)
                dropped.append(as_line({**about, "row": row}))
        counts["rows kept"] += len(kept)
        files = [kept, dropped] if self.with_dropped else [kept]
        return ChunkResult(["".join(lines).encode() for lines in files], counts, examples)
