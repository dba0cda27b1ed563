# SPDX-License-Identifier: Apache-2.0
"""Reading and verifying a store, and the numbers in which features are kept."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from effsam3.data.store.format import (
    Shard,
    StoreError,
    check_sizes,
    journal_column,
    list_shards,
    open_manifest,
    remedy,
    shards_on_disk,
)
from effsam3.data.store.key_index import KeyIndex, among, hashes_of, key_blocks

if TYPE_CHECKING:
    import pyarrow
    import torch

FLOAT16_MAX = 65504.0
LOOKED_UP = ("_index", "_names")  # what a reader finds out when it is asked
OPEN_FILES = 512  # per reader; the usual limit is 1024 per process


# ---- read


class _OpenFile:
    """A file descriptor that closes with its last user, so a reader thread never loses the one it reads from."""

    def __init__(self, path: Path):
        # A bare descriptor, because `preadv` takes its offset along: threads share no position.
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        close(self.fd)


class StoreReader:
    """All shards as one table of records; safe in threads, in forked data workers and across pickling.

    Raises StoreError when the store is missing, unfinished (unless allowed), truncated, or its manifest is wrong.
    """

    def __init__(self, root: str | Path, allow_unfinished: bool = False):
        self.root = Path(root)
        self.manifest = manifest = open_manifest(root)
        self._shards = list_shards(self.root, manifest)
        if allow_unfinished and all(shard.journal for shard in self._shards):
            self._shards = shards_on_disk(self.root, manifest)  # a finished store may be growing
        # Where a key that two shards hold (upstream repeats images) comes first; None: there is no such key.
        self._rows: np.ndarray | None = None
        index = KeyIndex.open(self.root, self._shards, manifest.records or 0)
        if index is not None:
            # Of a finished store no key is read: where each of them is stands in a file.
            self._index, self._length = index, len(index)
        else:
            keys = journal_column(self.root, manifest, self._shards, "key")
            if not (manifest.finished or allow_unfinished):
                total = "" if manifest.expected is None else f" of {manifest.expected}"
                raise StoreError(
                    f"{root} is unfinished: {len(keys)}{total} records; run `effsam3 embed` again, it only writes the "
                    "rest"
                )
            if len(keys) != manifest.records:
                codes = keys.dictionary_encode().indices.to_numpy()
                self._rows = np.sort(np.unique(codes, return_index=True)[1])
                keys = keys.take(self._rows)
            self.arrow_keys, self._length = keys, len(keys)
        check_sizes(self.root, manifest, self._shards)
        records = np.array([shard.records for shard in self._shards], np.int64)
        self._first = np.cumsum(records) - records  # row at which each shard begins
        self._stride = np.array([shard.stride for shard in self._shards], np.int64)
        self._offset = np.array([shard.offset for shard in self._shards], np.int64)
        self._files: dict[int, _OpenFile] = {}

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict:
        # Data workers are forked or pickled: each opens its own files, so that no file position is shared.
        return {name: value for name, value in self.__dict__.items() if name not in LOOKED_UP} | {"_files": {}}

    @functools.cached_property
    def arrow_keys(self) -> pyarrow.Array:
        """Key of every position, read when asked for."""
        return journal_column(self.root, self.manifest, self._shards, "key")

    @property
    def keys(self) -> list[str]:
        """Key of every position; made on each call (a tenth of a second per million), `arrow_keys` costs nothing."""
        return self.arrow_keys.to_pylist()

    @property
    def names(self) -> list[str]:
        """Names of the fields of a record."""
        return [f.name for f in self.manifest.fields]

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return those of the keys that are not stored, in order."""
        return [key for key, place in zip(keys, self.find(keys), strict=True) if place < 0]

    def positions(self, keys: Sequence[str]) -> np.ndarray:
        """Position of every key, int64; StoreError naming the keys that are not stored, and those replaced since."""
        found = self.find(keys)
        if (found < 0).any():
            raise self.lacking([keys[place] for place in np.flatnonzero(found < 0).tolist()], len(keys))
        return found

    def lacking(self, missing: Sequence[str], total: int) -> StoreError:
        """Return the error that names keys which are not stored, of this many that were asked for."""
        replaced = self.replaced(missing)
        said = f"{self.root} lacks {len(missing)} of {total} keys: {_first(missing)}. "
        if replaced:
            said += (
                f"Of {len(replaced)} of them it has features of other bytes under the same name (replaced since "
                f"it was made): {_first(replaced)}. "
            )
        return StoreError(said + "Run `effsam3 embed` for this data: it writes only what is missing")

    def replaced(self, missing: Sequence[str]) -> list[str]:
        """Return names of those of the keys, none of which is stored, under whose names other bytes are."""
        if not (self.manifest.ties_inputs and missing):
            return []
        names = list(map(name_of, missing))
        stored = among(self._names, hashes_of([name.encode() for name in names])).tolist()
        return [name for name, there in zip(names, stored, strict=True) if there and name]

    @functools.cached_property
    def _names(self) -> np.ndarray:
        """Hashes of the names in all keys, ascending."""
        codes = [hashes_of([key.rpartition(b"@")[0] for key in some]) for some in key_blocks(self.arrow_keys)]
        return np.sort(np.concatenate([np.empty(0, np.uint64), *codes]))

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return positions, int64, -1 where absent."""
        return self._index.find(keys)

    def absent(self, hashes: np.ndarray) -> np.ndarray:
        """Return those of the hashes, of `key_index.hashes_of`, that no stored key has, ascending."""
        return self._index.absent(hashes)

    @functools.cached_property
    def _index(self) -> KeyIndex:
        mapped = KeyIndex.open(self.root, self._shards, self.manifest.records or 0)
        return KeyIndex.of(key_blocks(self.arrow_keys), len(self)) if mapped is None else mapped

    def read(self, positions: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Field name -> CPU tensor [N, *shape]. Raises StoreError naming a truncated shard."""
        import torch

        from effsam3.data.loader import new_batch

        rows = np.asarray(positions, np.int64)
        assert not len(rows) or (rows.min() >= 0 and rows.max() < len(self))
        if self._rows is not None:
            rows = self._rows[rows]
        # The kernel writes records straight into the batch: no copy, no stack, no conversion on the CPU.
        out = {f.name: new_batch(len(rows), *f.shape, dtype=getattr(torch, f.dtype)) for f in self.manifest.fields}
        views = [(out[f.name].view(-1).view(torch.uint8).numpy().data, f.nbytes) for f in self.manifest.fields]
        # A row is in the last shard that begins at or before it.
        shards = np.searchsorted(self._first, rows, "right") - 1
        offsets = (rows - self._first[shards]) * self._stride[shards] + self._offset[shards]
        payload = self.manifest.payload
        for i, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            buffers = [view[i * nbytes : (i + 1) * nbytes] for view, nbytes in views]
            file = self._files.get(shard) or self._open(shard)
            if (count := os.preadv(file.fd, buffers, offset)) < payload:
                raise StoreError(
                    f"truncated shard {self.root / self._shards[shard].file}: has {offset + count} of at least "
                    f"{offset + payload} bytes; {remedy(self._shards[shard])}"
                )
        return out

    def _open(self, shard: int) -> _OpenFile:
        # Large stores have more shards than a process may open; the oldest goes first.
        if len(self._files) >= OPEN_FILES:
            self._files.pop(next(iter(self._files)), None)
        self._files[shard] = file = _OpenFile(self.root / self._shards[shard].file)
        return file


