# SPDX-License-Identifier: Apache-2.0
"""Write pictures as an mp4 that browsers and phones play: H.264, yuv420p, its index in front.

Letters: H W rows and columns.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

TIME_BASE = Fraction(1, 90_000)  # of a second, as broadcasts count: all usual rates are whole numbers of it
QUALITY = "20"  # x264's constant rate factor: 0 is lossless, 23 its default


class Mp4Writer:
    """Writes pictures with their times, one after another; `close` ends the file."""

    def __init__(self, path: Path):
        """The file may have any name; its size is that of the first picture."""
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream: Any = None

    def add(self, image_HW3: np.ndarray, time_s: float) -> None:
        """Append a picture, uint8 RGB, shown from `time_s` on: later than the one before it."""
        # Colours are stored at half the resolution, so the sides must be even.
        rows, columns = (side % 2 for side in image_HW3.shape[:2])
        even_HW3 = np.pad(image_HW3, ((0, rows), (0, columns), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", options={"crf": QUALITY, "preset": "veryfast"})
            self._stream.height, self._stream.width, self._stream.pix_fmt = *even_HW3.shape[:2], "yuv420p"
            self._stream.codec_context.time_base = TIME_BASE
        frame = av.VideoFrame.from_ndarray(even_HW3, format="rgb24")
        frame.pts, frame.time_base = round(time_s / TIME_BASE), TIME_BASE
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds, and the index."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
