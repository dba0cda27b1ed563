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
    """A mask of `shape` (H, W), eight pixels in a byte; without bytes it is empty."""

    shape: tuple[int, int]
    bits: np.ndarray | None

    @classmethod
    def pack(cls, mask_HW: np.ndarray) -> PackedMask:
        return cls(mask_HW.shape, np.packbits(mask_HW) if mask_HW.any() else None)

    def mask(self) -> np.ndarray:
        """Return it as bool (H, W)."""
        if self.bits is None:
            return np.zeros(self.shape, bool)
        return np.unpackbits(self.bits, count=self.shape[0] * self.shape[1]).view(bool).reshape(self.shape)


class MaskCache:
    """The masks of the frames read last, at most `limit_bytes` of them in this process.

    Attributes:
        held_bytes: how much is kept.
        decoded: how many frames had to be decoded.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.held_bytes, self.decoded = limit_bytes, 0, 0
        self._frames: OrderedDict[tuple[int, int], dict[int, PackedMask]] = OrderedDict()

    def read(self, position: int, video: VosVideo, index: int) -> dict[int, PackedMask]:
        """Return the masks of an annotated frame of the video at `position` of a data set, by object.

        Raises:
            Unreadable: as `VosVideo.masks`.
        """
        key = position, index
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key]
        masks = {name: PackedMask.pack(mask_HW) for name, mask_HW in video.masks(index).items()}
        self.decoded += 1
        self._frames[key] = masks
        self.held_bytes += _bytes_of(masks)
        while self.held_bytes > self.limit_bytes:
            _, oldest = self._frames.popitem(last=False)
            self.held_bytes -= _bytes_of(oldest)
        return masks


def _bytes_of(masks: dict[int, PackedMask]) -> int:
    # 200 bytes or so are Python's own for each: many empty masks must not count for nothing.
    return sum(200 + (0 if mask.bits is None else mask.bits.nbytes) for mask in masks.values())
