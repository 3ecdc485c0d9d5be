"""Documents to packed sequences and batches: every token once, and no document sees another."""

import bisect
import random
from collections import Counter

import numpy as np
import pytest
import torch
from chats import (
    documents_of,
)

from dataset.packing import (
    IGNORE_INDEX,
    PackedDataset,
    best_fit_pack,
    collate,
    split_documents,
)


def length_tables():
    dice = random.Random(0)
    tables = [([1, 2, 3, 8, 9, 15, 16, 57], 8), ([1, 2, 3], 2), ([5] * 7, 5)]
    for row in (2, 3, 7, 20, 40, 64):
        some = [1, 2, row - 1, row, row + 1, 2 * row - 1, 2 * row]
        tables.append(([dice.choice([*some, dice.randint(1, 6 * row)]) for _ in range(80)], row))
    return tables


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("lengths", "seq_len"), length_tables())
def test_every_token_is_read_once_and_predicted_once(lengths, seq_len, packing):
    sequences = PackedDataset(documents_of(lengths), seq_len, packing=packing)
    batch = collate([sequences[r] for r in range(len(sequences))])
    assert batch.input_ids.shape[1] <= max(2, seq_len)
    starts = np.concatenate(([1], 1 + np.cumsum(lengths)))[:-1]
    overlap = [
        start + at
        for start, length in zip(starts, lengths, strict=True)
        for at in range(seq_len - 1, length - 1, seq_len - 1)
    ]
    read, predicted = Counter(), Counter()
    for ids, labels, positions in zip(
        *(t.tolist() for t in (batch.input_ids, batch.labels, batch.position_ids)), strict=True
    ):
        read.update(token for token in ids if token)
        assert all(at == 0 for at, token in zip(positions, ids, strict=True) if token in starts)
        for place, label in enumerate(labels):
            if label != IGNORE_INDEX:
                predicted[label] += 1
                assert ids[place] == label and ids[place - 1] == label - 1
                assert positions[place] == positions[place - 1] + 1
    kept = [n for n, length in enumerate(lengths) if length > 1]  # one token predicts nothing
    tokens = [t for n in kept for t in range(starts[n], starts[n] + lengths[n])]
    assert read == Counter(tokens) + Counter(overlap)
    assert predicted == Counter(set(tokens) - {starts[n] for n in kept})
    assert batch.num_tokens == sequences.num_tokens == len(tokens) + len(overlap)
    assert sequences.packing_efficiency == pytest.approx(
        batch.num_tokens / (len(sequences) * seq_len)
    )


def test_sequences_hold_only_the_documents_of_indices():
    sequences = PackedDataset(documents_of([3, 4, 5, 6]), 8, indices=np.array([1, 3]))
    batch = collate([sequences[r] for r in range(len(sequences))])
    assert sorted(batch.input_ids[batch.input_ids > 0].tolist()) == [4, 5, 6, 7, *range(13, 19)]


def test_without_packing_a_sequence_holds_one_chunk():
    sequences = PackedDataset(documents_of([3, 2, 20, 4]), 8, packing=False)
    assert [len(sequences[r]) for r in range(len(sequences))] == [1] * 6
    assert [len(sequences[r][0]["input_ids"]) for r in range(len(sequences))] == [3, 2, 8, 8, 6, 4]


def test_a_sequence_too_short_to_predict_anything_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        split_documents(np.array([3]), 1)


def slow_best_fit(lengths: list[int], seq_len: int) -> list[int]:
    """The room left in each sequence, by the definition of best-fit decreasing."""
    rooms: list[int] = []  # ascending
    for length in sorted(lengths, reverse=True):
        fullest = bisect.bisect_left(rooms, length)
        room = rooms.pop(fullest) if fullest < len(rooms) else seq_len
        bisect.insort(rooms, room - length)
    return rooms


@pytest.mark.parametrize("seq_len", [2, 7, 64, 513])
def test_chunks_are_packed_by_best_fit(seq_len):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, seq_len + 1, 400)
        sequence_of = best_fit_pack(lengths, seq_len)
        filled = np.bincount(sequence_of, weights=lengths)
        assert filled.min() > 0 and filled.max() <= seq_len
        assert sorted(seq_len - filled) == slow_best_fit(lengths.tolist(), seq_len)


@pytest.mark.parametrize("seq_len", [340, 512, 1024])
def test_sequences_are_full_for_realistic_lengths(seq_len):
    lengths = np.exp(np.random.default_rng(0).normal(4.6, 0.8, 4000)).astype(int) + 2
    chunks = split_documents(lengths, seq_len)
    sequences = best_fit_pack(chunks.length, seq_len).max() + 1
    assert chunks.length.sum() / (sequences * seq_len) >= 0.98


def test_the_mask_of_the_data_decides_what_carries_loss():
    documents = documents_of([3, 4], [[True, False, True], [False, True, True, False]])
    batch = collate([PackedDataset(documents, 7)[0]], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.labels.tolist() == [[-100, -100, 3, -100, 5, 6, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert (batch.num_tokens, batch.num_label_tokens) == (7, 3)


def test_padding_is_a_document_of_its_own_without_loss():
    sequences = PackedDataset(documents_of([3, 6]), 6, packing=False)
    batch = collate([sequences[0], sequences[1], sequences[None]], pad_id=99)
    assert batch.input_ids.tolist() == [[1, 2, 3, 99, 99, 99], [4, 5, 6, 7, 8, 9], [99] * 6]
    assert batch.labels.tolist()[0] == [-100, 2, 3, -100, -100, -100]
    assert batch.labels.tolist()[2] == [-100] * 6
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [*range(6)], [*range(6)]]
    assert (batch.num_tokens, batch.num_label_tokens) == (9, 7)


# -- packing and the model -------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["sdpa", "by hand"])
def tiny_model(request, make_model):
    return make_model(flash_attn=request.param)


def test_the_loss_of_packed_sequences_is_that_of_the_documents_alone(tiny_model):
    documents = documents_of([7, 12, 30, 2, 9, 1, 20, 5])
    sequences = PackedDataset(documents, 32)
    batch = collate([sequences[r] for r in range(len(sequences))])
    assert len(sequences) < 5
    packed = tiny_model(**batch.inputs, labels=batch.labels, num_items_in_batch=1).loss
    alone = 0
    for document in documents:
        ids = torch.tensor(document["input_ids"])[None]
        log_p = tiny_model(ids).logits[0, :-1].log_softmax(-1)
        alone -= log_p.gather(1, ids[0, 1:, None]).sum()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


def test_a_document_does_not_depend_on_its_neighbours(tiny_model):
    """Logits and gradients of B, with another A before it and another C behind it."""
    seen = []
    for seed in range(2):
        tokens = torch.randint(128, (21,), generator=torch.Generator().manual_seed(seed))
        tokens[8:15] = torch.arange(8, 15)  # B
        chunk = [tokens[:8], tokens[8:15], tokens[15:]]
        row = [
            {"input_ids": p.numpy(), "loss_mask": np.array([n == 1] * len(p))}
            for n, p in enumerate(chunk)
        ]
        batch = collate([row])
        tiny_model.zero_grad()
        out = tiny_model(**batch.inputs, labels=batch.labels)
        out.loss.backward()
        gradients = [p.grad.clone() for p in tiny_model.parameters()]
        seen.append([tokens, out.logits[0, 8:15].detach(), *gradients])
    (tokens, *first), (others, *second) = seen
    assert not torch.equal(tokens, others)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
