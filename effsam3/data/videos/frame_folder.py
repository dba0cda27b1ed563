# SPDX-License-Identifier: Apache-2.0
"""Frames of a video that are images in a folder, in the order that their names give."""

from __future__ import annotations

from pathlib import Path

from effsam3.data.videos.decoder import UnreadableVideo
from effsam3.data.videos.frame_list import FrameList, images_in
from effsam3.data.videos.frame_numbers import UnclearNames, number_names
from effsam3.errors import UserError


class FrameFolder(FrameList):
    """The images of a folder, in the order of the numbers in their names, see `frame_numbers`.

    Attributes:
        numbers: the numbers in the names, ascending; they may have gaps, see `missing_numbers`.
    """

    def __init__(self, path: str | Path):
        """Raises UnreadableVideo when there is no such folder or no image in it, and UserError for its names."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise UnreadableVideo(self.path.name, "missing", f"no folder {self.path}")
        files: dict[str, Path] = {}
        for file in images_in(self.path):
            # a.jpg and a.png: which of the two is the frame cannot be guessed.
            other = files.setdefault(file.stem, file)
            if other is not file:
                raise UserError(f"{other} and {file.name} both are frame {file.stem}; keep one of them")
        if not files:
            raise UnreadableVideo(self.path.name, "missing", f"no image in {self.path}")
        try:
            numbers = number_names(list(files))
        except UnclearNames as fault:
            raise UserError(f"{self.path}: {fault}; a frame's name must have its number, such as 00012.jpg") from fault
        super().__init__(self.path.name, [files[name] for name in numbers], list(numbers.values()))
