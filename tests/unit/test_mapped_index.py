# SPDX-License-Identifier: Apache-2.0
"""Mapped copies of an index hold what its parquet holds, in the same order, and never that of an older one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import xxhash

from effsam3.data import mapped
from effsam3.data.images import features, sa1b
from effsam3.data.images.features import ImageFeatures, store_keys, without
from effsam3.data.indexing import arrow_schema, write_parquet
from effsam3.data.statistics import statistics_sample
from effsam3.data.store.format import INPUTS, Field, StoreError, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store
from effsam3.errors import UserError


def write(path: Path, count: int = 500, first: int = 0) -> list[dict]:
    """Write an index of images that are not there; returns its rows."""
    rows = [
        {name: number for name in sa1b.COLUMNS}
        | {"key": f"sa_{number:06d}", "split": "val" if number % 10 == 3 else "train"}
        | {"image_file": f"ü_{number // 11}.tar", "image_digest": f"{number * 7919:016x}", "converted": ""}
        | {"annotation_file": None if number % 3 else "a.json"}
        for number in range(first, first + count)
    ]
    write_parquet(pyarrow.Table.from_pylist(rows, arrow_schema(sa1b.COLUMNS)), path)
    return rows


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".arrow"}


@pytest.mark.parametrize("rows_at_a_time", [7, 1 << 16])
def test_rows_and_codes_are_those_of_the_parquet(tmp_path, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(mapped, "ROWS", rows_at_a_time)
    rows = write(tmp_path / "index.parquet")
    for split in ("train", "val"):
        wanted = [row for row in rows if row["split"] == split]
        found = sa1b.load_index(tmp_path / "index.parquet", split)
        assert found.select_columns(list(sa1b.COLUMNS)).to_list() == wanted
        few = sa1b.load_index(tmp_path / "index.parquet", split, limit=20)
        assert few["key"] == [row["key"] for row in wanted[:20]]
        assert found["key_code"] == [xxhash.xxh3_64_intdigest(row["key"].encode()) for row in wanted]
        keys = [f"{row['key']}@{row['image_digest']}" for row in wanted]
        assert found["store_code"] == [xxhash.xxh3_64_intdigest(key.encode()) for key in keys]
        assert store_keys(found, tied=True) == keys
    both = sa1b.load_index(tmp_path / "index.parquet")
    assert both["key"] == [row["key"] for row in sorted(rows, key=lambda row: row["split"])]
    assert both.data.nbytes and all("Mapped" in type(block).__name__ for line in both.data.blocks for block in line)
    assert pickle.loads(pickle.dumps(both))[7] == both[7]


def test_another_index_of_that_name_is_read_and_old_copies_go(tmp_path):
    path = tmp_path / "index.parquet"
    write(path)
    old = sa1b.load_index(path, "train")
    write(tmp_path / "index.more.parquet", 5)
    sa1b.load_index(tmp_path / "index.more.parquet")
    before = copies(tmp_path)
    assert len(before) == 4
    rows = write(path, first=1000)
    assert sa1b.load_index(path, "train")[0]["key"] == rows[0]["key"]
    assert len(copies(tmp_path)) == 4 and len(copies(tmp_path) & before) == 2  # those of index.more are still there
    assert old[0]["key"] == "sa_000000"  # what a run has mapped stays


def test_a_folder_that_cannot_be_written_stays_as_it_is(tmp_path, monkeypatch):
    """As root every folder can be written; the answer of `access` is all that tells."""
    rows = write(tmp_path / "index.parquet")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for _ in range(2):
        found = sa1b.load_index(tmp_path / "index.parquet", "train")
        assert found["key"] == [row["key"] for row in rows if row["split"] == "train"]
        monkeypatch.setattr(mapped, "_make", None)  # the second time they are there
    assert [path.name for path in tmp_path.iterdir()] == ["index.parquet"]


def test_a_full_disk_is_not_called_a_damaged_index(tmp_path, monkeypatch):
    write(tmp_path / "index.parquet")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapped, "hashes_of", full)
    with pytest.raises(OSError, match="No space left") as error:
        sa1b.load_index(tmp_path / "index.parquet")
    assert not isinstance(error.value, UserError) and [one.name for one in tmp_path.iterdir()] == ["index.parquet"]


def _open(path: Path, barrier, answers) -> None:
    made, make = [], mapped._make
    mapped._make = lambda *arguments: made.append(1) or make(*arguments)
    barrier.wait()
    answers.put((sa1b.load_index(path, "train")["key"][:], len(made)))


@pytest.mark.parametrize("locks", [True, False])
def test_many_processes_may_open_it_at_once(tmp_path, monkeypatch, locks):
    """One makes the copies and the others wait; on a disk without locks several may make them."""
    if not locks:
        monkeypatch.setattr(mapped.fcntl, "LOCK_EX", -1)  # which the kernel refuses
    rows = write(tmp_path / "index.parquet", 3000)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open, args=(tmp_path / "index.parquet", barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    wanted = [row["key"] for row in rows if row["split"] == "train"]
    found = [answers.get(timeout=60) for _ in processes]
    assert [keys == wanted for keys, _ in found] == [True] * 4
    assert sum(made for _, made in found) == 1 or not locks
    for process in processes:
        process.join()
    assert len(list(tmp_path.iterdir())) == 3  # nothing half written


# ---- with a store


def store_of(root: Path, rows: list[dict], tied: bool = True) -> StoreReader:
    keys = store_keys({name: [row[name] for row in rows] for name in ("key", "image_digest")}, tied)
    create_store(root, [Field("features", "int32", (1,))], {INPUTS: "digests"} if tied else {})
    with StoreWriter(root, 0) as out:
        for row, key in zip(rows, keys, strict=True):
            out.write(key, {"features": np.array([row["width"]], np.int32)})
    finish_store(root, keys)
    return StoreReader(root)


@pytest.mark.parametrize("tied", [True, False])
def test_every_image_finds_its_record_and_nothing_is_as_long_as_the_index(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(features, "BLOCK", 64)
    rows = write(tmp_path / "index.parquet")
    store = store_of(tmp_path / "store", rows[::-1], tied)
    images = ImageFeatures(sa1b.load_index(tmp_path / "index.parquet", "train"), tmp_path, 8, "square", store)
    assert not [name for name, value in vars(images).items() if isinstance(value, list | np.ndarray)]
    positions = [5, 449, 0, 5, -1]
    batch = images.__getitems__(positions)  # none of the photographs is there, their features are
    train = [row for row in rows if row["split"] == "train"]
    assert batch["features"][:, 0].tolist() == [train[max(position, 0)]["width"] for position in positions]
    assert images.record_keys(range(len(images))) == store_keys(images.index, tied)
    assert images.names([1]) == ["sa_000001"]
    assert images.sample(30) == statistics_sample(list(images.keys), 30)
    assert sorted(images.sample(10_000)) == list(range(450))


@pytest.mark.parametrize("tied", [True, False])
def test_images_without_features_are_named_and_skipped_ones_left_out(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(features, "BLOCK", 64)
    rows = write(tmp_path / "index.parquet")
    gone = [rows[0], rows[200], rows[201], rows[499]]
    store = store_of(tmp_path / "store", [row for row in rows if row not in gone], tied)
    index = sa1b.load_index(tmp_path / "index.parquet", "train")
    with pytest.raises(StoreError, match="lacks 4 of 450 keys: sa_000000.*, sa_000200.*, sa_000201.*, sa_000499"):
        ImageFeatures(index, tmp_path, 8, "square", store)
    names = store_keys({name: [row[name] for row in gone] for name in ("key", "image_digest")}, tied)
    left = without(index, [*names, "another"], tied)
    assert left["key"] == [row["key"] for row in rows if row["split"] == "train" and row not in gone]
    assert len(ImageFeatures(left, tmp_path, 8, "square", store)) == 446
    assert len(without(left, store_keys(left, tied), tied)) == 0


def test_a_store_that_was_finished_for_these_images_knows_it(tmp_path, monkeypatch):
    rows = write(tmp_path / "index.parquet")
    skipped = rows[7]
    parts = [[row for row in rows if row["split"] == split] for split in ("train", "val")]
    store_of(tmp_path / "store", [row for row in rows if row is not skipped])
    keys = store_keys({name: [row[name] for part in parts for row in part] for name in ("key", "image_digest")}, True)
    with StoreWriter(tmp_path / "store", 0) as out:
        out.skip(keys[6], "as a test")
    finish_store(tmp_path / "store", keys, parts=list(map(len, parts)))
    store = StoreReader(tmp_path / "store")
    looked = []
    monkeypatch.setattr(store, "absent", lambda codes: looked.append(len(codes)) or codes[:0])
    for split, part in zip(("train", "val"), parts, strict=True):
        index = without(sa1b.load_index(tmp_path / "index.parquet", split), keys[6:7], tied=True)
        assert len(index) == len(part) - (skipped in part)
        ImageFeatures(index, tmp_path, 8, "square", store)
    assert not looked
    ImageFeatures(index.select(range(30)), tmp_path, 8, "square", store)  # of others it looks for every key
    assert looked == [30]


def _grown(path: Path, store: Path, answers) -> None:
    before = _own_memory()
    images = ImageFeatures(sa1b.load_index(path, "train"), path.parent, 8, "square", StoreReader(store))
    images.__getitems__([5, 7])
    answers.put(_own_memory() - before)


def _own_memory() -> int:
    """Bytes of this process that it shares with no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    context = multiprocessing.get_context("fork")
    grown = {}
    for count in (2_000, 60_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        store_of(folder / "store", write(folder / "index.parquet", count))
        sa1b.load_index(folder / "index.parquet")
        answers = context.Queue()
        process = context.Process(target=_grown, args=(folder / "index.parquet", folder / "store", answers))
        process.start()
        grown[count] = answers.get(timeout=60)
        process.join()
    table = parquet.read_table(tmp_path / "60000/index.parquet")
    assert grown[60_000] - grown[2_000] < table.nbytes / 4  # what one copy of the rows takes


def test_copies_are_made_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Whatever the number of rows; pyarrow would keep all it has read."""
    monkeypatch.setattr(mapped, "ROWS", 500)
    path = tmp_path / "index.parquet"
    write(path, 20_000)
    parquet.write_table(parquet.read_table(path), path, row_group_size=500, compression="none", use_dictionary=False)
    start, taken, hashes = pyarrow.total_allocated_bytes(), [], mapped.hashes_of

    def watched(keys):
        taken.append(pyarrow.total_allocated_bytes() - start)
        return hashes(keys)

    monkeypatch.setattr(mapped, "hashes_of", watched)
    assert len(sa1b.load_index(path, "train")) == 18_000
    assert len(taken) == 2 * 40 and max(taken) < path.stat().st_size / 4
