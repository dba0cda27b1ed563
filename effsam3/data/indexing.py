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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from effsam3.data.unreadable import Unreadable
from effsam3.data.workers import submit_jobs
from effsam3.errors import UserError
from effsam3.files import atomic_file, refuse_unwritable, write_json

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


def walk(tops: list[Path], unreadable: Callable[[OSError], object]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield folders and their files, in sorted order, through links to folders, without hidden ones."""
    visited = set()
    for top in tops:
        for parent, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
            # Links are followed, since data sets are often links to another disk.
            if os.path.realpath(parent) in visited:  # a link back up
                folders.clear()
                continue
            visited.add(os.path.realpath(parent))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield Path(parent), [Path(parent, name) for name in sorted(files) if not name.startswith(".")]


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


def make_chunks(
    out: Path,
    chunks: list[list],
    make_rows: Callable[..., list[dict]],
    arguments: tuple,
    version: int,
    columns: dict[str, str],
    submit: Callable[..., Future],
    unit: str,
    progress: bool,
):
    """Return `make_rows(chunk, *arguments)` of all chunks as one Arrow table in order of their keys.

    What an earlier run with the same `version` and arguments has made of the same entries is read instead.

    Args:
        chunks: of entries, whose `repr` says all that their rows depend on.
        unit: names the entries in the progress bar.
    """
    import pyarrow
    import pyarrow.parquet as parquet
    import xxhash

    folder, schema = _chunks_of(out), arrow_schema(columns)
    folder.mkdir(parents=True, exist_ok=True)
    # All that a chunk's rows depend on: options, and each file's name, size and time.
    made_from = [repr((version, arguments, chunk)).encode("utf-8", "backslashreplace") for chunk in chunks]
    files = [folder / f"{xxhash.xxh3_128_hexdigest(text)}.parquet" for text in made_from]
    missing = {file: chunk for file, chunk in zip(files, chunks, strict=True) if not file.exists()}
    jobs = [(make_rows, chunk, arguments, schema, file) for file, chunk in missing.items()]
    sizes = [len(chunk) for chunk in missing.values()]
    submit_jobs(submit, _make_chunk, jobs, unit, progress, sizes, sum(map(len, chunks)) - sum(sizes))
    tables = [parquet.read_table(file, partitioning=None) for file in files]
    return pyarrow.concat_tables([schema.empty_table(), *tables]).sort_by("key")


def _make_chunk(make_rows: Callable[..., list[dict]], chunk: list, arguments: tuple, schema, file: Path) -> None:
    import pyarrow

    write_parquet(pyarrow.Table.from_pylist(make_rows(chunk, *arguments), schema), file)


def _chunks_of(out: Path) -> Path:
    return out.parent / f"{out.stem}.chunks"


def report_of(index: Path) -> Path:
    """Return where the report of an index is."""
    return index.with_name(f"{index.stem}.report.json")


def write_index(
    out: Path,
    table,
    columns: dict[str, str],
    report: dict[str, Any],
    unit: str,
    summary: Callable[[dict], str],
    sources: list[Path],
    started: float,
) -> dict[str, Any]:
    """Write the report, then the usable rows as the index; the chunks go. Returns the report.

    Args:
        unit: what the report counts by split, under its plural.
        started: `time.monotonic()` at the beginning.

    Raises:
        UserError: no row is usable.
    """
    report |= {
        "sources": [printable(str(source)) for source in sources],
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
    }
    # Before the index: where no row is left, the report is all that tells why.
    write_json(report_of(out), report)
    if not sum(report[f"{unit}s"].values()):
        names = ", ".join(report["sources"])
        raise UserError(f"no usable {unit} in {names}\n{summary(report)}\nreport: {report_of(out)}")
    write_parquet(table.filter(is_empty(table["excluded"])).select(list(columns)), out)
    shutil.rmtree(_chunks_of(out))
    return report


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


def counted_rows(table, reason: str, name: str, listed: dict[str, list[str]]) -> dict:
    """Return `counted` of a table's columns of reasons, names and `detail`, after those that were `listed` before."""
    found = {word: list(names) for word, names in listed.items()}
    details: dict[str, str] = {}
    for word, one, detail in zip(*(table[column].to_pylist() for column in (reason, name, "detail")), strict=True):
        if word:
            found.setdefault(word, []).append(one)
        if detail:
            details[one] = detail
    return counted(found, details)


def counted(names: dict[str, list[str]], details: dict[str, str]) -> dict:
    """Return {reason: {"count", "files", "details"}} in alphabetic order, as reports have it.

    `details` holds what is wrong in full with the first DETAILS files, where it is known.
    """
    found = {}
    for reason, some in sorted(names.items()):
        if some:
            files = sorted(some)
            full = {file: details[file] for file in files[:DETAILS] if file in details}
            found[reason] = {"count": len(files), "files": files} | ({"details": full} if full else {})
    return found
