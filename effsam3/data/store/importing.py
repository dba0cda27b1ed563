# SPDX-License-Identifier: Apache-2.0
"""Makes upstream's exported embeddings readable as a store without copying them.

Upstream's exporter leaves two files per process, without header or checksum:

    rank{r}-keys.txt      one key per line, written only when the export ends normally
    rank{r}-values.bin    a record per key: int32 seed, then float16 values in C order
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from effsam3.data.store.format import (
    Field,
    Manifest,
    Shard,
    StoreError,
    check_sizes,
    open_manifest,
    untied,
    whole_lines,
    write_manifest,
)
from effsam3.data.store.reader import StoreReader
from effsam3.files import refuse_unwritable

SEED_BYTES = 4  # an augmentation seed before each record; no augmentation of upstream's uses it
KNOWN_FIELDS = (  # what upstream's recipes export
    Field("features", "float16", (1024, 72, 72)),
    Field("features", "float16", (256, 72, 72)),
    Field("features", "float16", (256, 64, 64)),
    Field("tokens", "float16", (32, 256)),
    Field("tokens", "float16", (16, 256)),
)
STATISTICS_RECORDS = 64
# As upstream's exporter prepares images, which is not what SAM 3 sees in use.
PREPROCESSING = {"image_size": 1008, "resize": "longest_side", "normalisation": "imagenet"}
PREPROCESSING_WARNING = (
    "warning: these features were made from ImageNet-normalised images, while SAM 3 sees pixels / 255 with mean 0.5 "
    "and std 0.5 at inference; a student learns a teacher that looks at other images. Prefer `effsam3 embed`"
)


def import_upstream(
    source: str | Path, root: str | Path, field: Field | None = None, report: Callable[[str], object] = print
) -> Manifest:
    """Write a manifest into `root` that refers to the files in `source`, which must stay where they are.

    Args:
        source: folder with rank{r}-keys.txt and rank{r}-values.bin.
        field: what follows the seed in a record; None recognises the shapes of upstream's recipes by their size.
        report: gets a line for each thing to know: ignored tails, repeated keys, other preprocessing.

    Raises:
        StoreError: no such files, fewer records than keys, records without keys (a killed export), unknown record
            size, values that are not finite, or `root` already holds a store.
    """
    source, root = Path(source).resolve(), Path(root)
    if (root / "manifest.json").exists() and open_manifest(root).finished:
        raise StoreError(f"{root} already holds a store: import into another folder")
    # Rank 2 before rank 10, so that of repeated keys the same one is always the first.
    values = sorted(source.glob("rank*-values.bin"), key=lambda path: (len(path.name), path.name))
    if not values:
        raise StoreError(f"{source} holds no rank*-values.bin: give the folder that upstream's exporter wrote")
    counts = {path: _count_keys(path) for path in values}
    field = field or _recognise(counts)
    shards = tuple(filter(None, (_shard(path, count, field, report) for path, count in counts.items())))
    if not shards:
        raise StoreError(f"{source} holds no records: all its rank*-values.bin are empty")
    refuse_unwritable(root, "PATH (of the new store)")
    facts: dict[str, Any] = {"kind": "text", "source": "upstream"}
    if len(field.shape) == 3:
        tap = "trunk" if field.shape[0] == 1024 else "neck"
        facts = {"kind": "image", "source": "upstream", "tap": tap, "channels": field.shape[0], "grid": field.shape[1]}
        facts |= PREPROCESSING
        report(PREPROCESSING_WARNING)
    facts |= {"payload": field.dtype, "teacher": {"checkpoint": "unknown, upstream does not record it"}}
    report(f"note: {untied(root)}")
    # Unfinished at first: only a reader can tell how many keys are distinct, and it takes a manifest.
    manifest = Manifest((field,), facts, shards=shards)
    check_sizes(root, manifest, shards)
    root.mkdir(parents=True, exist_ok=True)
    write_manifest(root, manifest)
    reader = StoreReader(root, allow_unfinished=True)
    if repeated := sum(shard.records for shard in shards) - len(reader):
        report(
            f"{repeated} records repeat a key (upstream's sampler pads ranks to equal length): the first one counts"
        )
    manifest = replace(manifest, expected=len(reader), records=len(reader), statistics=_statistics(reader, field))
    write_manifest(root, manifest)
    return manifest


def _keys_of(values: Path) -> Path:
    return values.with_name(values.name.replace("-values.bin", "-keys.txt"))


def _count_keys(values: Path) -> int:
    path = _keys_of(values)
    if not path.exists():
        raise StoreError(
            f"{values} has no {path.name} next to it: copy that too, without keys the records are useless"
        )
    return whole_lines(path).count(b"\n")


def _recognise(counts: dict[Path, int]) -> Field:
    for field in KNOWN_FIELDS:
        if any(count and path.stat().st_size == count * (SEED_BYTES + field.nbytes) for path, count in counts.items()):
            return field
    sizes = ", ".join(f"{path.name}: {path.stat().st_size} bytes, {count} keys" for path, count in counts.items())
    raise StoreError(
        f"no file has the size of a known upstream export ({sizes}); describe a record with --channels and "
        "--grid. No keys next to a large file mean that the export was killed: upstream writes keys only at the end"
    )


def _shard(path: Path, count: int, field: Field, report: Callable[[str], object]) -> Shard | None:
    stride = SEED_BYTES + field.nbytes
    records, tail = divmod(path.stat().st_size, stride)
    found = f"{path}: {records} whole records of {stride} bytes ({field}) and {tail} bytes more, {count} keys"
    if count > records:
        raise StoreError(f"{found}: the file is cut, or its records are of another size (--channels, --grid)")
    if records and not count:
        raise StoreError(
            f"{found}: this export was killed, and without keys its records belong to nobody; embed again"
        )
    if records > count or tail:
        report(f"{found}: what lies beyond the last key is ignored")
    return Shard(str(path), str(_keys_of(path)), count, stride, SEED_BYTES, journal=False) if count else None


def _statistics(reader: StoreReader, field: Field) -> dict | None:
    """Per-channel mean and deviation of evenly spread records, padding of letterboxed images included."""
    if len(field.shape) != 3:
        return None
    import torch

    from effsam3.data.statistics import FeatureStatistics

    statistics = FeatureStatistics(field.shape[0])
    valid_11HW = torch.ones(1, 1, *field.shape[1:])
    for position in np.unique(np.linspace(0, len(reader) - 1, STATISTICS_RECORDS).astype(np.int64)):
        feat_1CHW = reader.read([position])[field.name]
        if not feat_1CHW.isfinite().all():
            raise StoreError(
                f"record {reader.arrow_keys[position]} holds values that are not finite: its export overflowed "
                "float16, or the record is of another size (--channels, --grid)"
            )
        statistics.update(feat_1CHW, valid_11HW)
    return statistics.result()
