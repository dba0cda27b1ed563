# SPDX-License-Identifier: Apache-2.0
"""Look through videos with masks as training reads them: what is there, and everything that is wrong.

Letters: P pixels, A B objects of two frames, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from effsam3.data.problems import Note, mask_problems, problems_of
from effsam3.data.videos.decoder import Source
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError

CHUNK_BYTES = 2**26  # of frames in memory
LOOK_PX = 256  # longest side at which masks of two frames are compared
SAME, OTHER = 0.5, 0.1  # IoU with an object's place one frame before: it has taken the place; it has left it


@dataclass
class VideoCheck:
    """One video: what is in it, and what is wrong with it."""

    name: str
    frames: int = 0
    size: tuple[int, int] | None = None  # rows, columns
    fps: float | None = None  # of a video file
    annotated: int = 0  # frames
    empty: int = 0  # annotated frames that show no object
    shown: dict[int, int] = field(default_factory=dict)  # {object: annotated frames that show it}
    most: int = 0  # objects on one frame
    problems: list[Note] = field(default_factory=list)


def check_video(video: VosVideo) -> VideoCheck:
    """Read every frame and every mask of a video."""
    check, video = VideoCheck(video.name), video.with_gaps()
    try:
        check.problems += [Note("missing_frame", f"{video.name}, frame {number}") for number in video.missing]
        check.frames = video.frames
        check.fps = frames_per_second(video.video_file) if video.video_file else None
        check.problems += _unreadable_frames(video)
        check.size, check.annotated = video.size, len(video.annotated)
        check.shown = dict.fromkeys(video.objects, 0)
    except UserError as fault:
        check.problems += [*problems_of(fault, video.name), Note("not_checked", video.name)]
    else:
        check.problems += _masks(video, check)
    try:
        check.problems += video.notes
    except UserError:
        pass  # what cannot be read at all is listed already
    check.problems += _guesses(check)
    check.problems = list(dict.fromkeys(check.problems))
    return check


def _unreadable_frames(video: VosVideo) -> Iterator[Note]:
    """Decode all frames; those that fail are read again one by one, so that each is named."""
    size, start = None, 0
    chunk = 1
    while start < video.frames:
        indexes = range(start, min(start + chunk, video.frames))
        start = indexes.stop
        try:
            frames_T3HW = video.read(indexes)
        except UserError as fault:
            if len(indexes) == 1:
                yield from problems_of(fault, _frame(video, indexes[0]))
            else:
                start, chunk = indexes.start, 1
            continue
        size = size or frames_T3HW.shape[2:]
        if frames_T3HW.shape[2:] != size:
            detail = f"{_size(frames_T3HW.shape[2:])} pixels, others {_size(size)}"
            yield Note("size_mismatch", _frame(video, indexes[0]), detail)
        chunk = max(1, min(16, CHUNK_BYTES // frames_T3HW[0].nbytes))


def _masks(video: VosVideo, check: VideoCheck) -> Iterator[Note]:
    """Look at the masks of every annotated frame; count into `check`."""
    before: dict[int, np.ndarray] = {}
    for index in video.annotated:
        try:
            masks = {number: mask for number, mask in video.masks(index).items() if mask.any()}
        except UserError as fault:
            yield from problems_of(fault, _frame(video, index))
            before = {}
            continue
        check.empty += not masks
        check.most = max(check.most, len(masks))
        for number, mask_HW in masks.items():
            check.shown[number] += 1
            yield from mask_problems(mask_HW, f"{_frame(video, index)}, object {video.object_names[number]}")
        step = -(-max(video.size) // LOOK_PX)
        now = {number: mask_HW[::step, ::step].ravel() for number, mask_HW in masks.items()}
        for old, new in jumps(before, now):
            detail = f"it is where object {video.object_names[old]} was one annotated frame before"
            yield Note("jumping_id", f"{_frame(video, index)}, object {video.object_names[new]}", detail)
        before = now
    for number, count in check.shown.items():
        if count < 2:
            where = f"{video.name}, object {video.object_names[number]}"
            yield Note("seen_once" if count else "never_visible", where)
    if check.annotated and not any(check.shown.values()):
        yield Note("no_object", video.name)
    elif check.annotated == 1:
        yield Note("one_frame", video.name)


def jumps(before: dict[int, np.ndarray], now: dict[int, np.ndarray]) -> list[tuple[int, int]]:
    """Return (old id, new id) of objects that seem to have changed their ids from one frame to the next.

    The new one is where the old one was, was not there itself, and the old one has left.

    Args:
        before, now: {object: mask, flat}, none of them empty.
    """
    if not before or not now:
        return []
    masks_AP, masks_BP = (np.stack(list(some.values())).astype(np.float32) for some in (before, now))
    inter_AB = masks_AP @ masks_BP.T
    iou_AB = inter_AB / np.maximum(masks_AP.sum(1)[:, None] + masks_BP.sum(1) - inter_AB, 1)
    place = {number: at for at, number in enumerate(before)}, {number: at for at, number in enumerate(now)}

    def stayed(number: int) -> bool:
        return number in before and number in now and iou_AB[place[0][number], place[1][number]] > OTHER

    return [
        (old, new)
        for old in before
        for new in now
        if old != new and iou_AB[place[0][old], place[1][new]] > SAME and not stayed(old) and not stayed(new)
    ]


def _guesses(check: VideoCheck) -> Iterator[Note]:
    """What a reader took for granted and cannot be right."""
    reasons = {problem.reason for problem in check.problems}
    if {"category_as_track", "union"} <= reasons:
        yield Note("merged_objects", check.name)
    if "place_as_track" in reasons and len(check.shown) > 1:
        yield Note("guessed_objects", check.name)


def frames_per_second(path: Path) -> float | None:
    """Return what a video file says of itself, if it does."""
    source = Source(path)  # kept, because what is closed may not be asked
    rate = source.stream.average_rate
    return float(rate) if rate else None  # where it says nothing: None up to PyAV 18, 0 / 0 since


def _frame(video: VosVideo, index: int) -> str:
    """Return the name of a frame's file after its video's, or its number."""
    name = video.image_files[index].name if video.image_files else f"frame {index}"
    return f"{video.name}, {name}"


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
