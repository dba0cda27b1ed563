# SPDX-License-Identifier: Apache-2.0
"""Build the parquet index of SA-1B (`sa1b.COLUMNS`) from folders or tars, and report what was left out and why.

The sources are listed first; then parts of PART_IMAGES images are checked in parallel, each written to
`<stem>.parts/` under a hash of all it was made from, so that a re-run after a kill knows the finished ones by their
names; at the end the parts become one parquet.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from effsam3.data import indexing
from effsam3.data.images import sa1b
from effsam3.data.images.sa1b_folders import Entry, Listing, check_sources, list_sources, printable
from effsam3.errors import UserError
from effsam3.files import refuse_unwritable

VERSION = 2  # of what a part holds; another number makes older parts void
PART_IMAGES = 250  # about 10 s of decoding SA-1B: what a kill can cost each worker
NAMED_CONVERSIONS = 100  # keys that a report names for each kind of conversion
PART_COLUMNS = sa1b.COLUMNS | {  # what the report is made of
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
    max_pixels: int = sa1b.MAX_PIXELS,
    progress: bool = True,
    own: bool = False,
) -> dict:
    """Write the index `out` (.parquet) and `<stem>.report.json` next to it; return the report.

    `check`: `decode` decodes every image to its end, `header` reads sizes only and so lets truncated images through.
    `min_side` is in pixels. `workers` defaults to one per core; with 1 all is done in this process. `own`: photographs
    of one's own, see data/own_photographs.py.
    The same sources give the same bytes, whatever the workers and the interruptions.
    Raises UserError for sources or values that cannot be used, when no image is usable, and when a worker was killed.
    """
    started = time.monotonic()
    sources, out = [Path(source) for source in sources], Path(out)
    check_sources(sources)
    if out.suffix != ".parquet":
        raise UserError(f"--out {out} must end in .parquet")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1")
    if check not in ("decode", "header"):
        raise UserError(f"--check {check} must be decode or header")
    if min_side < 1 or not 1 <= max_pixels <= sa1b.MAX_PIXELS:
        raise UserError(f"--min-side {min_side} must be 1 or more, --max-pixels {max_pixels} 1 to {sa1b.MAX_PIXELS}")

    parts = out.parent / f"{out.stem}.parts"
    refuse_unwritable(out.parent, "--out")
    parts.mkdir(parents=True, exist_ok=True)
    folder = out.parent.resolve()
    options = Check(check == "decode", min_side, max_pixels, val_fraction if own else 0.0)
    with indexing.worker_pool(workers or os.cpu_count()) as submit:
        listing = list_sources(sources, folder, val_fraction, submit, own)
        slices = [group[i : i + PART_IMAGES] for group in listing.groups for i in range(0, len(group), PART_IMAGES)]
        files = {parts / f"{_fingerprint(entries, options)}.parquet": entries for entries in slices}
        indexing.make_parts(files, _make_part, (folder, options), submit, "images", progress)

    table = indexing.read_parts(files, _schema())
    if own:
        table = _without_copies(table, val_fraction)
    report = _report(table, listing) | {
        "check": check,
        "val_fraction": val_fraction,
        "own": own,
        "min_side": min_side,
        "max_pixels": max_pixels,
        "sources": [printable(str(source)) for source in sources],
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
    }
    report_file = out.with_name(f"{out.stem}.report.json")
    sa1b.write_atomic(report_file, json.dumps(report, indent=1).encode())
    if not sum(report["images"].values()):
        raise UserError(f"no usable image in {', '.join(report['sources'])}\n{summary(report)}\nreport: {report_file}")
    usable = table.filter(indexing.is_empty(table["excluded"])).select(list(sa1b.COLUMNS))
    sa1b.write_atomic(out, indexing.parquet_bytes(usable))
    shutil.rmtree(parts)
    return report


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
            more = ", ..." if found["count"] > 3 else ""
            lines.append(f"{title.replace('_', ' ')}: {reason} {found['count']:,} ({', '.join(names[:3])}{more})")
    return "\n".join(lines)


# ---- parts


def _make_part(entries: list[Entry], folder: Path, options: Check, file: Path) -> None:
    import pyarrow

    rows = [_check(entry, folder, options) for entry in entries]
    sa1b.write_atomic(file, indexing.parquet_bytes(pyarrow.Table.from_pylist(rows, _schema())))


def _check(entry: Entry, folder: Path, options: Check) -> dict:
    """Return the row of an image, with the reasons why it or its annotations are left out."""
    image, annotation = entry.image, entry.annotation
    row = {
        "key": entry.key,
        "split": entry.split,
        "image_file": image.file,
        "image_offset": image.offset,
        "image_bytes": image.size,
        "image_digest": "",
        "annotation_file": None,
        "annotation_offset": 0,
        "annotation_bytes": 0,
        "width": 0,
        "height": 0,
        "num_masks": 0,
        "converted": "",
        "image_name": image.name,
        "annotation_name": annotation.name if annotation else "",
        "excluded": "",
        "annotation_problem": "",
        "detail": "",
    }
    try:
        data = sa1b.read_file(row, folder, "image")
        row["image_digest"] = sa1b.digest_of(data)
        row["split"] = row["split"] or sa1b.split_of(row["image_digest"], options.val_fraction)
        row["width"], row["height"], kinds = sa1b.image_header(data, options.max_pixels, entry.key)
        if min(row["width"], row["height"]) < options.min_side:
            raise sa1b.UnreadableImage(entry.key, "too_small")
        if options.decode:
            _, kinds = sa1b.decode_image(data, options.max_pixels, entry.key)
    except sa1b.UnreadableImage as fault:
        return row | {"excluded": fault.reason, "detail": printable(fault.detail)}
    row["converted"] = ",".join(kinds)
    if annotation:
        place = {
            "annotation_file": annotation.file,
            "annotation_offset": annotation.offset,
            "annotation_bytes": annotation.size,
        }
        try:
            row |= place | {"num_masks": len(sa1b.read_annotations(row | place, folder))}
        except sa1b.UnreadableAnnotations as fault:
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
        columns["split"][first[min(first, key=lambda digest: sa1b.split_code(digest))]] = "val"
    for name in ("excluded", "split"):
        table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(columns[name], "string"))
    return table


def _fingerprint(entries: list[Entry], options: Check) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(repr((VERSION, options, entries)).encode("utf-8", "backslashreplace"))


# ---- report


def _schema():
    import pyarrow

    return pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in PART_COLUMNS.items()])


def _report(table, listing: Listing) -> dict:
    usable = table.filter(indexing.is_empty(table["excluded"]))
    splits = usable["split"].to_pylist()
    converted: dict[str, list[str]] = {}
    for key, kinds in zip(usable["key"].to_pylist(), usable["converted"].to_pylist(), strict=True):
        for kind in filter(None, kinds.split(",")):
            converted.setdefault(kind, []).append(key)
    excluded = indexing.names_by_reason(table, "excluded", "image_name", listing.excluded)
    problems = indexing.names_by_reason(table, "annotation_problem", "annotation_name", listing.annotation_problems)
    return {
        "images": {split: splits.count(split) for split in sa1b.SPLITS},
        "masks": sum(usable["num_masks"].to_pylist()),
        "without_annotations": usable["annotation_file"].null_count,
        "converted": {
            kind: {"count": len(converted[kind]), "keys": converted[kind][:NAMED_CONVERSIONS]}
            for kind in sa1b.CONVERSIONS
            if kind in converted
        },
        "excluded": indexing.counted(excluded, indexing.details_by_name(table, "image_name")),
        "annotation_problems": indexing.counted(problems, indexing.details_by_name(table, "annotation_name")),
        "tars": indexing.counted(listing.tars, {}),
    }
