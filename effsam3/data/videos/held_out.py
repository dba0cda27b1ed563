# SPDX-License-Identifier: Apache-2.0
"""Which of people's videos are learned from, and which are held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from effsam3.data.problems import Note
from effsam3.data.splits import split_code
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.vos_video import Annotations, Shown, VosVideo
from effsam3.errors import UserError


def split_videos(
    videos: Sequence[VosVideo], val_fraction: float, seed: int = 0
) -> tuple[list[VosVideo], list[VosVideo]]:
    """Divide videos into those to learn from and those that are held out, at least one each.

    A video's name and the seed decide, not the other videos: a new video does not move the others. Only where all
    would be on one side, one of them changes sides. A video that is alone is divided in time: the last `val_fraction`
    of its annotated frames, one at least, are held out, and no frame is on both sides. The frames next to the cut look
    alike, so its held-out scores flatter.

    Args:
        val_fraction: above 0, below 1.

    Raises:
        UserError: no video, or one of fewer than two annotated frames.
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
    if count < 2:
        raise UserError(
            f"{video.name} is the only video and has {count} annotated frames; two are needed to divide it"
        )
    held = min(max(round(val_fraction * count), 1), count - 1)
    cut = video.annotated[count - held]
    return [_part(video, "train", 0, cut)], [_part(video, "val", cut, video.frames)]


def _part(video: VosVideo, name: str, start: int, stop: int) -> VosVideo:
    frames = PartOfFrames(video, start, stop)
    return VosVideo(f"{video.name}_{name}", frames, PartOfMasks(video, frames.numbers))


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
