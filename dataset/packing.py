"""Documents → packed sequences of max_seq_len tokens → batches.

Several documents share a sequence, placed by best fit (arXiv 2404.10830), so that hardly any token
is padding. `position_ids` restart at 0 with each document, which tells the model to keep documents
apart. A document longer than a sequence is split; its chunks overlap by one token, so that every
token but the first is still predicted exactly once.

Letters in the shape comments: B sequences   T tokens of a sequence
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from typing_extensions import Self  # typing's since Python 3.11

from model.losses import IGNORE_INDEX


class TrainingData(Protocol):
    """What a trainer needs to know of its data: packed sequences, preference pairs or prompts."""

    document_unit: str  # what `indices` counts: "documents", "pairs" or "prompts"
    sample_unit: str  # what `len` counts: "sequences", "pairs" or "prompts"
    indices: np.ndarray  # which documents of the files these are (the rest is held out)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int | None) -> Any:
        """A sample. None gives an empty one: a rank without data takes it to stay in step."""

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of all documents, the same for the same data anywhere."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def max_sample_tokens(self) -> int:
        """Tokens of the longest sample, for the memory estimate."""

    @property
    def packing_efficiency(self) -> float:
        """The share of token slots that hold real tokens; the rest would be padding."""

    @property
    def summary(self) -> str:
        """A line for the log."""


class TensorFields:
    """A dataclass whose tensors move together."""

    def to(self, device: torch.device) -> Self:
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Page-locked memory, which a GPU reads while the CPU goes on (DataLoader calls this)."""
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        instance: Any = self  # a dataclass, which this class alone is not
        values = {each.name: getattr(self, each.name) for each in fields(instance) if each.init}
        tensors = {name: each for name, each in values.items() if isinstance(each, Tensor)}
        return replace(instance, **{name: function(each) for name, each in tensors.items()})


@dataclass
class Batch(TensorFields):
    """Packed sequences for one forward pass; the tensors are [B, T]."""

    input_ids: Tensor
    labels: Tensor  # input_ids where loss_mask is True, else -100; the model shifts them
    position_ids: Tensor
    num_tokens: int  # without padding
    num_label_tokens: int  # tokens that the loss is summed over
    num_samples: int  # sequences that have a token

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


