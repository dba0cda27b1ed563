# SPDX-License-Identifier: Apache-2.0
"""Moving shapes drawn over the frames of real videos: masks to learn from where nobody has drawn any.

The shapes are those of `synthetic.videos`. For smoke runs and a first try, only where a recipe asks for it by name: a
tracker learns to follow flat shapes from it, not the things in the video.

Letters: T frames, N objects, H W rows and columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from effsam3.data.problems import Note
from effsam3.data.splits import split_code
from effsam3.data.synthetic.videos import FEWEST_PIXELS, paint, shapes_of
from effsam3.data.videos.sav import VIDEO_FPS
from effsam3.data.videos.vos_video import Annotations, VosVideo


def synthetic_masks(videos: Sequence[VosVideo], seed: int, objects: int = 3) -> list[VosVideo]:
    """Return the videos with `objects` shapes moving over their frames, annotated on every frame.

    What is drawn depends on the seed, the video's name and its size only. Masks that a video has are not used.
    """
    drawn = [DrawnOver(video, seed, objects) for video in videos]
    return [VosVideo(frames.video.name, frames, DrawnMasks(frames)) for frames in drawn]


class DrawnOver:
    """The frames of a video with shapes over them."""

    def __init__(self, video: VosVideo, seed: int, objects: int):
        self.video, self.seed, self.objects = video, seed, objects

    def __str__(self) -> str:
        return self.video.name

    @functools.cached_property
    def _shapes(self) -> list:
        rng = np.random.default_rng([self.seed, split_code(self.video.name)])
        return shapes_of(self.objects, np.array(self.size) / max(self.size), rng.uniform(), rng)

    def draw(self, number: int, image_HW3: np.ndarray) -> np.ndarray:
        """Paint frame `number` into an image of colours 0..1; return the visible parts of all shapes, (N, H, W)."""
        yx_2HW = (np.mgrid[0.5 : self.size[0], 0.5 : self.size[1]] / max(self.size)).astype(np.float32)
        masks_NHW = paint(image_HW3, self._shapes, yx_2HW, number / VIDEO_FPS)
        masks_NHW[masks_NHW.sum((1, 2)) < FEWEST_PIXELS] = False
        return masks_NHW

    @property
    def frames(self) -> int:
        return self.video.frames

    @property
    def numbers(self) -> range:
        return range(self.frames)

    @property
    def names(self) -> list[str]:
        return self.video.frame_names

    @property
    def size(self) -> tuple[int, int]:
        return self.video.size

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W). Raises UnreadableVideo."""
        asked = list(indexes)
        images_THW3 = self.video.read(asked).transpose(0, 2, 3, 1) / np.float32(255)
        for number, image_HW3 in zip(asked, images_THW3, strict=True):
            self.draw(number, image_HW3)
        return (images_THW3 * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)

    def close(self) -> None:
        self.video.close()


class DrawnMasks(Annotations):
    """What is visible of every shape, by numbers from 1."""

    def __init__(self, frames: DrawnOver):
        self.frames = frames

    @property
    def objects(self) -> list[int]:
        return list(range(1, self.frames.objects + 1))

    @property
    def numbers(self) -> list[int]:
        return list(self.frames.numbers)

    @property
    def notes(self) -> list[Note]:
        return [Note("synthetic", self.frames.video.name, "shapes drawn over the frames, not what they show")]

    def masks(self, number: int) -> dict[int, np.ndarray]:
        masks_NHW = self.frames.draw(number, np.zeros((*self.frames.size, 3), np.float32))
        return dict(zip(self.objects, masks_NHW, strict=True))
