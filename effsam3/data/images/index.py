# SPDX-License-Identifier: Apache-2.0
"""Build the parquet index of SA-1B (`sa1b.COLUMNS`) from folders or tars, and report what was left out and why.

The sources are listed first, then chunks of about CHUNK_IMAGES images are checked in parallel (see indexing.py). Lists
are files on the disk: memory does not grow with the images, only with the names in the report.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from effsam3.data import indexing
from effsam3.data.images import sa1b
from effsam3.data.images.decoding import CONVERSIONS, MAX_PIXELS, check_image, image_header
from effsam3.data.images.sa1b_folders import Entry, Listing, check_sources, list_sources
from effsam3.data.indexing import printable
from effsam3.data.sorted_file import SortedFile
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

    folder, workers = out.parent.resolve(), workers or os.cpu_count() or 1
    options = Check(check == "decode", min_side, max_pixels, val_fraction if own else 0.0)
    about = {
        "check": check,
        "val_fraction": val_fraction,
        "own": own,
        "min_side": min_side,
        "max_pixels": max_pixels,
        "sources": [printable(str(source)) for source in places],
    }
    chunks = indexing.Chunks(out, CHUNK_IMAGES, _make_rows, (folder, options), VERSION, CHUNK_COLUMNS)
    with worker_pool(workers) as submit, SortedFile(chunks.folder) as entries:
        listing = list_sources(places, folder, val_fraction, submit, workers, entries, own)
        tables = partial(chunks.tables, listing, len(listing), submit, workers, "images")
        rows = _without_copies(tables, val_fraction, progress, chunks.folder) if own else tables(progress)
        return indexing.write_index(out, rows, sa1b.COLUMNS, _Counts(listing), about, "image", summary, started)


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


def _without_copies(
    tables: Callable[[bool], Iterator], val_fraction: float, progress: bool, scratch: Path
) -> Iterator:
    """Leave out all but the first of equal files; hold one image out where chance has held out none.

    Args:
        tables: yields the rows each time it is called, with or without a progress bar.
    """
    import pyarrow

    held_out = _held_out(tables(progress)) if val_fraction else None
    with SortedFile(scratch) as seen:
        for table in tables(progress and not val_fraction):
            rows = {name: table[name].to_pylist() for name in ("excluded", "split", "image_digest")}
            for place, digest in enumerate(rows["image_digest"]):
                if rows["excluded"][place]:
                    continue
                if seen.get(digest):
                    rows["excluded"][place] = "copy"
                else:
                    seen[digest] = True
                    if digest == held_out:
                        rows["split"][place] = "val"
            for name in ("excluded", "split"):
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, pyarrow.array(rows[name], "string"))
            yield table


def _held_out(tables: Iterator) -> str | None:
    """Return the digest of the image to hold out where chance has held out none of several; else None."""
    ends: set[str] = set()
    held = False
    for table in tables:
        usable = table.filter(indexing.is_empty(table["excluded"]))
        held |= "val" in usable["split"].to_pylist()
        digests = sorted(ends.union(usable["image_digest"].to_pylist()), key=split_code)
        ends = {*digests[:1], *digests[-1:]}
    # The lowest code is what a larger share would hold out first: the same image in any order of the files.
    return None if held or len(ends) < 2 else min(ends, key=split_code)


# ---- report


class _Counts:
    """What a report says of the rows, usable or not, and of what was not even looked at."""

    def __init__(self, listing: Listing):
        self.images = dict.fromkeys(SPLITS, 0)
        self.masks = self.without_annotations = 0
        self.converted: Counter[str] = Counter()
        self.converted_keys: dict[str, list[str]] = {kind: [] for kind in CONVERSIONS}
        self.excluded = indexing.Reasons(listing.excluded)
        self.problems = indexing.Reasons(listing.annotation_problems)
        self.tars = indexing.Reasons(listing.tars)

    def add(self, table) -> None:
        """Count some rows."""
        self.excluded.add(table, "excluded", "image_name")
        self.problems.add(table, "annotation_problem", "annotation_name")
        usable = table.filter(indexing.is_empty(table["excluded"]))
        splits = usable["split"].to_pylist()
        for split in SPLITS:
            self.images[split] += splits.count(split)
        self.masks += sum(usable["num_masks"].to_pylist())
        self.without_annotations += usable["annotation_file"].null_count
        for key, kinds in zip(usable["key"].to_pylist(), usable["converted"].to_pylist(), strict=True):
            for kind in filter(None, kinds.split(",")):
                self.converted[kind] += 1
                if self.converted[kind] <= NAMED_CONVERSIONS:
                    self.converted_keys[kind].append(key)

    def report(self) -> dict:
        """Return them as the report has them."""
        return {
            "images": self.images,
            "masks": self.masks,
            "without_annotations": self.without_annotations,
            "converted": {
                kind: {"count": self.converted[kind], "keys": self.converted_keys[kind]}
                for kind in CONVERSIONS
                if kind in self.converted
            },
            "excluded": self.excluded.report(),
            "annotation_problems": self.problems.report(),
            "tars": self.tars.report(),
        }
