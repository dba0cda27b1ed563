# SPDX-License-Identifier: Apache-2.0
"""Data workers write into memory again, and never into what the main process still looks at."""

import gc
import random

import pytest
import torch

from effsam3.data import loader as loading
from effsam3.data import slots
from effsam3.data.loader import loader, new_batch

LARGE = slots.LEAST_BYTES // 4 + 5  # float32


class Numbers:
    """Batches filled with the number asked for, in tensors of a size of its own each, and what the worker has."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return 10_000

    def __getitems__(self, numbers):
        number = numbers[0]
        size = self.sizes[number % len(self.sizes)]
        batch = {"number": number, "small": new_batch(3, dtype=torch.int32).fill_(number)}
        batch["first"] = new_batch(size, dtype=torch.float32).fill_(number)
        batch["second"] = new_batch(2, size, dtype=torch.float32).fill_(-number)[:, 1:]
        pool = loading._slots
        return batch | {"made": 0 if pool is None else len(pool)}


def read(count, sizes=(LARGE,), workers=2):
    return loader(Numbers(sizes), [[number] for number in range(count)], workers, pin=False)


def right(batch) -> bool:
    number = batch["number"]
    wanted = {"first": number, "second": -number, "small": number}
    return all((batch[name] == value).all() for name, value in wanted.items()) and slots.TAKEN not in batch


@pytest.mark.parametrize("sizes", [(LARGE,), (LARGE, 3 * LARGE, 9 * LARGE, 7, LARGE + 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_order_and_whole(sizes, workers):
    for number, batch in enumerate(read(60, sizes, workers)):
        assert batch["number"] == number and right(batch)


def test_memory_is_used_again():
    made = [batch["made"] for batch in read(80)]
    assert 0 < max(made) <= 8  # of each worker: two tensors of the three or four batches that are on their way


def test_batches_that_are_kept_keep_what_they_hold():
    """More than there are slots: the others get memory of their own."""
    kept = list(read(2 * slots.PER_WORKER))
    assert all(map(right, kept)) and kept[-1]["made"] == slots.PER_WORKER


def test_a_view_keeps_its_batch():
    views = []
    for batch in read(80):
        if batch["number"] % 7 == 3:
            views.append((batch["number"], batch["first"][5:9], batch["second"].numpy()[1]))
    for number, first, second in views:
        assert (first == number).all() and (second == -number).all()


def test_any_order_of_letting_go():
    """A consumer that holds some batches for long, and looks at all that it holds, over and over."""
    chance, held = random.Random(0), []
    for batch in read(200, (LARGE, 2 * LARGE)):
        held.append(batch)
        chance.shuffle(held)
        held = held[: chance.randrange(12)]
        assert all(map(right, held))
    del batch
    held.clear()
    gc.collect()


def test_what_is_let_go_after_the_workers_have_ended():
    batches = iter(read(10))
    some = [next(batches) for _ in range(3)]
    del batches
    gc.collect()
    assert all(map(right, some))


def test_what_was_copied_frees_its_slot_at_once():
    """Page-locked copies belong to torch, which waits for their way to the GPU; they are handed on as they are."""
    both = slots.Slots(2)
    worker = both.of(1)
    batch = {"first": worker.tensor((LARGE,), torch.float32)}
    taken = both._taken.numpy()
    marked = worker.mark(batch)
    assert marked[slots.TAKEN] == [("first", slots.PER_WORKER)] and taken.nonzero()[0].tolist() == [slots.PER_WORKER]
    copied = marked["first"].clone()
    assert both.watch(marked | {"first": copied})["first"] is copied and not taken.any()
    batch = {"first": worker.tensor((LARGE,), torch.float32)}
    view = both.watch(worker.mark(batch))["first"][7:]
    gc.collect()
    assert len(worker) == 1 and taken.any()
    del view
    assert not taken.any()


def test_two_tensors_of_one_slot():
    both = slots.Slots(1)
    worker, taken = both.of(0), both._taken.numpy()
    whole = worker.tensor((2, LARGE), torch.float32)
    batch = both.watch(worker.mark({"upper": whole[0], "lower": whole[1]}))
    for name in ("lower", "upper"):
        assert taken.any()
        del batch[name]
    assert not taken.any()


def test_sizes_that_are_no_longer_asked_for_are_given_back():
    """Masks of as many objects as a batch has would else fill the shared memory with every size there was."""
    both = slots.Slots(1)
    worker = both.of(0)
    for size in range(1, 60):
        shapes = {"same": (LARGE,), "other": (size * LARGE // 3 + LARGE,)}
        batch = both.watch(worker.mark({name: worker.tensor(one, torch.float32) for name, one in shapes.items()}))
        assert {name: tuple(value.shape) for name, value in batch.items()} == shapes
        assert len(worker) < slots.PER_WORKER / 2
    del batch
    worker.tensor((LARGE,), torch.float32)
    assert worker._storages.keys() >= set(both._taken.numpy().nonzero()[0].tolist())
