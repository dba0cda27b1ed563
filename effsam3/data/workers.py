# SPDX-License-Identifier: Apache-2.0
"""Jobs in worker processes, which end with their parent."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from effsam3.errors import UserError
from effsam3.stopping import leave_stopping_to_the_parent, stopped_at_once


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., Future]]:
    """Give `submit(function, *arguments)`, which returns a future; with one worker it calls the function at once.

    Raises:
        UserError: a worker was killed.
        KeyboardInterrupt: this process was asked to stop; jobs that are under way are given up.
    """
    if workers == 1:
        with stopped_at_once():
            yield run_now
        return
    # Not forked: a child of a process with torch's threads may inherit a lock that nobody will release.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=start_worker)
    others = set(multiprocessing.active_children())
    try:
        with stopped_at_once():
            yield executor.submit
    except KeyboardInterrupt:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out; what is finished is kept: "
            "run the same command again to resume, with fewer workers if memory is short"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def run_now(function: Callable, *arguments) -> Future:
    """Call a function in this process; return its result as a future."""
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def start_worker() -> None:
    """Initialise a worker of a pool: it ends when its parent ends it, or with its parent."""
    leave_stopping_to_the_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()
    os._exit(1)  # a killed parent leaves nobody who could stop this worker


def run_jobs(function: Callable, jobs: list[tuple], workers: int, unit: str, progress: bool = True) -> list:
    """Call `function(*job)` for every job in worker processes, and return what it returns, in the jobs' order."""
    with worker_pool(workers) as submit, progress_bar(len(jobs), unit, progress) as bar:
        futures = []
        for job in jobs:
            futures.append(submit(function, *job))
            futures[-1].add_done_callback(functools.partial(_advance, bar))
        return [future.result() for future in futures]


def _advance(bar, future: Future) -> None:
    """Move a progress bar on when a job has ended well."""
    if not future.cancelled() and future.exception() is None:
        bar.update()


def progress_bar(total: int, unit: str, shown: bool = True):
    """Return a progress bar; a context manager."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; without a terminal each update is a line of a log
    return tqdm(total=total, desc=unit, mininterval=interval, disable=not shown)


def in_order(futures: Iterable[Future], ahead: int) -> Iterator[Any]:
    """Yield what futures give, in their order; `futures` is asked for at most `ahead` more than have been waited for.

    So jobs that are submitted as they are asked for need not all be in memory.
    """
    waiting: deque[Future] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
