# SPDX-License-Identifier: Apache-2.0
"""Frames of a video that are image files, in a given order."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from effsam3.data.images.decoding import EXTENSIONS, decode_image
from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.decoder import FPS, UnreadableVideo


class FrameList:
    """Image files that are the frames of a video, wherever they are. Nothing is opened before it is asked for.

    Attributes:
        frames, size: as `VideoFile`'s.
        numbers: of the frames, ascending: by default 0, 1, 2 ...
        names: the file names without their endings, or numbers of five digits where two files have one name.
    """

    def __init__(self, name: str, files: Sequence[Path], numbers: Sequence[int] | None = None):
        self.name, self.files = name, list(files)
        self.numbers = range(len(self.files)) if numbers is None else numbers
        stems = [file.stem for file in self.files]
        self.names = stems if len(set(stems)) == len(stems) else [f"{number:05d}" for number in self.numbers]

    def __str__(self) -> str:
        return str(self.files[0].parent)

    @property
    def frames(self) -> int:
        return len(self.files)

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        return self.read([0]).shape[2:]

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W), in the order asked for; indexes count the images from 0.

        Raises:
            UnreadableVideo: an image beyond the last, one that does not decode, or images of several sizes.
        """
        images: list[np.ndarray] = []
        for index in indexes:
            if not 0 <= index < self.frames:
                raise UnreadableVideo(self.name, "short", f"image {index} of {self.frames} images")
            file = self.files[index]
            try:
                image_HW3, _ = decode_image(file.read_bytes(), key=file.name)
            except FileNotFoundError as fault:
                raise UnreadableVideo(self.name, "missing_frame", str(file)) from fault
            except OSError as fault:  # a folder of this name, no right to read it, a disk that fails
                raise UnreadableVideo(self.name, "unreadable", f"{file}: {fault.strerror}") from fault
            except Unreadable as fault:
                raise UnreadableVideo(self.name, fault.reason, f"{file.name}: {fault.detail}") from fault
            if images and image_HW3.shape != images[0].shape:
                sizes = f"{file.name} is {image_HW3.shape[:2]}, others {images[0].shape[:2]}"
                raise UnreadableVideo(self.name, "size_mismatch", sizes)
            images.append(image_HW3)
        return np.stack(images).transpose(0, 3, 1, 2)

    def time_s(self, index: int) -> float:
        """Return when a frame is shown where nothing tells: at FPS frames a second."""
        return index / FPS

    def close(self) -> None:
        """Files are only open while they are read."""


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, by name; hidden files are none."""
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    )
