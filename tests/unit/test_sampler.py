# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees must not depend on the hardware, and every sample is seen once an epoch."""

import numpy as np
import pytest

from effsam3.data.sampler import PADDING, StepSampler, sequential_batches


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
