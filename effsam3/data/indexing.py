# SPDX-License-Identifier: Apache-2.0
"""What all indexes share: chunks that are checked in parallel and survive a kill, the parquet, reports.

A chunk is a parquet of a few rows with all that is known of them, in `<stem>.chunks/`. Its name is a hash of all it
was made from, so that a re-run after a kill knows the finished ones by their names.
"""

from __future__ import annotations

import datetime
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from effsam3.data.splits import split_code
from effsam3.data.unreadable import Unreadable
from effsam3.data.workers import in_order, progress_bar, run_now
from effsam3.errors import UserError
from effsam3.files import atomic_file, refuse_unwritable, write_json

ROWS = 1 << 16  # of a row group of the parquet
DETAILS = 100  # files of each reason that a report explains in full


def printable(name: str) -> str:
    """Return a file name that UTF-8 can hold; bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def relative(path: Path | str, folder: Path) -> str:
    """Return how an index in `folder` names a file."""
    return Path(os.path.relpath(path, folder)).as_posix()


def read_file(row: dict, folder: Path, what: str, error: type[Unreadable]) -> bytes:
    """Return the bytes where a row points to for its `image` or `annotation`, as far as they have the size indexed.

    Raises:
        Unreadable: as `error`: unreadable, or changed.
    """
    file, offset, size = folder / row[f"{what}_file"], row.get(f"{what}_offset", 0), row[f"{what}_bytes"]
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)  # 0: a plain file, which is read whole to notice that it has grown
            data = stream.read(size if offset else -1)
    except OSError as fault:
        raise error(row["key"], "unreadable", str(fault)) from fault
    if len(data) != size:
        detail = f"{file} has {len(data)} bytes, {size} when indexed; build the index again"
        raise error(row["key"], "changed", detail)
    return data


def walk(tops: list[Path], unreadable: Callable[[OSError], object]) -> Iterator[tuple[Path, Iterator[Path]]]:
    """Yield folders, in sorted order and through links to folders, with their files, in any; without hidden ones.

    Files are listed as they are taken: a folder may have millions.
    """
    visited = set()
    waiting = tops[::-1]
    while waiting:
        parent = waiting.pop()
        # Links are followed, since data sets are often links to another disk.
        if os.path.realpath(parent) in visited:  # a link back up
            continue
        visited.add(os.path.realpath(parent))
        folders: list[Path] = []
        yield parent, _files_in(parent, folders, unreadable)
        waiting += sorted(folders, reverse=True)


def _files_in(parent: Path, folders: list[Path], unreadable: Callable[[OSError], object]) -> Iterator[Path]:
    """Yield the files in a folder; add the folders in it to `folders`."""
    try:
        with os.scandir(parent) as entries:
            for entry in entries:
                path = parent / entry.name
                if not entry.name.startswith("."):
                    if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                        folders.append(path)
                    else:
                        yield path
    except OSError as fault:
        unreadable(fault)


# ---- build


def refuse_options(out: Path, val_fraction: float, check: str) -> None:
    """Raise UserError for values that no index can be built with, or an `out` that cannot be written."""
    if out.suffix != ".parquet":
        raise UserError(f"--out {out} must end in .parquet")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1")
    if check not in ("decode", "header"):
        raise UserError(f"--check {check} must be decode or header")
    refuse_unwritable(out.parent, "--out")


class Chunks:
    """What an index is made of: files of a few rows, which stay until the index is whole.

    Args:
        out: the index.
        size: entries of a chunk, on average.
        make_rows: `make_rows(entries, *arguments)` returns the rows of a chunk.
        version: of `make_rows`.
        columns: of the rows, name: Arrow type.
    """

    def __init__(
        self,
        out: Path,
        size: int,
        make_rows: Callable[..., list[dict]],
        arguments: tuple,
        version: int,
        columns: dict[str, str],
    ):
        self.folder = chunks_of(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._size, self._make_rows, self._arguments = size, make_rows, arguments
        self._version, self._columns = version, columns

    def tables(
        self,
        entries: Iterable[tuple],
        count: int,
        submit: Callable[..., Future],
        workers: int,
        unit: str,
        progress: bool,
    ) -> Iterator:
        """Yield the rows of all entries as Arrow tables, chunk by chunk and in order of their keys.

        What an earlier run with the same version and arguments has made of the same entries is read instead. Only a
        few chunks for each worker are in memory.

        Args:
            entries: in order; the first item of each is its name, and its `repr` says all that its rows depend on.
            count: of the entries.
            unit: names them in the progress bar.
        """
        import pyarrow.parquet as parquet

        schema = arrow_schema(self._columns)

        def made(chunk: list[tuple]) -> Future:
            file = self._file(chunk)
            if file.exists():
                return run_now(lambda: (len(chunk), file))
            return submit(_make_chunk, self._make_rows, chunk, self._arguments, schema, file)

        with progress_bar(count, unit, progress) as bar:
            for size, file in in_order(map(made, _divided(entries, self._size)), ahead=4 * workers):
                bar.update(size)
                yield parquet.read_table(file, partitioning=None)

    def _file(self, chunk: list[tuple]) -> Path:
        import xxhash

        # All that a chunk's rows depend on: options, and each file's name, size and time.
        made_from = repr((self._version, self._arguments, chunk)).encode("utf-8", "backslashreplace")
        return self.folder / f"{xxhash.xxh3_128_hexdigest(made_from)}.parquet"


def _divided(entries: Iterable[tuple], size: int) -> Iterator[list[tuple]]:
    """Divide entries into chunks: all keys of a chunk, `name` or `name_kind`, come before those of the next one."""
    chunk: list[tuple] = []
    for entry in entries:
        # By a hash of the name: where entries come or go between two runs, most chunks stay as they are.
        if chunk and split_code(chunk[-1][0]) % size == 0:
            if not any(entry[0].startswith(f"{name}_") for name, *_ in chunk):
                yield chunk
                chunk = []
        chunk.append(entry)
    if chunk:
        yield chunk


def _make_chunk(
    make_rows: Callable[..., list[dict]], chunk: list, arguments: tuple, schema, file: Path
) -> tuple[int, Path]:
    """Write a chunk's file; return how many entries it has, and where it is."""
    import pyarrow

    rows = sorted(make_rows(chunk, *arguments), key=itemgetter("key"))
    write_parquet(pyarrow.Table.from_pylist(rows, schema), file)
    return len(chunk), file