@dataclass
class Chunks:
    """Parts of documents, none longer than a sequence. Arrays of int32 and of equal length, since
    there may be tens of millions."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def split_documents(lengths: np.ndarray, seq_len: int) -> Chunks:
    """Split documents longer than a sequence. Each chunk begins with the last token of the chunk
    before it. A document of a single token has nothing to predict and is left out."""
    if seq_len < 2:
        raise ValueError("a sequence must hold at least two tokens")
    stride = seq_len - 1
    counts = np.maximum(0, -(-(lengths - 1) // stride))  # ceil: predicted tokens / stride
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    first = np.repeat((np.cumsum(counts) - counts).astype(np.int32), counts)
    start = (np.arange(len(document), dtype=np.int32) - first) * np.int32(stride)
    return Chunks(document, start, np.minimum(lengths[document] - start, seq_len))


def best_fit_pack(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The sequence of each chunk: longest chunks first, each into the fullest sequence with room.

    Chunks of equal length are placed together, so that millions take seconds: best fit puts as many
    as possible into a sequence with the least sufficient room, then into the next such sequence,
    then into those with the next larger room, and at last into new ones.
    """
    sequence_of = np.empty(len(lengths), dtype=np.int32)
    open_sequences: dict[int, np.ndarray] = {}  # room left → the sequences that have it
    num_sequences = 0
    counts = np.bincount(lengths)
    by_length = np.split(np.argsort(lengths, kind="stable"), np.cumsum(counts)[:-1])
    for length in np.flatnonzero(counts)[::-1].tolist():
        chunks = by_length[length]
        for room in [*sorted(room for room in open_sequences if room >= length), seq_len]:
            if len(chunks) == 0:
                break
            per_sequence = room // length
            needed = -(-len(chunks) // per_sequence)
            if room in open_sequences:
                targets, open_sequences[room] = np.split(open_sequences[room], [needed])
            else:
                targets = np.arange(num_sequences, num_sequences + needed, dtype=np.int32)
                num_sequences += needed
            placed = np.repeat(targets, per_sequence)[: len(chunks)]
            sequence_of[chunks[: len(placed)]] = placed
            chunks = chunks[len(placed) :]
            in_last = len(placed) - per_sequence * (len(targets) - 1)
            for some, count in ((targets[:-1], per_sequence), (targets[-1:], in_last)):
                left = room - count * length
                if left and len(some):
                    open_sequences[left] = np.concatenate(
                        (open_sequences.get(left, some[:0]), some)
                    )
    return sequence_of


class PackedDataset(torch.utils.data.Dataset):
    """Sequences of at most `seq_len` tokens, packed out of tokenised documents.

    Args:
        documents: columns input_ids and loss_mask, as `load_documents` gives them.
        indices: which documents; default: all.
        packing: several documents a sequence; else one document, or one chunk of it.
    """

    document_unit, sample_unit = "documents", "sequences"

    def __init__(
        self,
        documents: Dataset,
        seq_len: int,
        indices: np.ndarray | None = None,
        packing: bool = True,
    ):
        self.documents = documents
        self.seq_len = self.max_sample_tokens = seq_len
        lengths = document_lengths(documents)
        self.indices = np.arange(len(lengths)) if indices is None else indices
        self.chunks = split_documents(lengths[self.indices], seq_len)
        num_chunks = len(self.chunks.length)
        sequence_of = (
            best_fit_pack(self.chunks.length, seq_len) if packing else np.arange(num_chunks)
        )
        # chunks sorted by sequence, and where the chunks of each sequence begin and end
        self.chunk_order = np.argsort(sequence_of, kind="stable").astype(np.int32)
        self.offsets = np.concatenate(([0], np.cumsum(np.bincount(sequence_of)))).astype(np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.chunks.length.sum())

    @property
    def label_bytes(self) -> int | None:
        """UTF-8 bytes of the text that carries loss, where they were counted because the tokens do
        not tell them; else None."""
        if "label_bytes" not in self.documents.column_names:
            return None
        return int(np.asarray(self.documents.data.column("label_bytes"))[self.indices].sum())

    @property
    def fingerprint(self) -> str:
        return self.documents.info.description

    @property
    def num_split(self) -> int:
        """How many documents are longer than a sequence and so split."""
        return len(self.chunks.document) - len(np.unique(self.chunks.document))

    @property
    def summary(self) -> str:
        split = f"; {self.num_split:,} documents are longer and split" if self.num_split else ""
        efficiency = self.packing_efficiency
        return (
            f"{len(self.indices):,} documents, {self.num_tokens:,} tokens in {len(self):,} "
            f"sequences of {self.seq_len} ({efficiency:.1%} full, {1 - efficiency:.1%} padding)"
            f"{split}"
        )

    @property
    def packing_efficiency(self) -> float:
        return self.num_tokens / max(1, len(self) * self.seq_len)

    def __getitem__(self, index: int | None) -> list[dict[str, np.ndarray]]:
        """The chunks of a sequence."""
        if index is None:
            return []
        members = self.chunk_order[self.offsets[index] : self.offsets[index + 1]]
        documents = self.documents[self.indices[self.chunks.document[members]].tolist()]
        ends = self.chunks.start[members] + self.chunks.length[members]
        spans = zip(self.chunks.start[members], ends, strict=True)
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


def collate(sequences: list[list[dict[str, np.ndarray]]], pad_id: int = 0) -> Batch:
    """One batch of several sequences, padded to the longest of them.

    The first token of each document carries no loss: only another document could predict it.
    Padding is a document of its own.
    """
    longest = max(2, max(sum(len(c["input_ids"]) for c in chunks) for chunks in sequences))
    input_ids = np.full((len(sequences), longest), pad_id, dtype=np.int64)
    labels = np.full((len(sequences), longest), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    num_tokens = 0
    for b, chunks in enumerate(sequences):
        at = 0
        for chunk in chunks:
            end = at + len(chunk["input_ids"])
            input_ids[b, at:end] = chunk["input_ids"]
            labels[b, at:end] = np.where(chunk["loss_mask"], chunk["input_ids"], IGNORE_INDEX)
            labels[b, at] = IGNORE_INDEX
            position_ids[b, at:end] = np.arange(end - at)
            at = end
        position_ids[b, at:] = np.arange(longest - at)
        num_tokens += at
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        num_tokens=num_tokens,
        num_label_tokens=int((labels != IGNORE_INDEX).sum()),
        num_samples=sum(map(bool, sequences)),
    )
