# SPDX-License-Identifier: Apache-2.0
"""Writing an embedding store: repair after a kill, writers, finish (why it is safe: see the package)."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from effsam3.data.store.format import (
    Field,
    Manifest,
    StoreError,
    check_sizes,
    journal_lines,
    open_manifest,
    shards_on_disk,
    storable,
    whole_lines,
    write_manifest,
)
from effsam3.data.store.key_index import BLOCK, Hashes, KeyIndex, hashes_of, remove, stored_keys, sum_of
from effsam3.files import free_bytes, sync

SHARD_BYTES = 4 << 30
SYNC_BYTES = 256 << 20
JOURNAL_LINE = re.compile(rb"[^\t\r\n\0]+\t([0-9a-f]{16})")


# ---- one live process per writer

_held_locks: set[int] = set()


def _release_in_child() -> None:
    # A forked data worker outlives its killed parent by seconds; it must not keep the parent's writer locked.
    while _held_locks:
        os.close(_held_locks.pop())


os.register_at_fork(after_in_child=_release_in_child)


def _lock(root: Path, writer: int) -> int:
    fd = os.open(root / f"writer-{writer:05d}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A lock of the kernel, because it ends with its process: a file with a pid would survive a kill.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise StoreError(f"{root}: writer {writer} is a live process; wait for it, or stop it") from error
    _held_locks.add(fd)
    return fd


def _unlock(fd: int) -> None:
    _held_locks.remove(fd)
    os.close(fd)


# ---- repair


def repair_store(root: str | Path) -> dict[str, int]:
    """Cut every torn tail; one process calls this after create_store and before any writer opens.

    Returns {shard: number of journalled records cut with it}; they count as not embedded.
    Raises StoreError while a writer is alive.
    """
    root = Path(root)
    manifest = open_manifest(root)
    shards: dict[int, list[Path]] = {}
    for path in sorted(root.glob("shard-*.bin")):
        # Grouped by writer: only a writer's last shard can be torn.
        shards.setdefault(int(path.name.split("-")[1]), []).append(path)
    dropped = {}
    for writer, paths in shards.items():
        lock = _lock(root, writer)
        for path in paths:
            if count := _repair_shard(path, manifest, last=path == paths[-1]):
                dropped[path.name] = count
        _unlock(lock)
    for path in root.glob("skipped-*.tsv"):
        os.truncate(path, len(whole_lines(path)))
    return dropped


def _repair_shard(path: Path, manifest: Manifest, last: bool) -> int:
    """Leave whole records with whole journal lines; return how many journalled records were cut."""
    payload, stride, header = manifest.payload, manifest.stride, f"{manifest.header}\n".encode()
    with open(path, "r+b", buffering=0) as shard, open(path.with_suffix(".tsv"), "a+b", buffering=0) as journal:
        lines = journal_lines(path.with_suffix(".tsv"), manifest).split(b"\n")[:-1]
        # A line without a whole payload, or a payload without a line, is what a kill leaves; both are dropped. The
        # last record may lack its padding.
        keep = min(len(lines), (os.fstat(shard.fileno()).st_size + stride - payload) // stride)
        if last:  # the others were synced before the next one began
            # A power cut may lose blocks in any order since the last sync, so as much is checked again by checksum.
            for i in range(max(0, keep - SYNC_BYTES // stride - 2), keep):
                line = JOURNAL_LINE.fullmatch(lines[i])
                content = os.pread(shard.fileno(), payload, i * stride)
                if not line or line[1].decode() != xxhash.xxh3_64_hexdigest(content):
                    keep = i
                    break
        size = len(header) + sum(len(line) + 1 for line in lines[:keep])
        if not whole_lines(path.with_suffix(".tsv")):  # new, or killed while it wrote the header
            journal.truncate(0)
            journal.write(header)
        # The journal first: a payload without a line does not exist, a line without a payload would be a lie.
        journal.truncate(size)
        shard.truncate(keep * stride)
        os.fsync(shard.fileno())
        os.fsync(journal.fileno())
    return len(lines) - keep


# ---- write


class StoreWriter:
    """Appends records to shards of its own; a context manager.

    `done` holds the keys that any writer had stored when this one was made, so that a caller embeds only what is not
    in it. Skipped keys are not in it: a resumed pass tries them again.
    Raises StoreError when a live process already is this writer.
    """

    def __init__(self, root: str | Path, writer: int, shard_bytes: int = SHARD_BYTES):
        self.root, self.writer, self.shard_bytes = Path(root), writer, shard_bytes
        self.manifest = open_manifest(root)
        self._lock = _lock(self.root, writer)
        # Before the first record: a shard that is made again has as many keys in another order.
        remove(self.root)
        # It goes on in its own last shard: a shard has one writer, so no two processes append to one file.
        own = sorted(self.root.glob(f"shard-{writer:05d}-*.bin"))
        self._open_shard(int(own[-1].stem.split("-")[2]) if own else 0)
        shards = shards_on_disk(self.root, self.manifest)
        self.done = KeyIndex.of(stored_keys(self.root, self.manifest, shards), sum(shard.records for shard in shards))
        self._made = Hashes()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, key: str, record: dict) -> None:
        """Store one record: field name -> numpy array or CPU tensor of exactly the manifest's shape and dtype.

        Raises StoreError on a wrong field, a key already stored, or a full disk (nothing stored is damaged by it).
        """
        _check_key(key)
        if key in self.done or (key in self._made and self._in_journals(key)):
            raise StoreError(f"key {key!r} is already stored in {self.root}: keys must be unique")
        if record.keys() != {field.name for field in self.manifest.fields}:
            raise StoreError(f"record {key!r} has fields {list(record)}; the manifest has {self.manifest.header[4:]}")
        # Checked before the first byte is written, so that a wrong record leaves no trace.
        views = [_as_bytes(record[field.name], field, key) for field in self.manifest.fields]
        checksum = xxhash.xxh3_64()
        for view in views:
            checksum.update(view)
        stride = self.manifest.stride
        try:
            # Shards of a few GiB can be copied, checked and repaired one by one.
            if self._count and (self._count + 1) * stride > self.shard_bytes:
                self._close_shard()
                self._open_shard(self._number + 1)
            offset = self._count * stride
            for view in views:
                # A write may be short, on a nearly full disk or beyond 2 GiB.
                while view.nbytes:
                    written = os.pwrite(self._payload, view, offset)
                    view, offset = view[written:], offset + written
            # Last: the line is what makes the record exist.
            _append(self._journal, f"{key}\t{checksum.hexdigest()}\n")
            self._made.add(key)
            self._count += 1
            self._unsynced += stride
            # Rarely, because each sync waits for the disk; never, and a power cut would cost hours of the teacher's
            # work.
            if self._unsynced >= SYNC_BYTES:
                self._sync()
        except OSError as error:
            raise self._disk_error(key, error) from error

    def _in_journals(self, key: str) -> bool:
        shards = shards_on_disk(self.root, self.manifest)
        return any(key.encode() in some for some in stored_keys(self.root, self.manifest, shards))

    def skip(self, key: str, reason: str) -> None:
        """Note that `key` cannot be embedded; the finished manifest names it."""
        _check_key(key)
        try:
            with open(self.root / f"skipped-{self.writer:05d}.tsv", "ab", buffering=0) as file:
                # One write of a whole line: a kill leaves all of it or a torn tail, which repair cuts.
                _append(file.fileno(), f"{key}\t{' '.join(reason.split())}\n")
        except OSError as error:
            raise self._disk_error(key, error) from error

    def close(self) -> None:
        """Make everything durable and let another process be this writer."""
        self._close_shard()
        _unlock(self._lock)

    def _open_shard(self, number: int) -> None:
        path = self.root / f"shard-{self.writer:05d}-{number:04d}.bin"
        self._path, self._number, self._unsynced = path, number, 0
        self._payload = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._journal = os.open(path.with_suffix(".tsv"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _repair_shard(path, self.manifest, last=True)  # also writes a new journal's header, and syncs what it leaves
        self._count = journal_lines(path.with_suffix(".tsv"), self.manifest).count(b"\n")
        sync(self.root)

    def _sync(self) -> None:
        os.fdatasync(self._payload)  # first, so that no durable journal line points at a payload that is not
        os.fdatasync(self._journal)
        self._unsynced = 0

    def _close_shard(self) -> None:
        self._sync()
        os.close(self._payload)
        os.close(self._journal)

    def _disk_error(self, key: str, error: OSError) -> StoreError:
        need = ""
        if self.manifest.expected is not None:
            missing = self.manifest.expected - len(self.done) - len(self._made)
            need = f" and {missing} records to come need {missing * self.manifest.stride / 2**30:.3g} GiB"
        free = free_bytes(self.root) / 2**30
        return StoreError(
            f"cannot store record {key!r} of {self.manifest.stride} bytes in {self._path}: {error.strerror} "
            f"({free:.3g} GiB are free{need}). What is stored is intact: make room and run the same command again, "
            "it continues from here"
        )


def _check_key(key: str) -> None:
    if not storable(key):
        raise StoreError(
            f"key {key!r} cannot be stored: keys are text without tabs, line breaks or control characters"
        )


def _as_bytes(value, field: Field, key: str) -> memoryview:
    array = np.asarray(value)
    if array.dtype != field.dtype or array.shape != field.shape:
        raise StoreError(
            f"record {key!r}: {field.name} is {array.dtype}{list(array.shape)}, the manifest wants {field}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _append(fd: int, line: str) -> None:
    data = line.encode()
    written = os.write(fd, data)
    if written < len(data):
        # Half a line would make the next one unreadable.
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- finish


def finish_store(
    root: str | Path, expected_keys: Iterable[str], statistics: dict | None = None, parts: Iterable[int] = ()
) -> Manifest:
    """Complete the manifest once every writer is closed; calling it again changes nothing.

    `statistics` are facts about the stored values, such as per-channel lists of floats; those that a store has stay.
    `parts` are the numbers of keys of the data sets that the expected ones come from, one after the other: a reader of
    one of these need not look for each of its keys.
    Raises StoreError naming expected keys that are neither stored nor skipped.
    """
    root = Path(root)
    manifest = open_manifest(root)
    shards = shards_on_disk(root, manifest)
    check_sizes(root, manifest, shards)
    index = KeyIndex.of(stored_keys(root, manifest, shards), sum(shard.records for shard in shards))
    records = index.distinct(stored_keys(root, manifest, shards))
    lines = [line for path in sorted(root.glob("skipped-*.tsv")) for line in whole_lines(path).decode().splitlines()]
    reasons = dict(line.split("\t", 1) for line in lines)
    expected, missing, first_missing = 0, 0, []
    skipped: list[dict[str, str]] = []

    def stored(part: Iterator[str]) -> Iterator[np.ndarray]:
        """Yield the hashes of those keys that are stored, and note the others."""
        nonlocal expected, missing
        while some := list(islice(part, BLOCK)):
            expected += len(some)
            there = index.find(some) >= 0
            for key in (some[place] for place in np.flatnonzero(~there).tolist()):
                # Skipped ones are accounted for; anything else means that a writer has not done its share.
                if key in reasons:
                    skipped.append({"key": key, "reason": reasons[key]})
                else:
                    missing += 1
                    first_missing.extend([key] if missing <= 5 else [])
            yield hashes_of([some[place].encode() for place in np.flatnonzero(there).tolist()])

    rest = iter(expected_keys)
    whole = dict(sum_of(stored(islice(rest, size))) for size in parts)
    sum_of(stored(rest))
    if missing:
        raise StoreError(
            f"{root}: {missing} of {expected} keys are neither stored nor skipped: {', '.join(first_missing)}"
            f"{', ...' if missing > 5 else ''}. Run the same command again: it writes only what is missing"
        )
    manifest = replace(
        manifest,
        expected=expected,
        records=records,
        skipped=tuple(skipped),
        # A store that grows keeps its first ones: a run that resumes has learned by them.
        statistics=manifest.statistics or statistics,
        whole=whole,
        shards=shards,
    )
    if len(index) == records:  # a key that two writers have is left to the reader
        # Before the manifest: whoever sees a finished store finds the index there.
        index.write(root, shards)
    write_manifest(root, manifest)
    return manifest
