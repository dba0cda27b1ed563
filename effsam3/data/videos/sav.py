# SPDX-License-Identifier: Apache-2.0
"""SA-V's training set as released (mp4, `*_manual.json`, `*_auto.json`), through the index of `effsam3 index sav`.

Videos have 24 frames a second, annotations 6: annotated frame k is video frame 4k. The index has one row per usable
JSON (COLUMNS); its files are named relative to the parquet's own folder.

Letters: A annotated frames, N objects, T frames asked for, H W rows and columns.
"""

from __future__ import annotations

import functools
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effsam3.data import coco, indexing
from effsam3.data.images.decoding import MAX_PIXELS
from effsam3.data.mapped import load_rows
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo, open_video
from effsam3.data.videos.vos_video import Annotations

VIDEO_FPS = 24
FRAME_STRIDE = 4  # video frames from one annotated frame to the next
KINDS = ("manual", "auto")  # of annotations, and how their files end
COLUMNS = {  # name: Arrow type
    "key": "string",  # the JSON's stem, `sav_000001_manual`; unique in an index
    "split": "string",  # train | val, by the video: its two rows are in the same one
    "video_id": "string",
    "kind": "string",  # manual | auto
    "video_file": "string",  # posix path relative to the parquet's folder; an mp4 or a folder of numbered frames
    "annotation_file": "string",
    "annotation_bytes": "int64",
    "frames": "int32",  # of the video, at 24 per second
    "annotated": "int32",  # A; annotated frame k is video frame 4k
    "gaps": "list<int32>",  # annotated frames whose masks are missing
    "height": "int32",  # pixels
    "width": "int32",
    "objects": "int32",  # N
    "visible": "list<list<int32>>",  # per object [start, stop, start, stop, ...]: annotated frames with a mask
    "seekable": "bool",  # of a video file: its frames are the same whether decoded in a row or after a seek
    "video_bytes": "int64",  # of a video file; null: a folder, or not known
}
LATER = {"seekable": False, "video_bytes": None}  # columns that older indexes lack: nothing is known of any file


@dataclass(frozen=True)
class SavAnnotations:
    """One JSON; `masklet[k][n]` is the COCO RLE of object n on annotated frame k, which is None where k is missing."""

    key: str
    video_id: str
    frames: int
    height: int
    width: int
    objects: list[int]
    masklet: list[list[dict] | None]

    def mask(self, annotated: int, position: int) -> np.ndarray:
        """Return one object's mask on one annotated frame, bool (H, W); objects may overlap.

        Raises:
            UnreadableAnnotations: bad_mask.
        """
        rles = self.masklet[annotated]
        assert rles is not None, f"frame {annotated} is not annotated"
        try:
            return coco.decode(rles[position], self.height, self.width)
        except coco.Malformed as fault:
            raise self._bad_mask(annotated, fault) from fault

    def check_masks(self) -> None:
        """Raise UnreadableAnnotations unless every RLE fills its frame; `mask` checks the one it decodes, too."""
        for annotated, rles in enumerate(self.masklet):
            try:
                coco.runs_of_all(rles or [])
            except coco.Malformed as fault:
                raise self._bad_mask(annotated, fault) from fault

    def _bad_mask(self, annotated: int, fault: coco.Malformed) -> UnreadableAnnotations:
        return UnreadableAnnotations(self.key, fault.reason, f"annotated frame {annotated}: {fault}")

    def visible(self) -> np.ndarray:
        """Return which object has a mask that is not empty, bool (A, N); nothing is visible where k is missing.

        The masks must have been checked.
        """
        visible_AN = np.zeros((len(self.masklet), len(self.objects)), bool)
        for annotated, rles in enumerate(self.masklet):
            if rles:
                visible_AN[annotated] = coco.areas_of(rles) > 0
        return visible_AN


def parse_sav(data: bytes, key: str = "") -> SavAnnotations:
    """Check the form of an SA-V JSON, the size of every mask, and the number of annotated frames.

    Raises:
        UnreadableAnnotations: bad_json, not_sav, object_ids (two objects have one), size_mismatch, bad_mask, or
            frame_count (not every fourth frame is annotated).
    """
    try:
        return _check_sav(coco.load_json(data), key)
    except coco.Malformed as fault:
        raise UnreadableAnnotations(key, fault.reason or "not_sav", str(fault)) from fault


