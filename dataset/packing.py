"""Documents → rows of max_seq_len tokens → batches, and the order in which they are trained.

Documents are packed several to a row by best fit (arXiv 2404.10830), so that hardly a token of a
row is padding; `position_ids` restart at 0 with each document, by which the model keeps them
apart. A document longer than a row is split, its pieces overlapping by one token, so that every
token but the first is still predicted once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from model.losses import IGNORED


@dataclass
class Batch:
    """Rows for one forward pass, all [B, T]."""

    input_ids: Tensor
    labels: Tensor  # input_ids where trained, else -100; the model shifts them
    position_ids: Tensor
    tokens: int  # real tokens, padding not counted
    labelled: int  # tokens that the loss is summed over
    rows: int  # rows that have a token

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory that the GPU can read while the CPU goes on (DataLoader calls this)."""
        return self.each(Tensor.pin_memory)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = map(function, (self.input_ids, self.labels, self.position_ids))
        return Batch(*tensors, self.tokens, self.labelled, self.rows)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


@dataclass
class Pieces:
    """Stretches of documents, none longer than a row; int32 arrays of the same length, for there
    may be tens of millions."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def split_documents(lengths: np.ndarray, row_length: int) -> Pieces:
    """Cut documents longer than a row, each piece beginning with the last token of the one
    before it. Documents of a single token have nothing to predict and are left out."""
    if row_length < 2:
        raise ValueError("a row must hold at least two tokens")
    stride = row_length - 1
    pieces = np.maximum(0, -(-(lengths - 1) // stride))  # ceil: predicted tokens / stride
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), pieces)
    first = np.repeat((np.cumsum(pieces) - pieces).astype(np.int32), pieces)
    start = (np.arange(len(document), dtype=np.int32) - first) * np.int32(stride)
    return Pieces(document, start, np.minimum(lengths[document] - start, row_length))


def best_fit_rows(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each piece: longest pieces first, each into the fullest row that has room.

    Pieces of one length are placed together, so that millions take seconds: best fit puts as many
    as will go into a row of the least sufficient room, then into the next such row, then into rows
    of the next larger room, and at last into new ones.
    """
    row_of = np.empty(len(lengths), dtype=np.int32)
    open_rows: dict[int, np.ndarray] = {}  # room left → the rows that have it
    rows = 0
    counts = np.bincount(lengths)
    by_length = np.split(np.argsort(lengths, kind="stable"), np.cumsum(counts)[:-1])
    for length in np.flatnonzero(counts)[::-1].tolist():
        pieces = by_length[length]
        for room in [*sorted(room for room in open_rows if room >= length), row_length]:
            if len(pieces) == 0:
                break
            each = room // length  # pieces that a row takes
            needed = -(-len(pieces) // each)
            if room in open_rows:
                chosen, open_rows[room] = np.split(open_rows[room], [needed])
            else:
                chosen = np.arange(rows, rows + needed, dtype=np.int32)
                rows += needed
            placed = np.repeat(chosen, each)[: len(pieces)]
            row_of[pieces[: len(placed)]] = placed
            pieces = pieces[len(placed) :]
            last = len(placed) - each * (len(chosen) - 1)  # what the last of them takes
            for some, taken in ((chosen[:-1], each), (chosen[-1:], last)):
                left = room - taken * length
                if left and len(some):
                    open_rows[left] = np.concatenate((open_rows.get(left, some[:0]), some))
    return row_of


class Rows(torch.utils.data.Dataset):
    """Rows of at most `row_length` tokens out of tokenised documents.

    Args:
        documents: columns input_ids and loss_mask, as `load_documents` gives them.
        chosen: which documents; default: all.
        packing: several documents a row; else one, or one piece of one.
    """

    documents_name, rows_name = "documents", "rows"

    def __init__(
        self,
        documents: Dataset,
        row_length: int,
        chosen: np.ndarray | None = None,
        packing: bool = True,
    ):
        self.documents = documents
        self.row_length = self.tokens_of_longest = row_length
        lengths = document_lengths(documents)
        self.chosen = np.arange(len(lengths)) if chosen is None else chosen
        self.pieces = split_documents(lengths[self.chosen], row_length)
        count = len(self.pieces.length)
        row_of = best_fit_rows(self.pieces.length, row_length) if packing else np.arange(count)
        # pieces in the order of their rows, and where each row's pieces begin and end
        self.by_row = np.argsort(row_of, kind="stable").astype(np.int32)
        self.edges = np.concatenate(([0], np.cumsum(np.bincount(row_of)))).astype(np.int64)

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def tokens(self) -> int:
        return int(self.pieces.length.sum())

    @property
    def description(self) -> str:
        """A hash of all documents, the same for the same data anywhere."""
        return self.documents.info.description

    @property
    def cut(self) -> int:
        """How many documents are longer than a row, and so in pieces."""
        return len(self.pieces.document) - len(np.unique(self.pieces.document))

    @property
    def summary(self) -> str:
        cut = f"; {self.cut:,} documents are longer than a row and cut" if self.cut else ""
        return (
            f"{len(self.chosen):,} documents, {self.tokens:,} tokens in {len(self):,} rows of "
            f"{self.row_length} ({self.fill:.1%} full, {1 - self.fill:.1%} wasted on padding){cut}"
        )

    @property
    def fill(self) -> float:
        """The share of the rows' places that real tokens take."""
        return self.tokens / max(1, len(self) * self.row_length)

    def __getitem__(self, row: int | None) -> list[dict[str, np.ndarray]]:
        """The pieces of a row; None gives a row without any, which ranks use to stay in step."""
        if row is None:
            return []
        members = self.by_row[self.edges[row] : self.edges[row + 1]]
        documents = self.documents[self.chosen[self.pieces.document[members]].tolist()]
        ends = self.pieces.start[members] + self.pieces.length[members]
        spans = zip(self.pieces.start[members], ends, strict=True)
        columns = (documents["input_ids"], documents["loss_mask"])
        return [
            {"input_ids": ids[start:end], "loss_mask": loss_mask[start:end]}
            for (start, end), ids, loss_mask in zip(spans, *columns, strict=True)
        ]


def document_lengths(documents: Dataset) -> np.ndarray:
    """[documents] tokens of each (int32), read from the Arrow offsets alone."""
    column = documents.data.column("input_ids")
    offsets = [np.asarray(chunk.offsets) for chunk in column.chunks]
    return np.concatenate([np.diff(offset) for offset in offsets])


def collate(rows: list[list[dict[str, np.ndarray]]], pad_id: int = 0) -> Batch:
    """Rows to one batch, padded to the longest of them.

    The first token of each document carries no loss: what would predict it is another document.
    Padding is a document of its own.
    """
    longest = max(2, max(sum(len(piece["input_ids"]) for piece in row) for row in rows))
    input_ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    position_ids = np.zeros((len(rows), longest), dtype=np.int64)
    tokens = 0
    for r, row in enumerate(rows):
        at = 0
        for piece in row:
            end = at + len(piece["input_ids"])
            input_ids[r, at:end] = piece["input_ids"]
            labels[r, at:end] = np.where(piece["loss_mask"], piece["input_ids"], IGNORED)
            labels[r, at] = IGNORED
            position_ids[r, at:end] = np.arange(end - at)
            at = end
        position_ids[r, at:] = np.arange(longest - at)
        tokens += at
    tensors = map(torch.from_numpy, (input_ids, labels, position_ids))
    return Batch(*tensors, tokens, int((labels != IGNORED).sum()), sum(map(bool, rows)))


class WindowSampler(torch.utils.data.Sampler):
    """Which rows this rank reads for each update ("window"), epoch after epoch.

    The order of all rows depends on seed and epoch alone, and a window takes the next of them: any
    number of ranks walks through the same rows in the same order. A full window has
    batch_size · accumulation_steps · ranks rows; its micro-batches are dealt out to the ranks in
    turn. The last window of an epoch is what is left; a rank left without rows gets an empty one
    (None).

    With `batch_ramp` n, windows grow: each has an n-th of the rows trained so far, in whole
    multiples of `first_window`, at least one of them and at most a full window. How many rows an
    update should average over grows with what the model has learnt (arXiv 1812.06162, 2410.21676):
    at first even a few agree on where to go.
    """

    def __init__(
        self,
        rows: int,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        epochs: int = 1,
        seed: int = 42,
        rank: int = 0,
        ranks: int = 1,
        batch_ramp: int = 0,
        first_window: int = 1,
    ):
        self.rows, self.batch_size, self.epochs, self.seed = rows, batch_size, epochs, seed
        self.window = batch_size * accumulation_steps * ranks
        self.rank, self.ranks = rank, ranks
        self.batch_ramp, self.first_window = batch_ramp, first_window
        self.start = 0  # rows already trained, in all epochs together

    def windows(self) -> Iterator[tuple[int, int]]:
        """Of each window from `start` on, the rows trained before it and after it."""
        place = self.start
        while place < self.rows * self.epochs:
            size = self.window
            if self.batch_ramp:
                times = max(1, place // self.batch_ramp // self.first_window)
                size = min(size, times * self.first_window)
            after = min(place + size, (place // self.rows + 1) * self.rows)
            yield place, after
            place = after

    def __len__(self) -> int:
        return sum(1 for _ in self.windows())

    def __iter__(self) -> Iterator[list[int | None]]:
        epoch = None
        for place, after in self.windows():
            if place // self.rows != epoch:
                epoch = place // self.rows
                order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            begin = place - epoch * self.rows
            yield self.share(order[begin : begin + after - place].tolist())

    def share(self, window: list[int]) -> list[int | None]:
        """This rank's rows of a window; of each micro-step, a micro-batch or a filler."""
        batch = min(self.batch_size, -(-len(window) // self.ranks))
        mine: list[int | None] = []
        for micro in range(0, len(window), batch * self.ranks):
            begin = micro + self.rank * batch
            mine += window[begin : begin + batch] or [None]
        return mine


@dataclass
class WindowCollator:
    """A window's rows → its list of micro-batches."""

    batch_size: int
    pad_id: int = 0
    collate: Callable = collate

    def __call__(self, rows: list[list[dict[str, np.ndarray]]]) -> list[Batch]:
        starts = range(0, len(rows), self.batch_size)
        return [self.collate(rows[at : at + self.batch_size], self.pad_id) for at in starts]
