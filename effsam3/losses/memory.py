# SPDX-License-Identifier: Apache-2.0
"""The distillation term of stage 2: what the memory makes of a frame, next to what SAM 3's dense memory makes of it.

Letters: O objects, C channels, G rows and columns of the frame's features.
"""

from __future__ import annotations

from torch import Tensor


def memory_loss(conditioned_OCGG: Tensor, teacher_OCGG: Tensor) -> Tensor:
    """Return the mean squared error of a frame's features after memory attention, (O,), in float32."""
    return (conditioned_OCGG.float() - teacher_OCGG.float()).square().mean((1, 2, 3))
