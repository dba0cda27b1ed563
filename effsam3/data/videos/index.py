# SPDX-License-Identifier: Apache-2.0
"""Build the parquet index of SA-V (`sav.COLUMNS`) from folders, and report what was left out and why.

As for SA-1B, chunks of about CHUNK_VIDEOS videos are checked in parallel (see indexing.py).
"""

from __future__ import annotations

import os
import reprlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effsam3.data import indexing
from effsam3.data.images.decoding import EXTENSIONS
from effsam3.data.indexing import printable
from effsam3.data.sorted_file import SortedFile
from effsam3.data.splits import SPLITS, split_of
from effsam3.data.unreadable import Unreadable, UnreadableAnnotations
from effsam3.data.videos.decoder import UnreadableVideo, seeks_agree
from effsam3.data.videos.files import open_video
from effsam3.data.videos.sav import COLUMNS, FRAME_STRIDE, KINDS, SavAnnotations, read_sav
from effsam3.data.workers import worker_pool
from effsam3.errors import UserError

VERSION = 4  # of what a chunk holds; another number makes older chunks void
CHUNK_VIDEOS = 4  # some 20 s of decoding: what a kill can cost each worker
DECODED = 8  # images decoded at once, so that 4K ones fit
CHUNK_COLUMNS = COLUMNS | {"excluded": "string", "detail": "string"}  # reason, and what is wrong in full, or ""


class File(NamedTuple):
    """A file, or a folder of frames: path relative to the parquet's folder, bytes (images of a folder), time."""

    file: str
    size: int
    mtime_ns: int


class Entry(NamedTuple):
    """A video and its annotations by kind."""

    video_id: str
    split: str
    video: File
    annotations: tuple[tuple[str, File], ...]


def build_index(
    sources: Iterable[str | Path],
    out: str | Path,
    val_fraction: float = 0.02,
    workers: int | None = None,
    check: str = "decode",
    progress: bool = True,
) -> dict:
    """Write the index `out` (.parquet) and `<stem>.report.json` next to it; return the report.

    `sources` are folders, searched with their subfolders for `<id>_manual.json`, `<id>_auto.json`, and `<id>.mp4` or
    a folder `<id>` of numbered frames, which is taken where both are there. `check`: `decode` decodes every video to
    its end, `header` only counts its frames. `workers` defaults to one per core; with 1 all is done in this process.
    The same sources give the same bytes, whatever the workers and the interruptions.

    Raises:
        UserError: sources or values that cannot be used, no usable video, or a worker that was killed.
    """
    started = time.monotonic()
    places, out = [Path(source) for source in sources], Path(out)
    if not places:
        raise UserError("no source; give the folders with SA-V's mp4 and json files")
    for source in places:
        if not source.is_dir():
            raise UserError(
                f"{source} is not a folder; give the folders with SA-V's mp4 and json files, tars extracted"
            )
    indexing.refuse_options(out, val_fraction, check)
    folder, workers = out.parent.resolve(), workers or os.cpu_count() or 1
    chunks = indexing.Chunks(out, CHUNK_VIDEOS, _make_rows, (folder, check), VERSION, CHUNK_COLUMNS)
    sources = [printable(str(source)) for source in places]
    about = {"check": check, "val_fraction": val_fraction, "sources": sources}
    with worker_pool(workers) as submit, SortedFile(chunks.folder) as files:
        count, unpaired = list_videos(places, folder, files)
        tables = chunks.tables(_entries(files, val_fraction), count, submit, workers, "videos", progress)
        return indexing.write_index(out, tables, COLUMNS, _Counts(unpaired), about, "video", summary, started)


def summary(report: dict) -> str:
    """Return the report as a few lines to read, the first names of each kind included."""
    videos, rows = report["videos"], report["annotations"]
    lines = [
        f"{sum(videos.values()):,} videos ({videos['train']:,} train, {videos['val']:,} val), "
        f"{' and '.join(f'{rows[kind]:,} {kind}' for kind in KINDS)} annotations, {report['objects']:,} objects, "
        f"{report['annotated_frames']:,} annotated frames"
    ]
    if report["check"] == "header":
        lines.append(
            "checked headers only: damaged videos may still be in, and clips decode theirs whole, because it is not "
            "known whether seeks find the right frames; --check decode finds out"
        )
    elif report["unseekable"]:
        lines.append(
            f"{report['unseekable']:,} annotations are of videos that seeks go wrong in: clips decode them whole"
        )
    excluded = [indexing.told(f"excluded: {reason}", one, one["files"]) for reason, one in report["excluded"].items()]
    return "\n".join(lines + excluded)


