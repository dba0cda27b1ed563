# SPDX-License-Identifier: Apache-2.0
"""Frames of a video by number: from a video file, or from a folder of numbered images.

Letters: T frames, H W rows and columns.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from effsam3.data.videos.decoder import Decoder, FrameTable, UnreadableVideo, frame_table
from effsam3.data.videos.frame_folder import FrameFolder

VIDEO_EXTENSIONS = (
    *(".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv"),
)


class VideoFile:
    """A video file; frame k is the k-th picture that a player shows, turned and mirrored as a player does.

    Pixels are those that are coded: where they are not square, the picture is not stretched. It is opened when first
    asked, once in every process: an open decoder does not survive a fork.

    Args:
        seekable: `seeks_agree` was true for this file; without it, the first question decodes the file once.

    Attributes:
        frames: how many frames there are; a header may claim more.
        size: (rows, columns) in pixels.
        numbers: the number of each frame, here 0 to frames - 1.
        names: the file name that each frame would have as an image, without its ending, such as 00012.

    All raise UnreadableVideo: no such file, not a video, or one that does not decode to its end.
    """

    def __init__(self, path: str | Path, seekable: bool = False):
        self.path, self.seekable = Path(path), seekable
        self._decoders: dict[int, Decoder] = {}  # by process; a parent's must not even be closed by its child

    def __reduce__(self):
        return VideoFile, (self.path, self.seekable)

    def __str__(self) -> str:
        return str(self.path)

    def close(self) -> None:
        """Close it in this process; it is opened again when asked, and its table of frames is kept for a while."""
        self._decoders.pop(os.getpid(), None)

    @property
    def _decoder(self) -> Decoder:
        process = os.getpid()
        if process not in self._decoders:
            self._decoders[process] = Decoder(self.path, frame_table(self.path, self.seekable))
        return self._decoders[process]

    @property
    def _table(self) -> FrameTable:
        return self._decoder.table

    @property
    def frames(self) -> int:
        return self._table.frames

    @property
    def numbers(self) -> Sequence[int]:
        return range(self.frames)

    @property
    def names(self) -> list[str]:
        return [f"{number:05d}" for number in self.numbers]

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        return self.read([0]).shape[2:]

    def time_s(self, index: int) -> float:
        """Return when a frame is shown, in seconds from the first one."""
        return self._decoder.time_s(index)

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W), in the order asked for.

        One call after the other in ascending order decodes each frame once.

        Raises:
            UnreadableVideo: no such file, not a video, a frame beyond its end, one that does not decode, or of
                another size than the others.
        """
        indexes = list(indexes)
        outside = [index for index in indexes if not 0 <= index < self.frames]
        if outside:
            raise UnreadableVideo(self.path.name, "short", f"frame {outside[0]} of a video of {self.frames} frames")
        images = {index: self._decoder.image(index) for index in sorted(set(indexes))}
        return np.stack([images[index] for index in indexes]).transpose(0, 3, 1, 2)


def open_video(path: str | Path, seekable: bool = False) -> VideoFile | FrameFolder:
    """Return a folder's images or a file's frames; both have `frames size numbers names read`.

    `seekable`: of a file, see `VideoFile`.

    Raises:
        UnreadableVideo: there is nothing, or nothing to read; a file is opened later, by the process that reads it.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.is_file():
        raise UnreadableVideo(path.name, "missing", f"no file {path}")
    return VideoFile(path, seekable)
