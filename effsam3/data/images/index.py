# SPDX-License-Identifier: Apache-2.0
"""Build the parquet index of SA-1B (`sa1b.COLUMNS`) from folders or tars, and report what was left out and why.

The sources are listed first, then chunks of CHUNK_IMAGES images are checked in parallel (see indexing.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from effsam3.data import indexing
from effsam3.data.images import sa1b
from effsam3.data.images.decoding import CONVERSIONS, MAX_PIXELS, check_image, image_header
from effsam3.data.images.sa1b_folders import Entry, Listing, check_sources, list_sources
from effsam3.data.indexing import printable
from effsam3.data.splits import SPLITS, split_code, split_of
from effsam3.data.unreadable import UnreadableAnnotations, UnreadableImage
from effsam3.data.workers import worker_pool
from effsam3.errors import UserError

VERSION = 2  # of what a chunk holds; another number makes older chunks void
CHUNK_IMAGES = 250  # about 10 s of decoding SA-1B: what a kill can cost each worker
NAMED_CONVERSIONS = 100  # keys that a report names for each kind of conversion
CHUNK_COLUMNS = sa1b.COLUMNS | {  # what the report is made of
    "image_name": "string",
    "annotation_name": "string",
    "excluded": "string",  # reason, or ""
    "annotation_problem": "string",  # reason, or ""
    "detail": "string",  # of either, or ""
}


class Check(NamedTuple):
    """What an image must pass to be indexed."""

    decode: bool
    min_side: int  # pixels
    max_pixels: int
    val_fraction: float  # of what has no split yet: photographs of one's own, by their content


def build_index(
    sources: Iterable[str | Path],
    out: str | Path,
    val_fraction: float = 0.1,
    workers: int | None = None,
    check: str = "decode",
    min_side: int = 16,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
    own: bool = False,
) -> dict:
    """Write the index `out` (.parquet) and `<stem>.report.json` next to it; return the report.

    `check`: `decode` decodes every image to its end, `header` reads sizes only and so lets truncated images through.
    `min_side` is in pixels. `workers` defaults to one per core; with 1 all is done in this process. `own`: photographs
    of one's own, see photographs.py.
    The same sources give the same bytes, whatever the workers and the interruptions.
    Raises UserError for sources or values that cannot be used, when no image is usable, and when a worker was killed.
    """
    started = time.monotonic()
    places, out = [Path(source) for source in sources], Path(out)
    check_sources(places)
    indexing.refuse_options(out, val_fraction, check)
    if min_side < 1 or not 1 <= max_pixels <= MAX_PIXELS:
        raise UserError(f"--min-side {min_side} must be 1 or more, --max-pixels {max_pixels} 1 to {MAX_PIXELS}")

    folder = out.parent.resolve()
    options = Check(check == "decode", min_side, max_pixels, val_fraction if own else 0.0)
    with worker_pool(workers or os.cpu_count() or 1) as submit:
        listing = list_sources(places, folder, val_fraction, submit, own)
        chunks = [group[i : i + CHUNK_IMAGES] for group in listing.groups for i in range(0, len(group), CHUNK_IMAGES)]
        arguments = (folder, options)
        table = indexing.make_chunks(
            out, chunks, _make_rows, arguments, VERSION, CHUNK_COLUMNS, submit, "images", progress
        )
    if own:
        table = _without_copies(table, val_fraction)
    report = _report(table, listing) | {
        "check": check,
        "val_fraction": val_fraction,
        "own": own,
        "min_side": min_side,
        "max_pixels": max_pixels,
    }
    return indexing.write_index(out, table, sa1b.COLUMNS, report, "image", summary, places, started)


def summary(report: dict) -> str:
    """Return the report as a few lines to read, the first names of each kind included."""
    images = report["images"]
    lines = [
        f"{sum(images.values()):,} images ({images['train']:,} train, {images['val']:,} val), "
        f"{report['masks']:,} masks, {report['without_annotations']:,} images without annotations"
    ]
    if report["check"] == "header":
        lines.append("checked headers only: truncated images are still in; --check decode finds them")
    for title in ("converted", "excluded", "annotation_problems", "tars"):
        for reason, found in report[title].items():
            names = found["keys" if title == "converted" else "files"]
            lines.append(indexing.told(f"{title.replace('_', ' ')}: {reason}", found, names))
    return "\n".join(lines)


# ---- chunks


def _make_rows(entries: list[Entry], folder: Path, options: Check) -> list[dict]:
    return [_check(entry, folder, options) for entry in entries]


def _check(entry: Entry, folder: Path, options: Check) -> dict:
    """Return the row of an image, with the reasons why it or its annotations are left out."""
    image, annotation = entry.image, entry.annotation
    row: dict[str, Any] = {
        "key": entry.key,
        "split": entry.split,
        **image.place("image"),
        "annotation_file": None,
        "annotation_offset": 0,
        "annotation_bytes": 0,
        "num_masks": 0,
        "image_name": image.name,
        "annotation_name": annotation.name if annotation else "",
        "excluded": "",
        "annotation_problem": "",
        "detail": "",
    }
    try:
        data = indexing.read_file(row, folder, "image", UnreadableImage)
        row["image_digest"] = sa1b.digest_of(data)
        row["split"] = row["split"] or split_of(row["image_digest"], options.val_fraction)
        row["width"], row["height"], kinds = image_header(data, options.max_pixels, entry.key)
        if min(row["width"], row["height"]) < options.min_side:
            raise UnreadableImage(entry.key, "too_small")
        if options.decode:
            check_image(data, options.max_pixels, entry.key)
    except UnreadableImage as fault:
        return row | {"excluded": fault.reason, "detail": printable(fault.detail)}
    row["converted"] = ",".join(kinds)
    if annotation:
        place = annotation.place("annotation")
        try:
            row |= place | {"num_masks": len(sa1b.read_annotations(row | place, folder))}
        except UnreadableAnnotations as fault:
            row |= {"annotation_problem": fault.reason, "detail": printable(fault.detail)}
    return row


def _without_copies(table, val_fraction: float):
    """Leave out all but the first of equal files; hold one image out where chance has held out none."""
    import pyarrow

    columns = {name: table[name].to_pylist() for name in ("excluded", "split", "image_digest")}
    first: dict[str, int] = {}
    for place, (reason, digest) in enumerate(zip(columns["excluded"], columns["image_digest"], strict=True)):
        if not reason and first.setdefault(digest, place) != place:
            columns["excluded"][place] = "copy"
    if val_fraction and len(first) > 1 and "val" not in {columns["split"][place] for place in first.values()}:
        # The lowest code is what a larger share would hold out first: the same image in any order of the files.
        columns["split"][first[min(first, key=lambda digest: split_code(digest))]] = "val"
    for name in ("excluded", "split"):
        table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(columns[name], "string"))
    return table


# ---- report


def _report(table, listing: Listing) -> dict:
    usable = table.filter(indexing.is_empty(table["excluded"]))
    splits = usable["split"].to_pylist()
    converted: dict[str, list[str]] = {}
    for key, kinds in zip(usable["key"].to_pylist(), usable["converted"].to_pylist(), strict=True):
        for kind in filter(None, kinds.split(",")):
            converted.setdefault(kind, []).append(key)
    excluded = indexing.counted_rows(table, "excluded", "image_name", listing.excluded)
    problems = indexing.counted_rows(table, "annotation_problem", "annotation_name", listing.annotation_problems)
    return {
        "images": {split: splits.count(split) for split in SPLITS},
        "masks": sum(usable["num_masks"].to_pylist()),
        "without_annotations": usable["annotation_file"].null_count,
        "converted": {
            kind: {"count": len(converted[kind]), "keys": converted[kind][:NAMED_CONVERSIONS]}
            for kind in CONVERSIONS
            if kind in converted
        },
        "excluded": excluded,
        "annotation_problems": problems,
        "tars": indexing.counted(listing.tars, {}),
    }
