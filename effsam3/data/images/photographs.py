# SPDX-License-Identifier: Apache-2.0
"""Photographs of one's own (`data.source: folder`): any folder becomes an index on first use.

Names: a key is the path below the folder, so that `2023/img_1.jpg` and `2024/img_1.jpg` are two photographs. The split
goes by an image's bytes, not by its name: moved or renamed, it stays where it was. Exact copies are left out, else one
could be learned from and held out at once.
"""

from __future__ import annotations

from pathlib import Path

from effsam3.checked_files import read_json
from effsam3.data.images.index import build_index, summary
from effsam3.data.images.sa1b import load_index
from effsam3.data.images.sa1b_folders import check_sources, list_sources
from effsam3.data.indexing import report_of
from effsam3.data.sorted_file import SortedFile
from effsam3.data.splits import SPLITS
from effsam3.data.workers import worker_pool
from effsam3.errors import UserError

NAMED = 3  # files named in a note


def ready_photographs(folder: str, index: Path, held_out: float, workers: int | None = None) -> str:
    """Index `folder` into the parquet `index` unless that has been done; returns a line on what there is.

    The index is kept as it is, so that a run that resumes learns from what it began with: files that are new, gone or
    of another size are named in the line instead.

    Raises:
        UserError: no such folder, no usable photograph in it, or `index` is that of something else.
    """
    if not index.is_file():
        if not Path(folder).is_dir():
            raise UserError(f"data.folder: there is no folder {folder}")
        report = build_index([folder], index, held_out, workers, own=True)
        _refuse_one_sided(folder, index, report["images"])
        left_out = sum(found["count"] for found in report["excluded"].values())
        return f"{summary(report)}\n{left_out:,} files left out, each with its reason in {report_of(index)}"
    counts = dict.fromkeys(SPLITS, int)
    form = {"sources": [str], "val_fraction": float, "images": counts, "excluded": {str: {"files": [str]}}}
    remedy = f"delete {index} to index the photographs again"
    made = read_json(report_of(index), form, remedy) if report_of(index).is_file() else {}
    sources = made.get("sources", ["something else"])
    # Keys are paths below the folder: another folder's index would call other photographs by the same names.
    if not made.get("own") or [Path(source).resolve() for source in sources] != [Path(folder).resolve()]:
        raise UserError(
            f"data.index: {index} is an index of {', '.join(sources)}, data.folder is {folder}; name another file"
        )
    if made["val_fraction"] != held_out:
        raise UserError(
            f"data.held_out: {index} was made with {made['val_fraction']}, the recipe has {held_out}; set it back, "
            "or delete the index to divide the photographs again"
        )
    _refuse_one_sided(folder, index, made["images"])
    return changes(folder, index, made)


def _refuse_one_sided(folder: str, index: Path, images: dict[str, int]) -> None:
    if not all(images.values()):
        raise UserError(
            f"data.folder: of the photographs in {folder} {images['train']} are to learn from and {images['val']} are "
            f"held out; both are needed ({report_of(index)} names what was left out, copies too). Add some, or change "
            f"data.held_out, and delete {index}"
        )


def changes(folder: str, index: Path, report: dict) -> str:
    """Return what has changed in the folder since it was indexed, as far as names and sizes tell; "" for nothing."""
    if not Path(folder).is_dir():
        return f"{folder} is not there"
    check_sources([Path(folder)])
    with worker_pool(1) as submit, SortedFile() as entries:
        # Names and sizes only: decoding all photographs at every start would take too long.
        listing = list_sources([Path(folder)], index.parent.resolve(), 0.0, submit, 1, entries, own=True)
        files = {entry.image.name: entry for entry in listing}
    now = {entry.key: entry.image.size for entry in files.values()}
    rows = load_index(index)
    then = dict(zip(rows["key"], rows["image_bytes"], strict=True))
    excluded = (name for found in report["excluded"].values() for name in found["files"])
    left_out = {files[name].key for name in excluded if name in files}
    kinds = {
        "new": sorted(now.keys() - then.keys() - left_out),
        "gone": sorted(then.keys() - now.keys()),
        "of another size": sorted(name for name, size in then.items() if now.get(name, size) != size),
    }
    said = [
        f"{len(some):,} {what} ({', '.join(some[:NAMED])}{', ...' if len(some) > NAMED else ''})"
        for what, some in kinds.items()
        if some
    ]
    if not said:
        return ""
    return f"{folder} has changed since it was indexed: {'; '.join(said)}; delete {index} to index it again"
