"""Pairs of a chosen and a rejected document → batches, for DPO and reward models.

A batch has few more tokens than its documents: documents share sequences, as many as make the least
work. `position_ids` restart at 0 with each document, which tells the model to keep them apart.

Letters in the shape comments: B sequences   T tokens of a sequence   N pairs of a batch
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dataset.packing import IGNORE_INDEX, TensorFields, document_lengths

# A token of a sequence this long costs twice as much as one of a short sequence, since attention
# compares all pairs of a sequence, masked ones too (measured with --hidden_size 512 on a CPU).
DOUBLE_COST_LENGTH = 1536


@dataclass
class PreferenceBatch(TensorFields):
    """N pairs for one forward pass. Document 2i is the chosen side of pair i, 2i + 1 the rejected
    one."""

    input_ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], input_ids where loss_mask is True, else -100; the model shifts them
    position_ids: Tensor  # [B, T]
    document_ids: Tensor  # [B, T], which document a token belongs to; 2N for padding
    last_index: Tensor  # [N, 2], index of each document's last token in the flattened [B·T]
    completion_lengths: Tensor  # [N, 2], tokens of each document that carry loss
    ref_log_probs: Tensor  # [N, 2], by the reference model; NaN until they are computed
    num_tokens: int  # without padding
    num_label_tokens: int  # tokens that carry loss
    num_samples: int  # N

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}

    def sum_log_probs(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of the labels, [B, T − 1] → their sum for each document, [N, 2]."""
        sums = log_probs.new_zeros(2 * self.num_samples + 1)
        sums = sums.index_add(0, self.document_ids[:, 1:].flatten(), log_probs.flatten())
        return sums[:-1].view(-1, 2)  # without the padding's

    def gather_last(self, scores: Tensor) -> Tensor:
        """Scores of all tokens, [B, T] → of each document's last token, [N, 2]."""
        return scores.flatten()[self.last_index]


class PreferenceDataset(torch.utils.data.Dataset):
    """The pairs whose longer side has at most `seq_len` tokens. Longer ones are left out: half an
    answer is neither good nor bad.

    Args:
        documents: as `load_documents` gives them for "preferences".
        indices: which pairs; default: all.
    """

    document_unit = sample_unit = "pairs"

    def __init__(self, documents: Dataset, seq_len: int, indices: np.ndarray | None = None):
        self.documents = documents
        self.seq_len = seq_len
        lengths = document_lengths(documents).reshape(-1, 2)
        candidates = np.arange(len(lengths)) if indices is None else indices
        self.longer_side = lengths[candidates].max(1)  # tokens, of each candidate
        self.indices = candidates[self.longer_side <= seq_len]
        self.lengths = lengths[self.indices]  # [pairs, 2]
        self.completion_lengths = label_counts(documents).reshape(-1, 2)[self.indices]
        self.ref_log_probs: np.ndarray = np.full((len(self), 2), np.nan, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        return self.documents.info.description

    @property
    def max_sample_tokens(self) -> int:
        return 2 * int(self.lengths.max(initial=0))

    @property
    def packing_efficiency(self) -> float:
        """As without packing: the share of slots filled if each side were padded to seq_len. How
        full packed batches are is known only when they are made."""
        return self.num_tokens / max(1, 2 * len(self) * self.seq_len)

    @property
    def summary(self) -> str:
        too_long = len(self.longer_side) - len(self)
        left_out = f"; {too_long:,} pairs with a longer one are left out"
        return (
            f"{len(self):,} pairs, {self.num_tokens:,} tokens; the longer side has at most "
            f"{self.max_sample_tokens // 2} of {self.seq_len}" + left_out * (too_long > 0)
        )

    def __getitem__(self, index: int | None) -> dict[str, list] | None:
        """Both sides of a pair."""
        if index is None:
            return None
        first = 2 * int(self.indices[index])
        sides = self.documents[[first, first + 1]]
        return {
            **{name: list(sides[name]) for name in ("input_ids", "loss_mask")},
            **{
                name: getattr(self, name)[index] for name in ("completion_lengths", "ref_log_probs")
            },
        }


def label_counts(documents: Dataset) -> np.ndarray:
    """[documents] tokens of each that carry loss."""
    counts = []
    for chunk in documents.data.column("loss_mask").chunks:
        offsets, loss_mask = np.asarray(chunk.offsets), np.asarray(chunk.values)
        counts.append(np.add.reduceat(loss_mask[: offsets[-1]], offsets[:-1], dtype=np.int32))
    return np.concatenate(counts)


def collate_pairs(
    samples: list[dict[str, list] | None], pad_id: int = 0, packing: bool = True
) -> PreferenceBatch:
    """One batch of several pairs; without packing each document has a sequence of its own, padded
    to the longest."""
    pairs = [pair for pair in samples if pair is not None]
    ids = [side for pair in pairs for side in pair["input_ids"]]
    loss_mask = [side for pair in pairs for side in pair["loss_mask"]]
    lengths = np.array([len(side) for side in ids], dtype=np.int64)
    sequence_of = cheapest_packing(lengths) if packing and ids else np.arange(len(ids))
    num_sequences = int(sequence_of.max(initial=0)) + 1
    longest = int(np.bincount(sequence_of, lengths).max(initial=2))

    shape = (num_sequences, longest)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    document_ids = np.full(shape, len(ids), dtype=np.int64)
    last_index = np.zeros(len(ids), dtype=np.int64)
    used = np.zeros(num_sequences, dtype=np.int64)
    for number, b in enumerate(sequence_of):
        span = slice(used[b], used[b] + lengths[number])
        input_ids[b, span] = ids[number]
        labels[b, span] = np.where(loss_mask[number], ids[number], IGNORE_INDEX)
        position_ids[b, span] = np.arange(lengths[number])
        document_ids[b, span] = number
        last_index[number] = b * longest + span.stop - 1
        used[b] = span.stop
    for b in range(num_sequences):  # padding is a document of its own
        position_ids[b, used[b] :] = np.arange(longest - used[b])

    completion_lengths, ref_log_probs = (
        np.array([pair[name] for pair in pairs], dtype=np.float32).reshape(-1, 2)
        for name in ("completion_lengths", "ref_log_probs")
    )
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        last_index=torch.from_numpy(last_index.reshape(-1, 2)),
        completion_lengths=torch.from_numpy(completion_lengths),
        ref_log_probs=torch.from_numpy(ref_log_probs),
        num_tokens=int(lengths.sum()),
        num_label_tokens=int(completion_lengths.sum()),
        num_samples=len(pairs),
    )


def cheapest_packing(lengths: np.ndarray) -> np.ndarray:
    """The sequence of each document. For each number of sequences, the longest documents first go
    into the emptiest sequence; of these packings the cheapest is taken."""
    order = np.argsort(-lengths, kind="stable")
    best, least = np.zeros(len(lengths), dtype=np.int64), np.inf
    for num_sequences in range(1, len(lengths) + 1):
        sequence_of, filled = np.empty_like(best), np.zeros(num_sequences, dtype=np.int64)
        for number in order:
            sequence_of[number] = filled.argmin()
            filled[sequence_of[number]] += lengths[number]
        cost = num_sequences * filled.max() * (1 + filled.max() / DOUBLE_COST_LENGTH)
        if cost < least:
            best, least = sequence_of, cost
    return best