# ---- sources


def list_videos(sources: list[Path], folder: Path, found: SortedFile) -> tuple[int, dict[str, list[str]]]:
    """Find videos and their JSON; return how many videos have both, and by reason what cannot be used.

    Args:
        folder: the parquet's.
        found: is given, in order of their rows' keys, the `File`s of each video by kind: manual, auto, mp4, frames.
    """
    left: dict[str, list[str]] = {}

    def unreadable(fault: OSError) -> None:
        left.setdefault("unreadable", []).append(printable(os.path.relpath(fault.filename, folder)))

    def note(kind: str, name: str, path: Path, size: int | None = None) -> None:
        file = indexing.relative(path, folder)
        try:
            status = path.stat()
        except OSError as fault:  # a broken link
            unreadable(fault)
            return
        blob = File(file, status.st_size if size is None else size, status.st_mtime_ns)
        if printable(file) != file:  # a parquet cannot hold it
            left.setdefault("undecodable_name", []).append(printable(file))
            return
        files = found.get(f"{name}_") or {}
        # The first of two videos of one id stays: nothing tells which of them the masks belong to.
        if kind not in files:
            found[f"{name}_"] = files | {kind: blob}
        elif File(*files[kind]).file != file:
            left.setdefault("duplicate", []).append(file)

    for parent, paths in indexing.walk([source.resolve() for source in sources], unreadable):
        images = 0
        for path in paths:
            video_id, _, kind = path.stem.rpartition("_")
            images += path.suffix.lower() in EXTENSIONS
            if path.suffix == ".json" and kind in KINDS:
                note(kind, video_id, path)
            elif path.suffix == ".mp4":
                note("mp4", path.stem, path)
        if images:
            note("frames", parent.name, parent, images)

    count = 0
    for _, files in found.items():
        annotations = [files[kind] for kind in KINDS if kind in files]
        if annotations and ("mp4" in files or "frames" in files):
            count += 1
        elif annotations:
            left.setdefault("without_video", []).extend(File(*blob).file for blob in annotations)
        elif "mp4" in files:
            left.setdefault("without_annotations", []).append(File(*files["mp4"]).file)
    return count, left


def _entries(found: SortedFile, val_fraction: float) -> Iterator[Entry]:
    """Yield the videos that have annotations."""
    for key, files in found.items():
        video_id = key.removesuffix("_")
        video = files.get("frames") or files.get("mp4")
        annotations = tuple((kind, File(*files[kind])) for kind in KINDS if kind in files)
        if video and annotations:
            yield Entry(video_id, split_of(video_id, val_fraction), File(*video), annotations)


# ---- chunks


def _make_rows(entries: list[Entry], folder: Path, check: str) -> list[dict]:
    return [row for entry in entries for row in _check(entry, folder, check)]


def _check(entry: Entry, folder: Path, check: str) -> list[dict]:
    """Return the rows of a video, one for each JSON, with the reason why it is left out."""
    rows, usable = [], []
    for kind, annotation in entry.annotations:
        row: dict[str, Any] = {
            "key": f"{entry.video_id}_{kind}",
            "split": entry.split,
            "video_id": entry.video_id,
            "kind": kind,
            "video_file": entry.video.file,
            "video_bytes": None if (folder / entry.video.file).is_dir() else entry.video.size,
            "annotation_file": annotation.file,
            "annotation_bytes": annotation.size,
            "excluded": "",
            "detail": "",
        }
        rows.append(row)
        try:
            annotations = _read_annotations(row, folder)
        except Unreadable as fault:
            row |= _left_out(fault)
            continue
        row |= _facts(annotations)
        if any(row["visible"]):
            usable.append((row, annotations))
        else:
            row["excluded"] = "no_object"
    # A video is only decoded for annotations that show an object.
    if not usable:
        return rows
    try:
        frames, size, seekable = _read_video(folder / entry.video.file, usable[0][1], check)
    except Unreadable as fault:
        for row, _ in usable:
            row |= _left_out(fault)
        return rows
    for row, annotations in usable:
        row["seekable"] = seekable
        masks = annotations.height, annotations.width
        if frames is not None and frames != annotations.frames:
            detail = f"masks for a video of {annotations.frames} frames, which has {frames}"
            row |= {"excluded": "frame_count", "detail": detail}
        elif size != masks:
            row |= {"excluded": "size_mismatch", "detail": f"masks of (height, width) {masks}, frames of {size}"}
    return rows


