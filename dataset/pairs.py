"""Pairs of a chosen and a rejected document → batches, for DPO and reward models.

A batch has few more tokens than its documents: they share rows, as many as make the least work.
`position_ids` restart at 0 with each document, by which the model keeps them apart.

Letters in the shape comments: B rows   T tokens of a row   N pairs of a batch
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dataset.packing import IGNORED, document_lengths

# A row of so many tokens costs twice as much a token as a short one: attention looks at all pairs
# of a row, also at those that are masked (with --hidden_size 512, on a CPU).
DEAR_ROW = 1536


@dataclass
class PairBatch:
    """N pairs for one forward pass. Document 2i is the chosen side of pair i, 2i + 1 the rejected
    one."""

    input_ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], input_ids where trained, else -100; the model shifts them
    position_ids: Tensor  # [B, T]
    document: Tensor  # [B, T], which document a token belongs to; 2N for padding
    ends: Tensor  # [N, 2], place of each document's last token in the flattened [B·T]
    completion: Tensor  # [N, 2], tokens of each that carry loss
    reference: Tensor  # [N, 2], log-probabilities by the reference; NaN until they are known
    tokens: int  # real tokens, padding not counted
    labelled: int  # tokens that carry loss
    rows: int  # N: a window counts pairs

    def to(self, device: torch.device) -> "PairBatch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PairBatch":
        """In memory that the GPU can read while the CPU goes on (DataLoader calls this)."""
        return self.each(Tensor.pin_memory)

    def each(self, function) -> "PairBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}

    def sums(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of the labels, [B, T − 1] → of each completion, [N, 2]."""
        sums = log_probs.new_zeros(2 * self.rows + 1)
        sums = sums.index_add(0, self.document[:, 1:].flatten(), log_probs.flatten())
        return sums[:-1].view(-1, 2)

    def at_the_ends(self, scores: Tensor) -> Tensor:
        """Scores of all tokens, [B, T] → of each document's last one, [N, 2]."""
        return scores.flatten()[self.ends]


class Pairs(torch.utils.data.Dataset):
    """The pairs whose longer side has at most `row_length` tokens; longer ones are left out, for
    half an answer is neither good nor bad.

    Args:
        documents: as `load_documents` gives them for "preferences".
        chosen: which pairs; default: all.
    """

    documents_name = rows_name = "pairs"

    def __init__(self, documents: Dataset, row_length: int, chosen: np.ndarray | None = None):
        self.documents = documents
        self.row_length = row_length
        lengths = document_lengths(documents).reshape(-1, 2)
        asked = np.arange(len(lengths)) if chosen is None else chosen
        self.longer_side = lengths[asked].max(1)  # tokens, of each pair that was asked for
        self.chosen = asked[self.longer_side <= row_length]
        self.lengths = lengths[self.chosen]  # [pairs, 2]
        self.completion = trained_tokens(documents).reshape(-1, 2)[self.chosen]
        self.reference = np.full((len(self), 2), np.nan, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def description(self) -> str:
        """A hash of all documents, the same for the same data anywhere."""
        return self.documents.info.description

    @property
    def tokens_of_longest(self) -> int:
        return 2 * int(self.lengths.max(initial=0))

    @property
    def fill(self) -> float:
        """The share of max_seq_len that the documents have, were each padded to it."""
        return self.tokens / max(1, 2 * len(self) * self.row_length)

    @property
    def summary(self) -> str:
        too_long = len(self.longer_side) - len(self)
        left_out = f"; {too_long:,} pairs with a longer one are left out"
        return (
            f"{len(self):,} pairs, {self.tokens:,} tokens; the longer side has at most "
            f"{self.tokens_of_longest // 2} of {self.row_length}" + left_out * (too_long > 0)
        )

    def __getitem__(self, pair: int | None) -> dict[str, list] | None:
        """Both sides of a pair; None gives None, which ranks use to stay in step."""
        if pair is None:
            return None
        first = 2 * int(self.chosen[pair])
        sides = self.documents[[first, first + 1]]
        return {
            **{name: list(sides[name]) for name in ("input_ids", "loss_mask")},
            **{name: getattr(self, name)[pair] for name in ("completion", "reference")},
        }


def trained_tokens(documents: Dataset) -> np.ndarray:
    """[documents] tokens of each that carry loss."""
    counts = []
    for chunk in documents.data.column("loss_mask").chunks:
        offsets, loss_mask = np.asarray(chunk.offsets), np.asarray(chunk.values)
        counts.append(np.add.reduceat(loss_mask[: offsets[-1]], offsets[:-1], dtype=np.int32))
    return np.concatenate(counts)


def collate_pairs(
    pairs: list[dict[str, list] | None], pad_id: int = 0, packing: bool = True
) -> PairBatch:
    """Pairs to one batch; without packing each document has a row, padded to the longest."""
    pairs = [pair for pair in pairs if pair is not None]
    ids = [side for pair in pairs for side in pair["input_ids"]]
    loss_masks = [side for pair in pairs for side in pair["loss_mask"]]
    lengths = np.array([len(side) for side in ids], dtype=np.int64)
    row_of = cheapest_rows(lengths) if packing and ids else np.arange(len(ids))
    rows = int(row_of.max(initial=0)) + 1
    longest = int(np.bincount(row_of, lengths).max(initial=2))

    input_ids = np.full((rows, longest), pad_id, dtype=np.int64)
    labels = np.full((rows, longest), IGNORED, dtype=np.int64)
    position_ids = np.zeros((rows, longest), dtype=np.int64)
    document = np.full((rows, longest), len(ids), dtype=np.int64)
    ends = np.zeros(len(ids), dtype=np.int64)
    used = np.zeros(rows, dtype=np.int64)
    for number, row in enumerate(row_of):
        place = slice(used[row], used[row] + lengths[number])
        input_ids[row, place] = ids[number]
        labels[row, place] = np.where(loss_masks[number], ids[number], IGNORED)
        position_ids[row, place] = np.arange(lengths[number])
        document[row, place] = number
        ends[number] = row * longest + place.stop - 1
        used[row] = place.stop
    for row in range(rows):  # padding is a document of its own
        position_ids[row, used[row] :] = np.arange(longest - used[row])

    completion, reference = (
        np.array([pair[name] for pair in pairs], dtype=np.float32).reshape(-1, 2)
        for name in ("completion", "reference")
    )
    arrays = (input_ids, labels, position_ids, document, ends.reshape(-1, 2), completion, reference)
    labelled = int(completion.sum())
    return PairBatch(*map(torch.from_numpy, arrays), int(lengths.sum()), labelled, len(pairs))


def cheapest_rows(lengths: np.ndarray) -> np.ndarray:
    """The row of each document. For any number of rows, the longest documents first go into the
    emptiest row each; of these ways the cheapest is chosen."""
    order = np.argsort(-lengths, kind="stable")
    best, least = np.zeros(len(lengths), dtype=np.int64), np.inf
    for rows in range(1, len(lengths) + 1):
        row_of, filled = np.empty_like(best), np.zeros(rows, dtype=np.int64)
        for number in order:
            row_of[number] = filled.argmin()
            filled[row_of[number]] += lengths[number]
        cost = rows * filled.max() * (1 + filled.max() / DEAR_ROW)
        if cost < least:
            best, least = row_of, cost
    return best
