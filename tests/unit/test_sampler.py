# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees must not depend on the hardware, and every sample is seen once an epoch."""

import numpy as np
import pytest

from effsam3.data.sampler import PADDING, ROUNDS, StepSampler, permuted, sequential_batches

LONGEST = "effsam3.data.sampler.KEPT"


@pytest.fixture(params=["kept", "computed"], autouse=True)
def order(request, monkeypatch):
    """Orders that are kept and those that are computed have the same properties."""
    if request.param == "computed":
        monkeypatch.setattr(LONGEST, 0)


def seen(world, micro, start=0, stop=10, size=37, seed=3, global_batch=8):
    """Positions per step, as a set per step, gathered over all ranks."""
    steps = [[] for _ in range(start, stop)]
    for rank in range(world):
        sampler = StepSampler(size, seed, global_batch, micro, rank, world)
        accumulated = global_batch // (micro * world)
        for number, batch in enumerate(sampler.micro_batches(start, stop)):
            assert len(batch) == micro
            steps[number // accumulated] += batch
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 1), (2, 4), (2, 2), (4, 2), (8, 1)])
def test_any_hardware_sees_the_same_samples_in_the_same_step(world, micro):
    assert seen(world, micro) == seen(1, 8)


def test_every_sample_once_per_epoch():
    sampler = StepSampler(37, 0, 8, 8, 0, 1)
    stream = np.concatenate([sampler.positions(step) for step in range(20)])
    for epoch in range(4):
        assert sorted(stream[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert list(stream[:37]) != list(stream[37:74])


def test_starts_anywhere():
    sampler = StepSampler(37, 0, 8, 4, 0, 1)
    assert list(sampler.micro_batches(0, 12))[14:] == list(StepSampler(37, 0, 8, 4, 0, 1).micro_batches(7, 12))


def test_batch_larger_than_the_data():
    sampler = StepSampler(3, 0, 8, 8, 0, 1)
    stream = np.concatenate([sampler.positions(step) for step in range(3)])
    assert all(sorted(stream[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


def test_seeds_differ():
    assert seen(1, 8, seed=1) != seen(1, 8, seed=2)


@pytest.mark.parametrize(("size", "batch", "world"), [(10, 4, 1), (10, 4, 2), (1, 4, 3), (16, 4, 2)])
def test_sequential_batches_cover_everything_equally(size, batch, world):
    ranks = [sequential_batches(size, batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    positions = [position for batches in ranks for full in batches for position in full]
    assert all(len(full) == batch for batches in ranks for full in batches)
    assert sorted(position for position in positions if position != PADDING) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 37, 1000, 4097])
def test_a_computed_order_is_a_permutation(size):
    keys = np.random.default_rng(size).integers(2**64, size=ROUNDS, dtype=np.uint64)
    found = permuted(np.arange(size), size, keys)
    assert sorted(found.tolist()) == list(range(size))
    chosen = np.arange(size)[::3]
    assert permuted(chosen, size, keys).tolist() == found[::3].tolist()  # each place on its own


def test_a_computed_order_looks_like_chance():
    """As of a drawn permutation: rank correlation of neighbours and with the place, and where each place leads."""
    size = 30_000
    keys = np.random.default_rng(1).integers(2**64, size=(200, ROUNDS), dtype=np.uint64)
    found = permuted(np.arange(size), size, keys[0])
    for one, other in ((found[1:], found[:-1]), (found, np.arange(size)), (found[::2], found[1::2])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(len(one))
    # 200 orders of 16 numbers: each leads each place everywhere, as often (chi-square, 225 degrees of freedom).
    counts = np.zeros((16, 16))
    for some in keys:
        counts[np.arange(16), permuted(np.arange(16), 16, some)] += 1
    assert ((counts - 12.5) ** 2 / 12.5).sum() < 225 + 4 * np.sqrt(2 * 225)


def test_a_billion_samples_take_no_memory():
    sampler = StepSampler(10**9, 0, 4096, 4096, 0, 1)  # longer than KEPT
    some = np.concatenate([sampler.positions(step) for step in (0, 1, 200_000, 244_140)])  # the last spans two epochs
    assert len(sampler._order) == 0 and some.min() >= 0 and some.max() < 10**9
    assert len(set(some.tolist())) > len(some) - 50  # a few of the second epoch's have been seen


def test_the_order_of_runs_in_progress_stays(monkeypatch):
    """NumPy's own permutation, as it was before longer ones were computed: a run resumes with what it has not seen."""
    monkeypatch.setattr(LONGEST, 37)
    sampler = StepSampler(37, 3, 8, 8, 0, 1)
    stream = np.concatenate([sampler.positions(step) for step in range(9)])
    orders = [np.random.default_rng([3, epoch]).permutation(37) for epoch in range(2)]
    assert stream.tolist() == np.concatenate(orders)[:72].tolist()
