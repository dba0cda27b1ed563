# SPDX-License-Identifier: Apache-2.0
"""What a model is asked about: images, videos, folders of either, patterns with `*`, a webcam by its number.

Letters: H W rows and columns of the original image, S side of the model's square image.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from effsam3.data.images.decoding import EXTENSIONS, decode_image
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.videos.extract_frames import list_videos
from effsam3.data.videos.files import VIDEO_EXTENSIONS, open_video
from effsam3.data.videos.frame_list import images_in
from effsam3.data.videos.webcam import Webcam
from effsam3.models.inference.prompt_options import PredictError


@dataclass(frozen=True)
class Input:
    """One image or video, and the name of what is written about it."""

    source: str
    name: str

    @property
    def moves(self) -> bool:
        """Whether it is a video: a folder of frames, a file with a video's ending, or a webcam."""
        path = Path(self.source)
        return is_webcam(self.source) or path.is_dir() or path.suffix.lower() in VIDEO_EXTENSIONS


def is_webcam(source: str) -> bool:
    """Return whether a source is the number of a webcam, and no file of that name."""
    return source.isdecimal() and not Path(source).exists()


def find_inputs(sources: Sequence[str], images: bool = False) -> list[Input]:
    """Return the images and videos of files, folders and patterns, each with a name of its own.

    A folder of images is one video, its frames numbered by their names; with `images` they are images of their own.
    A folder without images stands for the videos in it.

    Raises:
        PredictError: nothing is there.
    """
    found = [one for source in sources for one in _expanded(source, images)]
    inputs: dict[str, Input] = {}
    for source in dict.fromkeys(found):
        stem = f"webcam{source}" if is_webcam(source) else Path(source).resolve().stem
        numbered = (f"{stem}-{number}" for number in count(2))
        name = next(name for name in chain([stem], numbered) if name not in inputs)
        inputs[name] = Input(source, name)
    return list(inputs.values())


def _expanded(source: str, images: bool) -> list[str]:
    path = Path(source)
    if is_webcam(source):
        return [source]
    if path.is_dir():
        inside = images_in(path)
        if images:
            if not inside:
                raise PredictError(f"INPUT: no image ({', '.join(EXTENSIONS)}) in {source}")
            return list(map(str, inside))
        videos = not inside and any(one.suffix.lower() in VIDEO_EXTENSIONS for one in path.iterdir())
        return list(map(str, list_videos([path]).values())) if videos else [source]
    if not path.exists() and glob.has_magic(source):
        matches = [one for one in sorted(glob.glob(source, recursive=True)) if _can_be_seen(Path(one))]
        if not matches:
            raise PredictError(f"INPUT: {source} matches no image, video or folder")
        return [one for match in matches for one in _expanded(match, images)]
    return [str(existing(path))]


def _can_be_seen(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (*EXTENSIONS, *VIDEO_EXTENSIONS)


def existing(path: str | Path) -> Path:
    """Return the path.

    Raises:
        PredictError: there is nothing.
    """
    if not Path(path).exists():
        raise PredictError(f"INPUT: there is no {path}; expected an image, a video or a folder of frames")
    return Path(path)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image, uint8 RGB (H, W, 3).

    Raises:
        PredictError: there is none. UserError: it cannot be decoded.
    """
    return decode_image(existing(path).read_bytes(), key=str(path))[0]


def read_video(source: str | Path | int) -> Any:
    """Open a video, a folder of frames or, by its number, a webcam.

    Raises:
        PredictError: there is none. UserError: it cannot be decoded.
    """
    return Webcam(int(str(source))) if is_webcam(str(source)) else open_video(existing(str(source)))


class Frames(Sequence[Any]):
    """A video's frames as a model takes them, normalised (3, S, S); the original waits until it is taken.

    Each is decoded once. A tracker that looks some frames ahead of what it tells makes that many wait.
    """

    def __init__(self, video, side: int, most: int | None = None):
        """`most`: frames that are read; None: all."""
        self.video, self.side = video, side
        self.frames = video.frames if most is None else min(most, video.frames)
        self._waiting: dict[int, tuple[np.ndarray, float]] = {}

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # one at a time, no slices
        if index not in self._waiting:
            self._waiting[index] = self._read(index), self.video.time_s(index)
        return normalise(resize_image(self._waiting[index][0], self.side, "square")[0])

    def take(self, index: int) -> tuple[np.ndarray, float]:
        """Return a frame that the model has read, uint8 RGB (H, W, 3), and its time in seconds; forget it."""
        return self._waiting.pop(index)

    def _read(self, index: int) -> np.ndarray:
        image_HW3 = np.ascontiguousarray(self.video.read([index])[0].transpose(1, 2, 0))
        if image_HW3.shape[:2] != tuple(self.video.size):
            height, width = image_HW3.shape[:2]
            raise PredictError(
                f"INPUT: frame {index} is {width}x{height} px, the first {self.video.size[1]}x{self.video.size[0]}; "
                "the frames of a video have one size; add --images if they are images of their own"
            )
        return image_HW3
