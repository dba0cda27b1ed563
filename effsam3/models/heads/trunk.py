# SPDX-License-Identifier: Apache-2.0
"""The features that the heads read.

Letters: B images, S image side in pixels, D channels of the trunk, C of the necks, G side of the grid.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effsam3.models.image.teacher import to_map


def trunk_features(model: Any, pixels_B3SS: Tensor) -> Tensor:
    """Return the trunk's output as a map, (B, D, G, G)."""
    return to_map(model.detector_model.vision_encoder.backbone(pixels_B3SS).last_hidden_state)


def plus_view(levels: tuple[Tensor, ...], view_BC: Tensor | None) -> tuple[Tensor, ...]:
    """Add to every level of a neck the embedding of each image's view, the same at all positions."""
    return tuple(levels) if view_BC is None else tuple(level + view_BC[:, :, None, None] for level in levels)