def _check_sav(content, key: str) -> SavAnnotations:
    numbers = ("video_frame_count", "video_height", "video_width")
    coco.mapping(content, "the file", ("video_id", *numbers, "masklet_id", "masklet"))
    frames, height, width = (coco.whole(content[name], name, least=1) for name in numbers)
    if height * width > MAX_PIXELS:
        raise coco.Malformed(f"{width} x {height} pixels are more than any video has")
    video_id = content["video_id"]
    if not isinstance(video_id, str):
        raise coco.Malformed(f"video_id is {reprlib.repr(video_id)}; it must be a text")
    objects = [coco.whole(number, "masklet_id") for number in coco.listed(content["masklet_id"], "masklet_id")]
    twice = [number for number, count in Counter(objects).items() if count > 1]
    if twice:
        raise coco.Malformed(f"masklet_id has {twice[0]} twice; every object needs an id of its own", "object_ids")
    masklet = coco.listed(content["masklet"], "masklet")
    expected = -(-frames // FRAME_STRIDE)
    if len(masklet) != expected:
        detail = f"{len(masklet)} annotated frames, {expected} for a video of {frames} frames"
        raise coco.Malformed(detail, "frame_count")
    checked: list[list[dict] | None] = []
    for annotated, rles in enumerate(masklet):
        # An annotated frame of which any object is missing is no use for tracking, as in SA-V's own loader.
        if rles is None or None in coco.listed(rles, f"masklet[{annotated}]"):
            checked.append(None)
            continue
        if len(rles) != len(objects):
            raise coco.Malformed(f"{len(objects)} objects in masklet_id, {len(rles)} masks in masklet[{annotated}]")
        try:
            checked.append([coco.to_rle(rle, height, width) for rle in rles])
        except coco.Malformed as fault:
            raise coco.Malformed(f"masklet[{annotated}]: {fault}", fault.reason) from fault
    return SavAnnotations(key, video_id, frames, height, width, objects, checked)


class SavFile(Annotations):
    """SA-V's JSON; objects have the ids of its `masklet_id`."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _content(self) -> SavAnnotations:
        content = parse_sav(self.path.read_bytes(), self.path.stem)
        content.check_masks()  # before any of them is tracked
        return content

    @property
    def objects(self) -> list[int]:
        return self._content.objects

    @property
    def numbers(self) -> list[int]:
        return [FRAME_STRIDE * index for index, rles in enumerate(self._content.masklet) if rles is not None]

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return every object's mask."""
        content = self._content
        return {name: content.mask(number // FRAME_STRIDE, place) for place, name in enumerate(content.objects)}


def sav_record(
    name: str,
    frames: int,
    size: tuple[int, int],
    objects: list[int],
    masklet: Sequence[list[dict] | None],
    environment: str = "Own",
) -> dict:
    """Return what SA-V's manual JSON holds.

    Args:
        masklet: the RLEs of all objects on each frame 0, 4, 8 ...; None: it is not annotated.
    """
    count, (height, width) = len(objects), size
    areas_AN = np.array([coco.areas_of(rles) if rles else [0] * count for rles in masklet])
    shown_AN = areas_AN > 0
    sizes_N = areas_AN.sum(0) / np.maximum(shown_AN.sum(0), 1)  # mean over the frames that show it
    appeared_N = shown_AN.argmax(0)
    changes = [int(np.diff(shown_A[first:]).sum()) for shown_A, first in zip(shown_AN.T, appeared_N, strict=True)]
    return {
        "video_id": name,
        "video_duration": frames / VIDEO_FPS,
        "video_frame_count": float(frames),
        "video_height": float(height),
        "video_width": float(width),
        "video_resolution": float(height * width),
        "video_environment": environment,
        "video_split": "train",
        "masklet": masklet,
        "masklet_id": objects,
        "masklet_size_rel": (sizes_N / (height * width)).tolist(),
        "masklet_size_abs": sizes_N.tolist(),
        "masklet_size_bucket": [_bucket(size) for size in sizes_N],
        "masklet_visibility_changes": changes,
        "masklet_first_appeared_frame": appeared_N.astype(float).tolist(),
        "masklet_frame_count": [len(masklet)] * count,
        "masklet_edited_frame_count": [0] * count,
        "masklet_type": ["manual"] * count,
        "masklet_stability_score": [None] * count,
        "masklet_num": count,
    }


def _bucket(pixels: float) -> str:
    return "small" if pixels < 32**2 else "medium" if pixels < 96**2 else "large"  # COCO's sizes


def read_sav(row: dict, folder: Path) -> SavAnnotations:
    """Return the annotations of an index row. Raises UnreadableAnnotations, also when the file has changed."""
    return parse_sav(indexing.read_file(row, folder, "annotation", UnreadableAnnotations), row["key"])


def read_annotated_frames(
    video_file: Path,
    annotated: Sequence[int],
    size: tuple[int, int],
    seekable: bool = False,
    video_bytes: int | None = None,
) -> np.ndarray:
    """Return the video frames of annotated frames, uint8 RGB (T, 3, H, W).

    `seekable` and `video_bytes` are the index's; a file of another size is another video than the masks belong to.

    From a folder they are read by the numbers in their names, which are those of the video's frames, whether every
    frame was extracted or every fourth.

    Raises:
        UnreadableVideo: missing, replaced, damaged, too short, or not of this size.
    """
    video = open_video(video_file, seekable)
    if video_bytes is not None and (found := video_file.stat().st_size) != video_bytes:
        detail = f"{video_file} has {found} bytes, {video_bytes} when indexed; build the index again"
        raise UnreadableVideo(video_file.name, "changed", detail)
    frames = [FRAME_STRIDE * index for index in annotated]
    place = {number: index for index, number in enumerate(video.numbers)}
    missing = [number for number in frames if number not in place]
    if missing:
        reason = "missing_frame" if video_file.is_dir() else "short"
        detail = f"frame {missing[0]}; there are {video.frames} frames, the last is {video.numbers[-1]}"
        raise UnreadableVideo(video_file.name, reason, detail)
    pixels_T3HW = video.read([place[number] for number in frames])
    if pixels_T3HW.shape[2:] != size:
        detail = f"frames of {pixels_T3HW.shape[2:]}, masks of {size}"
        raise UnreadableVideo(video_file.name, "size_mismatch", detail)
    return pixels_T3HW


def load_index(path: str | Path, split: str | None = None, limit: int | None = None):
    """Return the index as a Hugging Face `datasets.Dataset`, rows in key order, memory-mapped (see mapped.py).

    `split` keeps train or val; None: train's rows, then val's. `limit` keeps the first rows of what is left.

    Raises:
        UserError: the file is missing, is damaged, is not such an index, or has no row in the split.
    """
    path = Path(path)
    command = f"effsam3 index sav FOLDER --out {path}"
    return load_rows(path, COLUMNS, "an SA-V index", command, "video", split, limit, LATER)
