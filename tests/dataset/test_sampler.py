"""The order of the samples: epochs, ranks, resuming, batch-size warmup."""

from itertools import product

import numpy as np
from chats import documents_of

from dataset.packing import (
    PackedDataset,
)
from dataset.sampler import GlobalBatchCollator, GlobalBatchSampler

SETTINGS = [
    dict(
        num_samples=samples,
        batch_size=batch,
        accumulation_steps=steps,
        world_size=ranks,
        epochs=epochs,
        batch_ramp=ramp,
    )
    for samples, batch, steps, ranks, epochs, ramp in product(
        (1, 2, 5, 12, 13), (1, 3), (1, 2), (1, 2, 3), (1, 3), (0, 3)
    )
]


def global_batches(rank=0, start=0, **setting) -> list[list[int | None]]:
    sampler = GlobalBatchSampler(setting.pop("num_samples"), rank=rank, **setting)
    sampler.start = start
    return list(sampler)


def as_one_rank_sees_them(setting, start=0) -> list[list[int]]:
    """Global batches of all ranks together: their micro-batches in turn, without empty ones."""
    together = []
    ranks = [global_batches(rank, start, **setting) for rank in range(setting["world_size"])]
    for parts in zip(*ranks, strict=True):
        size = min(setting["batch_size"], len(parts[0]))  # the first rank's first is a full one
        micro = [[part[at : at + size] for at in range(0, len(part), size)] for part in parts]
        turns = zip(*micro, strict=True)  # each rank has as many micro-batches
        together.append(
            [sample for turn in turns for part in turn for sample in part if sample is not None]
        )
    return together


def test_each_sample_comes_once_per_epoch_in_a_new_order():
    for setting in SETTINGS:
        order = [sample for batch in as_one_rank_sees_them(setting) for sample in batch]
        samples, epochs = setting["num_samples"], setting["epochs"]
        by_epoch = [order[at : at + samples] for at in range(0, len(order), samples)]
        assert len(by_epoch) == epochs
        assert all(sorted(epoch) == list(range(samples)) for epoch in by_epoch)
        if samples > 5 and epochs > 1:
            assert by_epoch[0] != by_epoch[1] and by_epoch[0] != sorted(by_epoch[0])


def test_the_order_depends_on_the_seed_alone():
    common = dict(num_samples=40, batch_size=3)
    first, again, other = (global_batches(seed=seed, **common) for seed in (1, 1, 2))
    assert first == again != other


def test_any_number_of_ranks_walks_through_the_same_global_batches():
    for setting in SETTINGS:
        steps = setting["world_size"] * setting["accumulation_steps"]
        alone = {**setting, "world_size": 1, "accumulation_steps": steps}
        assert as_one_rank_sees_them(setting) == global_batches(**alone)


def test_a_rank_gets_an_empty_batch_only_where_samples_run_out():
    for setting in SETTINGS:
        full = setting["batch_size"] * setting["accumulation_steps"]
        ranks = [global_batches(rank, **setting) for rank in range(setting["world_size"])]
        for parts in zip(*ranks, strict=True):
            if any(None in part for part in parts):
                assert sum(sample is not None for part in parts for sample in part) < full * len(
                    parts
                )
                assert all(
                    part.count(None) <= 1 and part[-1] is None for part in parts if None in part
                )


def test_resuming_at_any_global_batch_gives_the_rest():
    for setting in SETTINGS:
        whole = global_batches(**setting)
        sampler = GlobalBatchSampler(**setting)
        place = 0
        for done in range(len(whole) + 1):
            sampler.start = place
            assert list(sampler) == whole[done:]
            assert len(sampler) == len(whole) - done
            place = next(sampler.bounds(), (place, place))[1]


def test_resuming_with_another_world_size_drops_and_repeats_no_sample():
    samples, epochs = 13, 2
    alone = dict(num_samples=samples, batch_size=2, epochs=epochs)
    order = [sample for batch in global_batches(**alone) for sample in batch]
    for ranks, steps, start in product((1, 2, 3), (1, 2), (2, 8, 13, 15)):
        setting = {**alone, "world_size": ranks, "accumulation_steps": steps}
        rest = [sample for batch in as_one_rank_sees_them(setting, start) for sample in batch]
        assert rest == order[start:]


def test_global_batches_grow_with_the_samples_trained():
    growing = dict(num_samples=100, batch_size=4, batch_ramp=10, initial_batch_size=2)
    sizes = list(map(len, global_batches(**growing, accumulation_steps=4)))
    assert sizes[:10] == [2] * 10  # up to sample 20 a tenth would be less
    trained = np.cumsum([0, *sizes])[:-1]
    assert sizes == [min(max(2, t // 10 // 2 * 2), 100 - t) for t in trained]
    later = list(map(len, global_batches(**growing, epochs=3)))
    assert max(later) == 4 and later[-25:] == [4] * 25  # full from sample 40 on


def test_small_global_batches_are_divided_evenly():
    for rank, count in ((0, 2), (1, 2), (2, 1)):
        common = dict(num_samples=100, batch_size=8, batch_ramp=10, world_size=3)
        first = global_batches(rank, **common, initial_batch_size=5)[0]
        assert len(first) == count and None not in first


def test_the_number_of_global_batches_left_is_right_after_one_of_another_size():
    sampler = GlobalBatchSampler(10, batch_size=4)
    sampler.start = 1
    assert len(sampler) == len(list(sampler))


def test_global_batches_are_split_into_micro_batches():
    samples = PackedDataset(documents_of([3, 3, 3, 3, 3]), 3)
    collator = GlobalBatchCollator(2)
    assert [len(b.input_ids) for b in collator([samples[r] for r in range(5)])] == [2, 2, 1]
    (filler,) = collator([samples[None]])
    assert (filler.num_tokens, filler.num_label_tokens) == (0, 0)
