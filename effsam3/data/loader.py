# SPDX-License-Identifier: Apache-2.0
"""Loads whole batches in data worker processes, in the order asked for."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from effsam3.data.slots import Slots, WorkerSlots
from effsam3.errors import UserError
from effsam3.stopping import leave_stopping_to_the_parent, requests_held_back

TIMEOUT_S = 900  # shorter than the process-group timeout, so that the real cause is reported
SIGNAL_S = 1  # by then a process hears that its child has died


_slots: WorkerSlots | None = None  # of this process, where it is a data worker


class _Loader(DataLoader):
    """Starts its workers where no request to stop can reach them: torch's own handler would end them."""

    def __iter__(self):
        slots = Slots(self.num_workers)
        self.worker_init_fn = partial(_start_worker, slots)
        # A fork inherits pending signals' handlers; torch's would end a worker on the first SIGTERM.
        with requests_held_back():
            batches = super().__iter__()
        return map(slots.watch, batches)


def _start_worker(slots: Slots, number: int) -> None:
    global _slots
    _slots = slots.of(number)
    leave_stopping_to_the_parent(number)


class Samples(Protocol):
    """A data set that builds a whole batch at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, positions: list) -> dict:
        """Return the batch of these positions."""


def loader(dataset: Samples, batches: Iterable[list[int]], workers: int, pin: bool) -> DataLoader:
    """Yield `dataset.__getitems__(positions)` for every list of positions.

    `workers` processes read ahead, 0 reads in this one; `pin` puts tensors into page-locked memory for a GPU. A worker
    that gives nothing for `TIMEOUT_S` is an error (RuntimeError, see `worker_failures_explained`), not a hang. Workers
    ignore requests to stop, so that this process can finish its step when all of them are signalled.
    """
    return _Loader(
        cast(Dataset, dataset),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        timeout=TIMEOUT_S if workers else 0,
    )


def new_batch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory for a batch, with whatever was in it."""
    # Workers hand tensors over in shared memory: written there at once, a batch is not copied on its way.
    return torch.empty(shape, dtype=dtype) if _slots is None else _slots.tensor(shape, dtype)


def _end_workers() -> None:
    """Kill what is left of data workers at exit: multiprocessing would send SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes it for a failure
    for child in multiprocessing.active_children():
        # Other children, such as wandb's, are not ours to end.
        if child.daemon:
            child.kill()


atexit.register(_end_workers)  # after torch has imported multiprocessing, so that it runs before multiprocessing's own


@contextmanager
def worker_failures_explained() -> Iterator[None]:
    """Turn torch's error about a data worker into one that tells what to do.

    It wraps the whole loop: torch tells of a worker's death by a signal, in the middle of any other work.

    Raises:
        UserError: a data worker has died or has not responded for too long.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError):
            # Perhaps a worker died while it handed over a batch: then torch's signal comes now, not in what follows.
            time.sleep(SIGNAL_S)
            raise
    except UserError as error:  # torch puts the worker's traceback in front of the message
        name = f"{type(error).__name__}: "
        if not str(error).startswith("Caught ") or name not in str(error):
            raise
        raise type(error)(str(error).rsplit(name, 1)[1].strip()) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):  # not a worker's own error, which says "Caught ..."
            raise
        raise UserError(
            f"{str(error).strip(' .')}. A worker without memory is killed, one that hangs waits for its disk (see the "
            "system's log); lower data.workers, or set data.workers=0 to see the error itself"
        ) from error


def _as_it_is(batch: Any) -> dict:
    """A batch is already collated: the dataset built it whole."""
    return batch if _slots is None else _slots.mark(batch)
