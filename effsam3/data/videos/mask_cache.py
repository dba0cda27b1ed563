# SPDX-License-Identifier: Apache-2.0
"""Decoded masks of videos, packed into bits and kept within a bound.

Letters: H W rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from effsam3.data.videos.vos_video import VosVideo


@dataclass(frozen=True)
class PackedMask:
    """A mask of `shape` (H, W), eight pixels in a byte."""

    shape: tuple[int, int]
    bits: np.ndarray

    @classmethod
    def pack(cls, mask_HW: np.ndarray) -> PackedMask:
        return cls(mask_HW.shape, np.packbits(mask_HW))

    def mask(self) -> np.ndarray:
        """Return it as bool (H, W)."""
        return np.unpackbits(self.bits, count=self.shape[0] * self.shape[1]).view(bool).reshape(self.shape)


@dataclass(frozen=True)
class PackedFrame:
    """What a frame shows, see `Shown`."""

    masks: dict[int, PackedMask]
    unknown: frozenset[int]

    @property
    def held_bytes(self) -> int:
        # 200 bytes or so are Python's own for each: many small masks must not count for nothing.
        return 200 + sum(200 + mask.bits.nbytes for mask in self.masks.values())


class MaskCache:
    """The masks of the frames read last, at most `limit_bytes` of them in this process.

    Attributes:
        held_bytes: how much is kept.
        decoded: how many frames had to be decoded.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.held_bytes, self.decoded = limit_bytes, 0, 0
        self._frames: OrderedDict[tuple[int, int], PackedFrame] = OrderedDict()

    def read(self, position: int, video: VosVideo, index: int) -> PackedFrame:
        """Return what an annotated frame of the video at `position` of a data set shows.

        Raises:
            Unreadable: as `VosVideo.masks`.
        """
        key = position, index
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key]
        masks, unknown = video.shown(index)
        frame = PackedFrame({name: PackedMask.pack(mask_HW) for name, mask_HW in masks.items()}, unknown)
        self.decoded += 1
        self._frames[key] = frame
        self.held_bytes += frame.held_bytes
        while self.held_bytes > self.limit_bytes:
            self.held_bytes -= self._frames.popitem(last=False)[1].held_bytes
        return frame
