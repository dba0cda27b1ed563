# SPDX-License-Identifier: Apache-2.0
"""Per-channel mean and deviation of the teacher's features, over a fixed sample of the training images.

Letters: B images, C channels, H W grid rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from effsam3.data.store.key_index import hashes_of

SAMPLE = 512  # images; at 72x72 positions each, more would change the third digit


def statistics_sample(keys: Sequence[str], size: int = SAMPLE) -> list[int]:
    """Return the positions of up to `size` keys, chosen by hash: the same for any order, rank or rerun."""
    return lowest([hashes_of([key.encode() for key in keys])], size)


def lowest(blocks: Iterable[np.ndarray], size: int) -> list[int]:
    """Return the positions of the `size` lowest hashes, in their order, of hashes that come in blocks."""
    hashes, positions, start = np.empty(0, np.uint64), np.empty(0, np.int64), 0
    for block_N in blocks:
        hashes = np.concatenate([hashes, block_N])
        positions = np.concatenate([positions, np.arange(start, start + len(block_N))])
        kept = np.argsort(hashes, kind="stable")[:size]  # of equal ones the first stay
        hashes, positions = hashes[kept], positions[kept]
        start += len(block_N)
    return positions.tolist()


class FeatureStatistics:
    """Accumulates feature maps batch by batch, in float64; the maps stay on their device."""

    def __init__(self, channels: int):
        self.count = 0.0
        # In float64: a variance is the small difference of two large sums, over a million positions each.
        self.sum_C = torch.zeros(channels, dtype=torch.float64)
        self.square_C = torch.zeros(channels, dtype=torch.float64)

    def update(self, feat_BCHW: Tensor, valid_B1HW: Tensor) -> None:
        """Add the valid positions (1 in `valid_B1HW`) of a batch."""
        feat = feat_BCHW.double()
        valid = valid_B1HW.to(feat)
        self.count += float(valid.sum())
        self.sum_C += (feat * valid).sum((0, 2, 3)).cpu()
        self.square_C += (feat.square() * valid).sum((0, 2, 3)).cpu()

    def result(self) -> dict[str, list[float]]:
        """Return `mean` and `deviation`, C floats each.

        A channel that hardly varies gets a thousandth of the mean deviation, so that dividing by it stays sane.
        """
        assert self.count > 0
        mean_C = self.sum_C / self.count
        deviation_C = (self.square_C / self.count - mean_C.square()).clamp(min=0).sqrt()
        deviation_C = deviation_C.clamp(min=1e-3 * float(deviation_C.mean()) + 1e-12)
        return {"mean": mean_C.tolist(), "deviation": deviation_C.tolist()}
