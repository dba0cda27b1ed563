# SPDX-License-Identifier: Apache-2.0
"""Memory into which data workers write batch after batch: to clear fresh memory costs more than to read into it.

A slot is shared memory that a worker made for a batch. It stays taken as long as anything in the main process looks at
that batch, be it a view of a row; then the worker writes the next one there.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from typing import Any

import numpy as np
import torch

LEAST_BYTES = 1 << 20  # of a slot; smaller tensors are not worth one
PER_WORKER = 32  # slots at most; what finds none free gets memory of its own
LATELY = 16  # tensors that a worker has made since: a free slot that none of them fitted goes
TAKEN = "slots"  # key of a batch on its way: pairs (name of a tensor, number of its slot)


class Slots:
    """Which slots of all workers are taken; made before the workers, who share it."""

    def __init__(self, workers: int):
        self._taken = torch.zeros(workers * PER_WORKER, dtype=torch.uint8).share_memory_()

    def of(self, worker: int) -> WorkerSlots:
        """Return those of a worker, there."""
        return WorkerSlots(self._taken.numpy(), worker * PER_WORKER)

    def watch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Free the slots of a batch when the last of what looks at it has gone."""
        marks = batch.pop(TAKEN, ())
        left = Counter(slot for _, slot in marks)  # tensors of each slot that are still looked at
        for name, slot in marks:
            if not batch[name].is_shared():  # it has been copied, into page-locked memory
                self._release(left, slot)
                continue
            # Tensors come back to life; an array that they are made on lives exactly as long as the last of them.
            values = batch[name].numpy()
            weakref.finalize(values, self._release, left, slot).atexit = False
            batch[name] = torch.from_numpy(values)
        return batch

    def _release(self, left: Counter[int], slot: int) -> None:
        left[slot] -= 1
        if not left[slot]:
            self._taken[slot] = 0


class WorkerSlots:
    """The slots of one data worker."""

    def __init__(self, taken: np.ndarray, first: int):
        self._taken = taken[first : first + PER_WORKER]
        self._first = first
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._used: dict[int, int] = {}  # when each was taken last, counted in tensors
        self._count = 0

    def __len__(self) -> int:
        return len(self._storages)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return shared memory with whatever was in it."""
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // 64) * 64  # so that elements of any type fill it
        storage: Any = self._free(size) if size >= LEAST_BYTES else None
        storage = torch.UntypedStorage._new_shared(size) if storage is None else storage
        return torch.empty(0, dtype=dtype).set_(storage)[:count].view(shape)

    def _free(self, size: int) -> torch.UntypedStorage | None:
        """Take a free slot of about this size, make one, or return None: all are taken."""
        self._count += 1
        free = [slot for slot in self._storages if not self._taken[slot]]
        for slot in free:
            if self._count - self._used[slot] > LATELY:  # of a size that is no longer asked for
                del self._storages[slot]
        fitting = [slot for slot in free if size <= self._bytes(slot) <= 2 * size]
        slot = next(iter(fitting), -1)
        if not fitting:
            slot = next((slot for slot in range(PER_WORKER) if slot not in self._storages), -1)
            if slot < 0:
                return None
            self._storages[slot] = torch.UntypedStorage._new_shared(size)
        self._taken[slot], self._used[slot] = 1, self._count
        return self._storages[slot]

    def _bytes(self, slot: int) -> int:
        return self._storages[slot].nbytes() if slot in self._storages else 0

    def mark(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note in a batch which of its tensors are in slots."""
        slots = {storage.data_ptr(): self._first + slot for slot, storage in self._storages.items()}
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        places = {name: slots.get(value.untyped_storage().data_ptr()) for name, value in tensors.items()}
        return batch | {TAKEN: [(name, slot) for name, slot in places.items() if slot is not None]}
