# SPDX-License-Identifier: Apache-2.0
"""Which of people's videos are learned from, and which are held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from effsam3.data.problems import Note
from effsam3.data.splits import split_code
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.vos_video import Annotations, Shown, VosVideo
from effsam3.errors import UserError

SIDE = 2  # annotated frames on each side of a video that is divided: nothing is tracked on the first one


def split_videos(
    videos: Sequence[VosVideo], val_fraction: float, seed: int = 0
) -> tuple[list[VosVideo], list[VosVideo]]:
    """Divide videos into those to learn from and those that are held out, at least one each.

    A video's name and the seed decide, not the other videos: a new video does not move the others. Only where all
    would be on one side, one of them changes sides. A video that is alone is divided in time: the last `val_fraction`
    of its annotated frames are held out, at least two stay, and no frame is on both sides. The frames next to the cut
    look alike, so its held-out scores flatter.

    Args:
        val_fraction: above 0, below 1.

    Raises:
        UserError: no video, or a single one of fewer than four annotated frames, or of which fewer than two would be
            held out.
        Unreadable: of the only video.
    """
    assert 0 < val_fraction < 1, val_fraction
    if not videos:
        raise UserError("there is no video to divide into training and held-out ones")
    if len(videos) == 1:
        return _in_time(videos[0], val_fraction)
    codes = {video.name: split_code(f"{seed}/{video.name}") for video in videos}
    ordered = sorted(videos, key=lambda video: codes[video.name])
    held = sum(code < val_fraction * 2**64 for code in codes.values())
    val = {video.name for video in ordered[: min(max(held, 1), len(videos) - 1)]}
    return [video for video in videos if video.name not in val], [video for video in videos if video.name in val]


def _in_time(video: VosVideo, val_fraction: float) -> tuple[list[VosVideo], list[VosVideo]]:
    count = len(video.annotated)
    if count < 2 * SIDE:
        raise UserError(
            f"data.path: {video.name} is the only video and has {count} annotated frames; "
            f"{2 * SIDE} are needed to divide it in time: annotate more of them, or give more videos"
        )
    held = min(round(val_fraction * count), count - SIDE)
    if held < SIDE:
        raise UserError(
            f"data.held_out: {val_fraction:g} of the {count} annotated frames of {video.name}, the only video, is "
            f"{held}, and tracking is only measured after the first one; set {math.ceil(100 * SIDE / count) / 100:g} "
            "or more, or give more videos"
        )
    cut = video.annotated[count - held]
    return [PartOfVideo(video, "train", 0, cut)], [PartOfVideo(video, "val", cut, video.frames)]


def describe_split(train: Sequence[VosVideo], val: Sequence[VosVideo]) -> str:
    """Say in one line how videos were divided."""
    if isinstance(val[0], PartOfVideo):
        held, whole = len(val[0].annotated), len(val[0].whole.annotated)
        return f"1 video, divided in time: its last {held} of {whole} annotated frames are held out"
    return f"videos: {len(train):,} to learn from, {len(val):,} held out"


class PartOfVideo(VosVideo):
    """Frames `start` to before `stop` of the video `whole`, and their masks."""

    def __init__(self, whole: VosVideo, name: str, start: int, stop: int):
        frames = PartOfFrames(whole, start, stop)
        super().__init__(f"{whole.name}_{name}", frames, PartOfMasks(whole, frames.numbers))
        self.whole = whole


class PartOfFrames:
    """Frames `start` to before `stop` of a video, by the same names and with their numbers in the whole."""

    def __init__(self, video: VosVideo, start: int, stop: int):
        self.video, self.numbers = video, range(start, stop)

    def __str__(self) -> str:
        return f"frames {self.numbers.start} to {self.numbers.stop - 1} of {self.video.name}"

    @property
    def frames(self) -> int:
        return len(self.numbers)

    @property
    def names(self) -> list[str]:
        return self.video.frame_names[self.numbers.start : self.numbers.stop]

    @property
    def size(self) -> tuple[int, int]:
        return self.video.size

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W); indexes count from the part's first. Raises UnreadableVideo."""
        asked = list(indexes)
        outside = [index for index in asked if not 0 <= index < self.frames]
        if outside:
            raise UnreadableVideo(self.video.name, "short", f"frame {outside[0]} of {self}")
        return self.video.read([self.numbers[index] for index in asked])

    def close(self) -> None:
        self.video.close()


class PartOfMasks(Annotations):
    """The masks of those frames; all objects of the whole are known."""

    def __init__(self, video: VosVideo, frames: range):
        self.video, self.frames = video, frames

    @property
    def objects(self) -> list[int]:
        return self.video.objects

    @property
    def numbers(self) -> list[int]:
        return [index for index in self.video.annotated if index in self.frames]

    @property
    def names(self) -> dict[int, str | int]:
        return self.video.object_names

    @property
    def notes(self) -> list[Note]:
        return self.video.notes

    def masks(self, number: int) -> dict[int, np.ndarray]:
        return self.video.masks(number)

    def shown(self, number: int) -> Shown:
        return self.video.shown(number)
