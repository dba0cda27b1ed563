# SPDX-License-Identifier: Apache-2.0
"""A webcam, read as a video whose end nobody knows.

Letters: T frames, H W rows and columns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import av
import numpy as np

from effsam3.data.videos.decoder import UnreadableVideo

# {platform: (FFmpeg's name for its cameras, a camera's name there)}
DEVICES = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}


class Webcam:
    """A camera by its number, 0 for the first. Its frames can be read once each, in order.

    Attributes:
        frames: more than anybody will wait for.
        size: (rows, columns) in pixels.

    Raises:
        UnreadableVideo: there is no such camera, or it has stopped.
    """

    frames = sys.maxsize

    def __init__(self, number: int):
        self.name = f"webcam {number}"
        if sys.platform not in DEVICES:
            raise UnreadableVideo(self.name, "missing", f"cameras are read on {', '.join(DEVICES)}")
        device, camera = DEVICES[sys.platform][0], DEVICES[sys.platform][1].format(number)
        try:
            self._pictures = av.open(camera, format=device).decode(video=0)
        except (av.FFmpegError, ValueError) as fault:  # ValueError: FFmpeg was built without this kind of device
            raise UnreadableVideo(self.name, "missing", f"{camera}: {fault}") from fault
        self._first_HW3: np.ndarray | None = self._next()
        self.size: tuple[int, int] = self._first_HW3.shape[:2]
        self._started = self._shown = time.monotonic()

    def __str__(self) -> str:
        return self.name

    def _next(self) -> np.ndarray:
        try:
            return next(self._pictures).to_ndarray(format="rgb24")
        except (av.FFmpegError, StopIteration) as fault:
            raise UnreadableVideo(self.name, "short", "it gives no more pictures") from fault

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return the next frames, as many as there are `indexes`, as uint8 RGB (T, 3, H, W)."""
        images = []
        for _ in indexes:
            images.append(self._next() if self._first_HW3 is None else self._first_HW3)
            self._first_HW3, self._shown = None, time.monotonic()
        return np.stack(images).transpose(0, 3, 1, 2)

    def time_s(self, index: int) -> float:
        """Return when the frame that was read last, `index`, came: seconds from the first one."""
        return self._shown - self._started