def chunks_of(out: Path) -> Path:
    """Return the folder of an index's chunks."""
    return out.parent / f"{out.stem}.chunks"


def report_of(index: Path) -> Path:
    """Return where the report of an index is."""
    return index.with_name(f"{index.stem}.report.json")


class Counts(Protocol):
    """What the report says of the rows."""

    def add(self, table: Any) -> None:
        """Count some rows, usable or not."""

    def report(self) -> dict[str, Any]:
        """Return the entries of the report."""


def write_index(
    out: Path,
    tables: Iterable,
    columns: dict[str, str],
    counts: Counts,
    about: dict[str, Any],
    unit: str,
    summary: Callable[[dict], str],
    started: float,
) -> dict[str, Any]:
    """Write the usable rows of some tables as the index, and the report; the chunks go. Returns the report.

    Args:
        tables: in order of their keys; of a few rows each.
        about: more entries of the report, such as `sources`.
        unit: what `counts` counts by split, under its plural.
        started: `time.monotonic()` at the beginning.

    Raises:
        UserError: no row is usable.
    """
    with _atomic_parquet(out, arrow_schema(columns)) as write:
        for table in tables:
            counts.add(table)
            write(table.filter(is_empty(table["excluded"])).select(list(columns)))
        report = counts.report() | about
        report["made"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        report["seconds"] = round(time.monotonic() - started, 1)
        # Before the index: where no row is left, the report is all that tells why.
        write_json(report_of(out), report)
        if not sum(report[f"{unit}s"].values()):
            names = ", ".join(report["sources"])
            raise UserError(f"no usable {unit} in {names}\n{summary(report)}\nreport: {report_of(out)}")
    shutil.rmtree(chunks_of(out))
    return report


@contextmanager
def _atomic_parquet(path: Path, schema) -> Iterator[Callable]:
    """Yield a function that adds a table to a parquet file, which is written whole or not at all."""
    import pyarrow
    import pyarrow.parquet as parquet

    waiting = [schema.empty_table()]

    def add(table) -> None:
        waiting.append(table)
        if sum(map(len, waiting)) >= ROWS:
            rows = pyarrow.concat_tables(waiting).combine_chunks()
            writer.write_table(rows.slice(0, ROWS))
            waiting[:] = [rows.slice(ROWS)]

    with atomic_file(path) as partial, parquet.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
        yield add
        writer.write_table(pyarrow.concat_tables(waiting).combine_chunks())


# ---- tables


def arrow_schema(columns: dict[str, str]):
    """Return the Arrow schema of columns given by name and type."""
    import pyarrow

    nested = {"list<int32>": pyarrow.list_(pyarrow.int32())}
    nested["list<list<int32>>"] = pyarrow.list_(nested["list<int32>"])
    return pyarrow.schema([(name, nested.get(kind) or pyarrow.type_for_alias(kind)) for name, kind in columns.items()])


def write_parquet(table, path: Path) -> None:
    """Write an Arrow table as a parquet file, whose pages have checksums, whole or not at all."""
    import pyarrow.parquet as parquet

    with atomic_file(path) as partial:
        parquet.write_table(table, partial, write_page_checksum=True)


# ---- reports


def told(title: str, found: dict, names: list[str]) -> str:
    """Return a line of a report on what was `found` for a reason, its first names included."""
    return f"{title} {found['count']:,} ({', '.join(names[:3])}{', ...' if found['count'] > 3 else ''})"


def is_empty(column):
    """Return where a string column is empty: the rows without a reason to skip them."""
    import pyarrow.compute as compute

    return compute.equal(column, "")


class Reasons:
    """Names of what is left out by reason, and what is wrong with it in full, where that is known."""

    def __init__(self, names: dict[str, list[str]]):
        self._names = {reason: list(some) for reason, some in names.items()}
        self._details: dict[str, str] = {}

    def add(self, table, reason: str, name: str) -> None:
        """Add a table's rows that have a reason, from its columns of reasons, names and `detail`."""
        import pyarrow.compute as compute

        rows = table.filter(compute.invert(is_empty(table[reason])))
        for word, one, detail in zip(*(rows[column].to_pylist() for column in (reason, name, "detail")), strict=True):
            self._names.setdefault(word, []).append(one)
            if detail:
                self._details[one] = detail

    def report(self) -> dict:
        """Return {reason: {"count", "files", "details"}} in alphabetic order; details only of the first DETAILS."""
        found = {}
        for reason, some in sorted(self._names.items()):
            if some:
                files = sorted(some)
                full = {file: self._details[file] for file in files[:DETAILS] if file in self._details}
                found[reason] = {"count": len(files), "files": files} | ({"details": full} if full else {})
        return found