def name_of(key: str) -> str:
    """Whose record a key `name@digest` is of."""
    return key.rpartition("@")[0]


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# ---- verify


class BadRecord(NamedTuple):
    """A record that cannot be trusted."""

    key: str
    shard: Shard
    reason: str


@dataclass
class VerifyReport:
    """What `verify_store` found; `unchecked` records are whole but come from imported shards without checksums."""

    checked: int = 0
    unchecked: int = 0
    bad: list[BadRecord] = field(default_factory=list)


def verify_store(root: str | Path, progress: Callable[[int], object] = lambda count: None) -> VerifyReport:
    """Read every record, also of an unfinished store; `progress` gets the number of records just done.

    Raises StoreError where manifest or journals cannot be read.
    """
    root = Path(root)
    manifest = open_manifest(root)
    report = VerifyReport()
    buffer = memoryview(bytearray(manifest.payload))
    for shard in list_shards(root, manifest):
        keys = journal_column(root, manifest, [shard], "key").to_pylist()
        checksums = journal_column(root, manifest, [shard], "checksum").to_pylist() if shard.journal else None
        file = _OpenFile(root / shard.file) if (root / shard.file).is_file() else None
        last = 0 if file is None else os.fstat(file.fd).st_size - manifest.payload  # where a whole record may begin
        for i, key in enumerate(keys):
            start = i * shard.stride + shard.offset
            if file is None:
                report.bad.append(BadRecord(key, shard, "shard is missing"))
            elif not 0 <= start <= last or os.preadv(file.fd, [buffer], start) < manifest.payload:
                report.bad.append(BadRecord(key, shard, "shard is truncated"))
            elif checksums is None:
                report.unchecked += 1
            elif checksums[i] != xxhash.xxh3_64_hexdigest(buffer):
                report.bad.append(BadRecord(key, shard, "wrong checksum"))
            else:
                report.checked += 1
            progress(1)
    return report


# ---- payloads


def to_float16(features: torch.Tensor, key: str) -> torch.Tensor:
    """Return features of one sample as float16; StoreError where a value is not finite or beyond 65504."""
    import torch

    peak = _peak(features, key).max().item()
    if peak > FLOAT16_MAX:
        raise StoreError(
            f"record {key!r}: a feature of magnitude {peak:g} does not fit float16 (at most {FLOAT16_MAX:g}); "
            "set embed.dtype: int8"
        )
    return features.to(torch.float16)


def quantise_int8(features: torch.Tensor, key: str = "?") -> tuple[torch.Tensor, torch.Tensor]:
    """[..., C, H, W] -> int8 of the same shape and float32 scale [..., C], symmetric per channel.

    The scale is the channel's largest magnitude / 127 (1 for an all-zero channel), so no value moves by more than
    half of it. Raises StoreError where a value is not finite.
    """
    import torch

    scale = _peak(features, key) / 127
    # A dead channel would divide by zero and become NaN.
    scale = torch.where(scale > 0, scale, 1.0)
    steps = features.float() / scale[..., None, None]
    return steps.round_().clamp_(-127, 127).to(torch.int8), scale


def dequantise_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [..., C, H, W] and float32 scale [..., C] -> float32 features, on the device of both."""
    return values * scale[..., None, None]


def _peak(features: torch.Tensor, key: str) -> torch.Tensor:
    """Largest magnitude over the last two axes, float32."""
    # Per channel: their magnitudes differ, and one scale for all would drown the small ones.
    peak = features.abs().amax((-2, -1)).float()
    if not peak.isfinite().all():
        raise StoreError(f"record {key!r}: the features are not finite (NaN or infinity); check the teacher's weights")
    return peak
