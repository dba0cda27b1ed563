# SPDX-License-Identifier: Apache-2.0
"""Frames of a video by number: from a video file (decord), or from a folder of numbered images.

Letters: T frames, H W rows and columns.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from effsam3.data.sa1b import EXTENSIONS, Unreadable, decode_image
from effsam3.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")


class UnreadableVideo(Unreadable):
    """Reasons: missing, corrupt, truncated, short, missing_frame, size_mismatch."""

    what = "video"


class VideoFile:
    """A video file. It is opened when first asked, once in every process: decord does not survive a fork.

    Attributes:
        frames: how many frames the file really has; a header may claim more.
        size: (rows, columns) in pixels.
        fps: frames per second, averaged over the file.
        numbers: the number of each frame, here 0 to frames - 1.
        names: the file name that each frame would have as an image, without its ending, such as 00012.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._readers: dict[int, object] = {}  # by process; a parent's must not even be closed by its child

    def __reduce__(self):
        return VideoFile, (self.path,)

    @property
    def _reader(self):
        process = os.getpid()
        if process not in self._readers:
            self._readers[process] = _open(self.path)
        return self._readers[process]

    @property
    def frames(self) -> int:
        return len(self._reader)

    @property
    def fps(self) -> float:
        return float(self._reader.get_avg_fps())

    @property
    def numbers(self) -> Sequence[int]:
        return range(self.frames)

    @property
    def names(self) -> list[str]:
        return [f"{number:05d}" for number in self.numbers]

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        return self.read([0]).shape[2:]

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W), in the order asked for.

        Raises:
            UnreadableVideo: no such file, not a video, a frame beyond its end, or one that does not decode.
        """
        from decord import DECORDError

        indexes = list(indexes)
        outside = [index for index in indexes if not 0 <= index < self.frames]
        if outside:
            raise UnreadableVideo(self.path.name, "short", f"frame {outside[0]} of a video of {self.frames} frames")
        try:
            frames_THW3 = self._reader.get_batch(indexes).asnumpy()
        except DECORDError as fault:
            self._readers.pop(os.getpid())  # a reader that failed goes on failing
            raise UnreadableVideo(
                self.path.name, "truncated", f"frames {min(indexes)} to {max(indexes)} do not decode: {_brief(fault)}"
            ) from fault
        return frames_THW3.transpose(0, 3, 1, 2)


class FrameFolder:
    """The images of a folder, in the order of the last number in their names: 0.jpg, 1.jpg, 10.jpg.

    Attributes:
        frames, size, fps: as `VideoFile`'s; images have no frame rate, so `fps` is None.
        numbers: the numbers in the names, ascending; they may have gaps, see `missing_number`.
        names: the file names without their endings.
    """

    fps = None

    def __init__(self, path: str | Path):
        """Raises UnreadableVideo when there is no such folder or no image in it, and UserError for its names."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise UnreadableVideo(self.path.name, "missing", f"no folder {self.path}")
        files = {}
        for file in sorted(self.path.iterdir()):
            if file.suffix.lower() not in EXTENSIONS or file.name.startswith("."):
                continue
            digits = re.findall(r"\d+", file.stem)
            if not digits:
                raise UserError(f"{file}: a frame's name must have its number, such as 00012.jpg")
            other = files.setdefault(int(digits[-1]), file)
            if other is not file:
                raise UserError(f"{other} and {file.name} both are frame {int(digits[-1])}; keep one of them")
        if not files:
            raise UnreadableVideo(self.path.name, "missing", f"no image in {self.path}")
        self.numbers = sorted(files)
        self.files = [files[number] for number in self.numbers]
        self.names = [file.stem for file in self.files]

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
        images = []
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


def open_video(path: str | Path) -> VideoFile | FrameFolder:
    """Return a folder's images or a file's frames; both have `frames size fps numbers names read`.

    Raises:
        UnreadableVideo: there is nothing, or nothing to read; a file is opened later, by the process that reads it.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.is_file():
        raise UnreadableVideo(path.name, "missing", f"no file {path}")
    return VideoFile(path)


def missing_number(numbers: Sequence[int]) -> int | None:
    """Return the first number that is lost from ascending ones of a constant stride; None if none is.

    The stride is the smallest step, where at least half of the steps are it and the others multiples of it. Other
    numbers, such as times or a choice of frames, have no stride and so no gap.
    """
    steps = [later - earlier for earlier, later in itertools.pairwise(numbers)]
    stride = min(steps, default=1)
    if 2 * steps.count(stride) < len(steps) or any(step % stride for step in steps):
        return None
    return next((number + stride for number, step in zip(numbers, steps, strict=False) if step > stride), None)


def _open(path: Path):
    if not path.is_file():
        raise UnreadableVideo(path.name, "missing", f"no file {path}")
    try:
        import decord
    except ImportError as fault:
        raise UserError(
            f"reading {path.name} needs decord, which has wheels for Linux on x86-64 and for Windows only; elsewhere "
            "use frames that scripts/extract_frames.py has extracted on such a machine"
        ) from fault
    decord.logging.set_level(decord.logging.QUIET)
    try:
        return decord.VideoReader(str(path), num_threads=1)
    except (decord.DECORDError, RuntimeError) as fault:
        raise UnreadableVideo(path.name, "corrupt", _brief(fault)) from fault


def _brief(fault: Exception) -> str:
    """Without decord's own file names and stack."""
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", str(fault).strip().split("\n")[0])
