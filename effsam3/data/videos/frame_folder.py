# SPDX-License-Identifier: Apache-2.0
"""Frames of a video that are images in a folder, in the order that their names give."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from effsam3.data.images.decoding import EXTENSIONS, decode_image
from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.decoder import UnreadableVideo
from effsam3.data.videos.frame_numbers import UnclearNames, number_names
from effsam3.errors import UserError


class FrameFolder:
    """The images of a folder, in the order of the numbers in their names, see `frame_numbers`.

    Attributes:
        frames, size: as `VideoFile`'s.
        numbers: the numbers in the names, ascending; they may have gaps, see `missing_number`.
        names: the file names without their endings.
    """

    def __init__(self, path: str | Path):
        """Raises UnreadableVideo when there is no such folder or no image in it, and UserError for its names."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise UnreadableVideo(self.path.name, "missing", f"no folder {self.path}")
        files: dict[str, Path] = {}
        for file in sorted(self.path.iterdir()):
            if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."):
                other = files.setdefault(file.stem, file)
                if other is not file:
                    raise UserError(f"{other} and {file.name} both are frame {file.stem}; keep one of them")
        if not files:
            raise UnreadableVideo(self.path.name, "missing", f"no image in {self.path}")
        try:
            numbers = number_names(list(files))
        except UnclearNames as fault:
            raise UserError(f"{self.path}: {fault}; a frame's name must have its number, such as 00012.jpg") from fault
        self.names, self.numbers = list(numbers), list(numbers.values())
        self.files = [files[name] for name in self.names]

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
                detail = f"image {index} of a folder of {self.frames} images"
                raise UnreadableVideo(self.path.name, "short", detail)
            file = self.files[index]
            try:
                image_HW3, _ = decode_image(file.read_bytes(), key=file.name)
            except FileNotFoundError as fault:
                raise UnreadableVideo(self.path.name, "missing_frame", str(file)) from fault
            except Unreadable as fault:
                raise UnreadableVideo(self.path.name, fault.reason, f"{file.name}: {fault.detail}") from fault
            if images and image_HW3.shape != images[0].shape:
                sizes = f"{file.name} is {image_HW3.shape[:2]}, others {images[0].shape[:2]}"
                raise UnreadableVideo(self.path.name, "size_mismatch", sizes)
            images.append(image_HW3)
        return np.stack(images).transpose(0, 3, 1, 2)
