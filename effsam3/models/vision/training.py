# SPDX-License-Identifier: Apache-2.0
"""Trunk and necks together, as a vision student is trained and measured, and their names in a whole SAM 3.

Letters: B images, S their side in pixels, D channels of the trunk, G side of its grid, C channels of a neck, M = 6 C
channels of all their maps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3VisionConfig

from effsam3.models.chassis.tensors import NECK, TRACKER_NECK, TRUNK, load_part, read_config, read_tensors
from effsam3.models.image.teacher import to_map
from effsam3.models.vision.student import VisionTrunk, vision_neck

LEVELS = ("fine", "middle", "top")  # of each neck: 4 G, 2 G and G a side
MAPS = tuple(f"{neck}_{level}" for neck in ("detector", "tracker") for level in LEVELS)  # in the order of `Necks`
# Beginnings of the names of a `VisionStudent`'s tensors, and of the same ones in a `Sam3VideoModel`.
PLACES = {"trunk.": TRUNK, "necks.detector.": NECK, "necks.tracker.": TRACKER_NECK}


class Necks(nn.Module):
    """Both necks on one trunk, a student's or SAM 3's own: (B, D, G, G) to `MAPS`."""

    def __init__(self, config: Sam3VisionConfig):
        """Build them for a vision encoder, without weights."""
        super().__init__()
        self.detector, self.tracker = vision_neck(config), vision_neck(config)

    @classmethod
    def from_folder(cls, folder: Path) -> Necks:
        """Load those of a chassis or merged folder, frozen.

        Raises:
            ChassisError: one is missing or of other sizes.
        """
        necks = cls(read_config(folder).detector_config.vision_config)
        for neck, prefix in ((necks.detector, NECK), (necks.tracker, TRACKER_NECK)):
            load_part(neck, read_tensors(folder, prefix))
        return necks.eval().requires_grad_(False)

    @property
    def layers(self) -> list[Any]:
        """The layers that make `MAPS`; of each neck's four, nothing reads the coarsest."""
        return [layer for neck in (self.detector, self.tracker) for layer in neck.fpn_layers[: len(LEVELS)]]

    def forward(self, feat_BDGG: Tensor) -> list[Tensor]:
        return [layer(feat_BDGG) for layer in self.layers]


class VisionStudent(nn.Module):
    """A student in the place of trunk and necks: normalised pixels (B, 3, S, S) to its trunk's map and `MAPS`."""

    def __init__(self, config: Sam3VisionConfig):
        """`config` is a vision encoder's whose backbone is a `VisionTrunkConfig`."""
        super().__init__()
        trunk: Any = config.backbone_config
        self.trunk = VisionTrunk(trunk)
        self.necks = Necks(config)

    def forward(self, pixels_B3SS: Tensor) -> tuple[Tensor, list[Tensor]]:
        feat_BDGG = to_map(self.trunk(pixels_B3SS).last_hidden_state)
        return feat_BDGG, self.necks(feat_BDGG)

    @torch.no_grad()
    def set_feature_statistics(self, mean_M: Tensor, deviation_M: Tensor) -> None:
        """Set mean and deviation per channel of the teacher's `MAPS`, one map after the other."""
        each = zip(self.necks.layers, mean_M.chunk(len(MAPS)), deviation_M.chunk(len(MAPS)), strict=True)
        for layer, mean_C, deviation_C in each:
            layer.feature_mean.copy_(mean_C)
            layer.feature_scale.copy_(deviation_C)


def in_whole_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a `VisionStudent`'s tensors by their names in a `Sam3VideoModel`."""
    return {
        there + name.removeprefix(here): tensor
        for name, tensor in tensors.items()
        for here, there in PLACES.items()
        if name.startswith(here)
    }
