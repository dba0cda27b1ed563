# SPDX-License-Identifier: Apache-2.0
"""Where each key of a store is, found among millions without reading them: a file that all processes map.

    keys-<stamp>.index    uint64 (3, N): hashes of the keys, ascending; their positions; checks

A check is a second hash, of a key with its position. So a candidate is another key, or damaged, unless both fit: two
keys that share 128 bits of hashes do not happen. The stamp is of the shards that it was made from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from effsam3.data.store.format import Manifest, Shard, journal_column
from effsam3.files import write_bytes

if TYPE_CHECKING:
    import pyarrow

VERSION = 1  # of the file; another number makes older ones void
BLOCK = 1 << 16  # keys that are Python objects at a time
LATEST = 1 << 18  # hashes that are


class KeyIndex:
    """Positions by key."""

    def __init__(self, table_3N: np.ndarray):
        self._table_3N = table_3N
        self.hashes, self._positions, self._checks = table_3N

    @classmethod
    def of(cls, keys: Iterable[list[bytes]], count: int) -> KeyIndex:
        """Make one of `count` keys, which come a few at a time in order of their positions; 40 bytes a key."""
        hashes, positions, checks = table_3N = np.empty((3, count), np.uint64)
        start = 0
        for some in keys:
            places = range(start, start + len(some))
            hashes[start : places.stop] = hashes_of(some)
            checks[start : places.stop] = _checks(some, places)
            start = places.stop
        assert start == count, (start, count)
        order_N = np.argsort(hashes)
        positions[:] = order_N
        for row_N in (hashes, checks):
            row_N[:] = row_N[order_N]
        return cls(table_3N)

    @classmethod
    def open(cls, root: Path, shards: Sequence[Shard], count: int) -> KeyIndex | None:
        """Map the file that was written of these shards and `count` keys; None where there is none."""
        file = _file(root, shards)
        if file is None or not count or not file.is_file() or file.stat().st_size != 24 * count:
            return None
        return cls(np.memmap(file, np.uint64, "r", shape=(3, count)).view(np.ndarray))

    def write(self, root: Path, shards: Sequence[Shard]) -> None:
        """Write the file, in place of any other."""
        remove(root)
        file = _file(root, shards)
        if len(self) and file is not None:
            write_bytes(file, self._table_3N.data.cast("B"))

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, key: str) -> bool:
        return bool(self.find([key])[0] >= 0)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return positions, int64, -1 where absent."""
        encoded = [key.encode() for key in keys]
        wanted, found = hashes_of(encoded), np.full(len(keys), -1)
        asked = np.argsort(wanted)  # neighbours lie together, which caches like
        places = np.searchsorted(self.hashes, wanted[asked])
        while len(asked := asked[places < len(self)]):
            places = places[places < len(self)]
            equal = self.hashes[places] == wanted[asked]
            asked, places = asked[equal], places[equal]
            positions = self._positions[places]
            right = self._checks[places] == _checks((encoded[one] for one in asked), positions.tolist())
            found[asked[right]] = positions[right]
            # Other keys may have the same hash: they follow each other.
            asked, places = asked[~right], places[~right] + 1
        return found

    def distinct(self, keys: Iterable[list[bytes]]) -> int:
        """Return how many of the keys that it was made of are different; `keys` are these again."""
        same, alike_N = self.hashes[1:] == self.hashes[:-1], np.zeros(len(self), bool)
        alike_N[1:] = same
        alike_N[:-1] |= same
        alike = np.sort(self._positions[alike_N])
        found, start = set(), 0
        for some in keys if len(alike) else ():
            first, last = np.searchsorted(alike, (start, start + len(some)))
            found |= {some[place - start] for place in alike[first:last].tolist()}
            start += len(some)
        return len(self) - len(alike) + len(found)

    def absent(self, hashes: np.ndarray) -> np.ndarray:
        """Return those of the hashes that no key has, ascending: millions are looked up without making their keys."""
        ordered = np.sort(hashes)
        return ordered[~among(self.hashes, ordered)]


class Hashes:
    """A set of keys that grows, 8 bytes each. Keys that share a hash are taken for one."""

    def __init__(self):
        self._sorted = np.empty(0, np.uint64)
        self._latest: set[int] = set()  # a number in a set takes as much as ten in an array

    def __len__(self) -> int:
        return len(self._sorted) + len(self._latest)

    def __contains__(self, key: str) -> bool:
        codes = hashes_of([key.encode()])
        return int(codes[0]) in self._latest or bool(among(self._sorted, codes)[0])

    def add(self, key: str) -> None:
        """Add a key that is not in it."""
        self._latest.add(int(hashes_of([key.encode()])[0]))
        if len(self._latest) == LATEST:
            self._sorted = np.sort(np.concatenate([self._sorted, np.fromiter(self._latest, np.uint64)]))
            self._latest = set()


def among(ordered: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return which of the hashes are among those that are `ordered`, bool."""
    places = np.searchsorted(ordered, hashes)
    known = np.zeros(len(hashes), bool)
    inside = places < len(ordered)
    known[inside] = ordered[places[inside]] == hashes[inside]
    return known


def remove(root: Path) -> None:
    """Remove what was written: the store is going to grow, or to be written again in another order."""
    for file in root.glob("keys-*.index"):
        file.unlink(missing_ok=True)


def hashes_of(keys: Sequence[bytes]) -> np.ndarray:
    """Return the hash of every key, uint64."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, keys), np.uint64, len(keys))


def sum_of(blocks: Iterable[np.ndarray]) -> tuple[str, int]:
    """Return the sum of keys' hashes, 16 hex digits, and how many they are: the same in any order of them."""
    total, count = 0, 0
    for hashes in blocks:
        total, count = total + int(hashes.sum(dtype=np.uint64)), count + len(hashes)
    return f"{total % 2**64:016x}", count


def _checks(keys: Iterable[bytes], positions: Sequence[int]) -> np.ndarray:
    # With the position as the seed, 0 being that of the hash itself.
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(key, place + 1) for key, place in zip(keys, positions, strict=True)),
        np.uint64,
        len(positions),
    )


def blocks(length: int) -> Iterator[range]:
    """Divide places 0 to `length` - 1 into stretches whose keys may be in memory together."""
    return (range(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def stored_keys(root: Path, manifest: Manifest, shards: Iterable[Shard]) -> Iterator[list[bytes]]:
    """Yield the keys of all shards in order, those of a shard at a time or fewer."""
    for shard in shards:
        yield from key_blocks(journal_column(root, manifest, [shard], "key"))


def key_blocks(keys: pyarrow.Array) -> Iterator[list[bytes]]:
    """Yield keys a few at a time."""
    return (keys.slice(start, BLOCK).cast("binary").to_pylist() for start in range(0, len(keys), BLOCK))


def _file(root: Path, shards: Sequence[Shard]) -> Path | None:
    """Return the name that goes with the shards and the sizes of their journals; None where one is missing."""
    try:
        made_of = VERSION, [(shard, os.stat(root / shard.keys).st_size) for shard in shards]
    except OSError:
        return None  # whoever reads the journals names it
    return root / f"keys-{xxhash.xxh3_64_hexdigest(repr(made_of).encode())}.index"