def _left_out(fault: Unreadable) -> dict:
    return {"excluded": fault.reason, "detail": printable(fault.detail)}


def _read_annotations(row: dict, folder: Path) -> SavAnnotations:
    annotations = read_sav(row, folder)
    annotations.check_masks()
    if annotations.video_id != row["video_id"]:
        raise UnreadableAnnotations(row["key"], "other_video", f"its video_id is {reprlib.repr(annotations.video_id)}")
    return annotations


def _facts(annotations: SavAnnotations) -> dict:
    """Return what clip sampling needs to know without opening the JSON."""
    visible_AN = annotations.visible()
    # Starts and stops in place of a row per frame: an object is seen in a few long stretches.
    edges = [np.flatnonzero(np.diff(np.concatenate([[0], shown_A, [0]]))).tolist() for shown_A in visible_AN.T]
    return {
        "frames": annotations.frames,
        "annotated": len(annotations.masklet),
        "gaps": [index for index, rles in enumerate(annotations.masklet) if rles is None],
        "height": annotations.height,
        "width": annotations.width,
        "objects": len(annotations.objects),
        "visible": edges,
    }


def _read_video(path: Path, annotations: SavAnnotations, check: str) -> tuple[int | None, tuple[int, int], bool]:
    """Return the number of frames (None for a folder, which need not have all of them), (height, width), seekable.

    Raises:
        UnreadableVideo: it does not decode, or a folder lacks an annotated frame.
    """
    try:
        video = open_video(path, seekable=check == "header")
    except Unreadable:
        raise
    except UserError as fault:  # the names in a folder
        raise UnreadableVideo(path.name, "frame_names", str(fault)) from fault
    if not path.is_dir():
        return video.frames, video.size, check == "decode" and seeks_agree(path)
    place = {number: index for index, number in enumerate(video.numbers)}
    needed = [FRAME_STRIDE * k for k, rles in enumerate(annotations.masklet) if rles is not None]
    missing = [number for number in needed if number not in place]
    if missing:
        raise UnreadableVideo(path.name, "missing_frame", f"frame {missing[0]}")
    for start in range(0, len(needed) if check == "decode" else 0, DECODED):
        size = video.read([place[number] for number in needed[start : start + DECODED]]).shape[2:]
        if size != video.size:
            raise UnreadableVideo(path.name, "size_mismatch", f"frames of {size} and of {video.size}")
    return None, video.size, False


# ---- report


class _Counts:
    """What a report says of the rows, usable or not, and of what was not even looked at."""

    def __init__(self, unpaired: dict[str, list[str]]):
        self.videos = dict.fromkeys(SPLITS, 0)
        self.annotations = dict.fromkeys(KINDS, 0)
        self.objects = self.annotated_frames = self.unseekable = 0
        self.excluded = indexing.Reasons(unpaired)

    def add(self, table) -> None:
        """Count some rows, with all rows of each of their videos."""
        self.excluded.add(table, "excluded", "annotation_file")
        usable = table.filter(indexing.is_empty(table["excluded"])).to_pylist()
        splits = list({row["video_id"]: row["split"] for row in usable}.values())
        for split in SPLITS:
            self.videos[split] += splits.count(split)
        for row in usable:
            self.annotations[row["kind"]] += 1
            self.objects += row["objects"]
            self.annotated_frames += row["annotated"]
            self.unseekable += row["video_file"].endswith(".mp4") and not row["seekable"]

    def report(self) -> dict:
        """Return them as the report has them."""
        return {
            "videos": self.videos,
            "annotations": self.annotations,
            "objects": self.objects,
            "annotated_frames": self.annotated_frames,
            "unseekable": self.unseekable,
            "excluded": self.excluded.report(),
        }
