# SPDX-License-Identifier: Apache-2.0
"""Reading an index of any length: in memory that all processes share, opened in the time that a few rows take.

To be read a parquet must be decoded, which takes a core and gigabytes for millions of rows. So whoever opens an index
first writes each split as an Arrow file next to it, `.<stem>.<stamp>.<split>.arrow`; these are mapped. The stamp is of
the parquet's size and time: of another parquet the copies are made anew, and the old ones go.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from effsam3.data.indexing import arrow_schema
from effsam3.data.splits import SPLITS
from effsam3.data.store.key_index import hashes_of
from effsam3.errors import UserError
from effsam3.files import atomic_file

VERSION = 1  # of the copies; another number makes older ones void
ROWS = 1 << 16  # decoded at a time


def load_rows(
    path: Path,
    columns: dict[str, str],
    what: str,
    command: str,
    unit: str,
    split: str | None = None,
    limit: int | None = None,
    later: Mapping[str, Any] | None = None,
    codes: Mapping[str, Sequence[str]] | None = None,
):
    """Return the rows of an index as a Hugging Face `datasets.Dataset`, memory-mapped and in the index's order.

    Args:
        columns: of the parquet, name: Arrow type.
        what: it is, for messages.
        command: makes one.
        unit: what a row is, for messages.
        split: train or val; None: the rows of train, then those of val.
        limit: keeps the first rows of what is left.
        later: columns that older indexes lack, with what is known of their rows.
        codes: more columns, uint64: the hashes of these columns' values, joined by "@".

    Raises:
        UserError: it is missing, is not a parquet file, is damaged, is another index, or has no row in the split.
    """
    from datasets import Dataset, concatenate_datasets

    if split not in (None, *SPLITS):
        raise UserError(f"split {split!r} does not exist; choose from {', '.join(SPLITS)}")
    if not path.is_file():
        raise UserError(f"no index at {path}; make it with: {command}")
    copies = _copies_of(path, (columns, later, codes))
    with _one_at_a_time(path, copies):
        if not _are_there(copies):
            _make(copies, _tables(path, columns, what, command, later or {}), columns, codes or {})
            _remove_older(path, copies)
    parts = {name: Dataset.from_file(str(copy)) for name, copy in copies.items()}
    if split is not None and not len(parts[split]):
        counts = {name: len(part) for name, part in parts.items()}
        raise UserError(f"{path} has no {unit} in split {split} ({counts}); rebuild it with another --val-fraction")
    rows = concatenate_datasets(list(parts.values())) if split is None else parts[split]
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


# ---- copies


def _copies_of(path: Path, form: tuple) -> dict[str, Path]:
    """Return where the copy of each split is, or is to be made."""
    state = path.stat()
    made_of = VERSION, str(path.absolute().parent), state.st_size, state.st_mtime_ns, form
    stamp = xxhash.xxh3_64_hexdigest(repr(made_of).encode("utf-8", "surrogateescape"))
    # A folder of others is left as it is; the copies then go with this process.
    folder = path.parent if os.access(path.parent, os.W_OK) else _own_folder()
    return {split: folder / f".{path.stem}.{stamp}.{split}.arrow" for split in SPLITS}


def _are_there(copies: dict[str, Path]) -> bool:
    return all(copy.is_file() for copy in copies.values())


@contextmanager
def _one_at_a_time(path: Path, copies: dict[str, Path]) -> Iterator[None]:
    """Wait until no other process makes the copies, if they have to be made: all ranks of a run open an index at once.

    Where a disk has no locks, each of them makes the same.
    """
    shared = copies[SPLITS[0]].parent == path.parent
    with ExitStack() as stack:
        if shared and not _are_there(copies):
            with suppress(OSError):
                # Ends when the file is closed, be it by the end of its process.
                fcntl.flock(stack.enter_context(open(path, "rb")), fcntl.LOCK_EX)
        yield


@functools.cache
def _own_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="effsam3-index-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _make(
    copies: dict[str, Path], tables: Iterator, columns: dict[str, str], codes: Mapping[str, Sequence[str]]
) -> None:
    """Write the copies. Several processes may do so at once, such as on a disk without locks: all write the same."""
    import pyarrow
    import pyarrow.compute as compute

    schema = arrow_schema(columns | dict.fromkeys(codes, "uint64"))
    with ExitStack() as stack:
        writers = {}
        for split, copy in copies.items():
            partial = stack.enter_context(atomic_file(copy))
            writers[split] = stack.enter_context(pyarrow.ipc.new_stream(str(partial), schema))
        for table in tables:
            for name, joined in codes.items():
                texts = compute.binary_join_element_wise(*(table[column] for column in joined), "@")
                table = table.append_column(name, pyarrow.array(hashes_of(texts.cast("binary").to_pylist())))
            for split, writer in writers.items():
                # In one piece: rows are found faster in few pieces than in many.
                writer.write_table(table.filter(compute.equal(table["split"], split)).combine_chunks())


def _remove_older(path: Path, copies: dict[str, Path]) -> None:
    folder = copies[SPLITS[0]].parent
    copy = re.compile(rf"\.{re.escape(path.stem)}\.[0-9a-f]{{16}}\.({'|'.join(SPLITS)})\.arrow")
    for name in os.listdir(folder):
        if copy.fullmatch(name) and folder / name not in copies.values():
            (folder / name).unlink(missing_ok=True)  # whoever has mapped it keeps it


def _tables(path: Path, columns: dict[str, str], what: str, command: str, later: Mapping[str, Any]) -> Iterator:
    """Yield the rows of a parquet as Arrow tables of these columns, a few at a time."""
    import pyarrow
    import pyarrow.parquet as parquet

    asked = arrow_schema(columns)
    errors = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    damaged = f"{path} is not a parquet file, or is damaged ({{}}); make it with: {command}"
    try:
        # Without the buffer that pyarrow 25 turned on: it keeps all that was read, to the end of the file.
        file = parquet.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
        found = {field.name: field.type for field in file.schema_arrow}
    except errors as error:
        raise UserError(damaged.format(error)) from error
    with file:
        missing = {name: value for name, value in later.items() if name not in found}
        found |= {name: asked.field(name).type for name in missing}
        other = [
            f"{one.name} ({one.type}, found {found.get(one.name)})" for one in asked if found.get(one.name) != one.type
        ]
        if other:
            raise UserError(
                f"{path} is not {what}, or an older version's: {', '.join(other)}; make it again, with the options it "
                f"was made with: {command}"
            )
        # No threads: data workers are forked from this process later.
        batches = file.iter_batches(ROWS, use_threads=False)
        try:
            while batch := next(batches, None):
                batch.validate(full=True)
                table = pyarrow.Table.from_batches([batch])
                for name, value in missing.items():
                    table = table.append_column(name, pyarrow.array([value] * len(table), asked.field(name).type))
                yield table.select(asked.names).cast(asked)
        except errors as error:
            raise UserError(damaged.format(error)) from error
