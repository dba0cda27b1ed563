# SPDX-License-Identifier: Apache-2.0
"""What builds an index in parallel: worker processes, parts that survive a kill, and reports of what was left out.

A part is a parquet of a few rows with all that is known of them. Its name is a hash of all it was made from, so that a
re-run after a kill knows the finished ones by their names.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from effsam3.errors import UserError
from effsam3.stopping import leave_stopping_to_the_parent, stopped_at_once

DETAILS = 100  # files of each reason that a report explains in full

# ---- workers


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., Future]]:
    """Give `submit(function, *arguments)`, which returns a future; with one worker it calls the function at once.

    Raises:
        UserError: a worker was killed.
        KeyboardInterrupt: this process was asked to stop; parts that are under way are given up.
    """
    if workers == 1:
        with stopped_at_once():
            yield _run_now
        return
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
            "a worker process was killed, perhaps for want of memory; the finished parts are kept: "
            "run the same command again to resume, with fewer workers if memory is short"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _run_now(function: Callable, *arguments) -> Future:
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


# ---- parts


def make_parts(
    files: dict[Path, list], make_part: Callable, arguments: tuple, submit: Callable, unit: str, progress: bool
) -> None:
    """Call `make_part(entries, *arguments, file)` for every file of {file: entries} that is not there.

    `unit` names the entries in the progress bar.
    """
    from tqdm import tqdm

    total = sum(map(len, files.values()))
    missing = {file: entries for file, entries in files.items() if not file.exists()}
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; without a terminal each update is a line of a log
    with tqdm(total=total, desc=unit, mininterval=interval, disable=not progress) as bar:
        bar.update(total - sum(map(len, missing.values())))
        futures = []
        for file, entries in missing.items():
            futures.append(submit(make_part, entries, *arguments, file))
            futures[-1].add_done_callback(functools.partial(_advance, bar, len(entries)))
        for future in futures:
            future.result()


def run_jobs(function: Callable, jobs: list[tuple], workers: int, unit: str, progress: bool = True) -> list:
    """Call `function(*job)` for every job in worker processes, and return what it returns, in the jobs' order."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; without a terminal each update is a line of a log
    with (
        worker_pool(workers) as submit,
        tqdm(total=len(jobs), desc=unit, mininterval=interval, disable=not progress) as bar,
    ):
        futures = []
        for job in jobs:
            futures.append(submit(function, *job))
            futures[-1].add_done_callback(functools.partial(_advance, bar, 1))
        return [future.result() for future in futures]


def _advance(bar, count: int, future: Future) -> None:
    """Move a progress bar on by `count` when a job has ended well."""
    if not future.cancelled() and future.exception() is None:
        bar.update(count)


def parquet_bytes(table) -> memoryview:
    """Return an Arrow table as a parquet file, whose pages have checksums."""
    import pyarrow.parquet as parquet

    sink = io.BytesIO()
    parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getbuffer()


def read_index(path: Path, command: str):
    """Return an index as an Arrow table; `command` is what makes one.

    Raises:
        UserError: it is missing, is not a parquet file, or is damaged.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise UserError(f"no index at {path}; make it with: {command}")
    try:
        table = parquet.read_table(path, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)
        table.schema.names  # noqa: B018  they are decoded only now
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a parquet file, or is damaged ({error}); make it with: {command}") from error
    return table


def read_parts(files: Iterable[Path], schema):
    """Return the rows of all parts as one Arrow table in order of their keys; `schema` is that of every part."""
    import pyarrow
    import pyarrow.parquet as parquet

    tables = [parquet.read_table(file, partitioning=None) for file in files]
    return pyarrow.concat_tables([schema.empty_table(), *tables]).sort_by("key")


# ---- reports


def is_empty(column):
    """Return where a string column is empty: the rows without a reason to leave them out."""
    import pyarrow.compute as compute

    return compute.equal(column, "")


def names_by_reason(table, reason: str, name: str, listed: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return {reason: names} from two columns of a table, after those that were `listed` before."""
    found = {word: list(names) for word, names in listed.items()}
    for word, one in zip(table[reason].to_pylist(), table[name].to_pylist(), strict=True):
        if word:
            found.setdefault(word, []).append(one)
    return found


def details_by_name(table, name: str) -> dict[str, str]:
    """Return {name: what is wrong in full} from a table's column `detail`, for rows that have one."""
    columns = (table[column].to_pylist() for column in (name, "detail"))
    return {one: detail for one, detail in zip(*columns, strict=True) if detail}


def counted(names: dict[str, list[str]], details: dict[str, str]) -> dict:
    """Return {reason: {"count", "files", "details"}} in alphabetic order, as reports have it.

    `details` holds what is wrong in full with the first DETAILS files, where it is known.
    """
    found = {}
    for reason, some in sorted(names.items()):
        if some:
            files = sorted(some)
            told = {file: details[file] for file in files[:DETAILS] if file in details}
            found[reason] = {"count": len(files), "files": files} | ({"details": told} if told else {})
    return found
