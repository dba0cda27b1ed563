# SPDX-License-Identifier: Apache-2.0
"""The two models that every benchmark compares: the chassis as the teacher, the merged model as the student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3TrackerVideoModel

from effsam3.data.statistics import FeatureStatistics
from effsam3.data.transforms import normalise, valid_mask
from effsam3.models.image.student import resize_BCHW
from effsam3.models.image.teacher import to_map
from effsam3.models.inference.prompted import load_tracker, trunk_of
from effsam3.models.vision.training import Necks


@dataclass(frozen=True)
class Pair:
    """Teacher and student, whole trackers on one device, frozen.

    `statistics` are the teacher's mean and deviation per channel (C each); None: those that the student carries.
    """

    teacher: Sam3TrackerVideoModel
    student: Sam3TrackerVideoModel
    device: torch.device
    statistics: tuple[Tensor, Tensor] | None = None

    @property
    def mean_C(self) -> Tensor:
        """The teacher's mean per channel."""
        return self.statistics[0] if self.statistics else trunk_of(self.student).get_buffer("feature_mean")

    @property
    def deviation_C(self) -> Tensor:
        """The teacher's deviation per channel."""
        return self.statistics[1] if self.statistics else trunk_of(self.student).get_buffer("feature_scale")

    @property
    def models(self) -> dict[str, Sam3TrackerVideoModel]:
        """Both by name, the teacher first."""
        return {"teacher": self.teacher, "student": self.student}

    @property
    def image_size(self) -> int:
        """Side of the teacher's square input in pixels."""
        return self.teacher.config.image_size

    @property
    def seen_size(self) -> int:
        """Side of the square that the student's trunk makes of its input, in pixels."""
        config: Any = trunk_of(self.student).config
        return config.seen_size

    @torch.no_grad()
    def trunk_features(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's and the student's trunk features, (B, C, G, G), of the teacher's pixels."""
        teacher, student = (
            to_map(trunk_of(model)(resize_BCHW(pixels_B3SS.to(self.device), (side, side))).last_hidden_state)
            for model, side in ((model, model.config.image_size) for model in self.models.values())
        )
        return teacher, student

    def features(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same on the student's grid, (B, C, G, G) each."""
        teacher, student = self.trunk_features(pixels_B3SS)
        return resize_BCHW(teacher, (student.shape[-1],) * 2), student

    def with_statistics(self, batches) -> Pair:
        """Return the same pair with the teacher's statistics over all images in `batches` (of `ImageFeatures`)."""
        # An imported student carries no statistics of the teacher, so they are taken from the images at hand.
        statistics = FeatureStatistics(len(self.mean_C))
        for batch in batches:
            target, _ = self.features(normalise(batch["pixels"]))
            statistics.update(target, valid_mask(batch["sizes"], self.image_size, target.shape[-1]))
        result = statistics.result()
        mean_C, deviation_C = (torch.tensor(result[name], device=self.device) for name in ("mean", "deviation"))
        return replace(self, statistics=(mean_C, deviation_C))


def load_pair(chassis: Path, merged: Path, device: torch.device) -> Pair:
    """Load both on a device."""
    teacher, student = (nn.Module.to(load_tracker(folder), device) for folder in (chassis, merged))
    return Pair(teacher, student, device)


@dataclass(frozen=True, kw_only=True)
class MapPair(Pair):
    """Teacher and a student of trunk and necks; the features that they are compared by are maps of their necks."""

    necks: tuple[Necks, Necks]  # the teacher's, the student's

    @property
    def mean_LC(self) -> list[Tensor]:
        """The teacher's mean per channel of each of `MAPS`, as the student carries it."""
        return [layer.feature_mean for layer in self.necks[1].layers]

    @property
    def deviation_LC(self) -> list[Tensor]:
        """The teacher's deviation, likewise."""
        return [layer.feature_scale for layer in self.necks[1].layers]

    @property
    def mean_C(self) -> Tensor:
        return self.mean_LC[-1]

    @property
    def deviation_C(self) -> Tensor:
        return self.deviation_LC[-1]

    @torch.no_grad()
    def maps(self, pixels_B3SS: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the teacher's and the student's `MAPS`, of the student's sizes."""
        trunks = self.trunk_features(pixels_B3SS)
        teacher, student = (necks(feat) for necks, feat in zip(self.necks, trunks, strict=True))
        return [resize_BCHW(own, (other.shape[-1],) * 2) for own, other in zip(teacher, student, strict=True)], student

    def features(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return both trackers' top maps, (B, C, G, G) each: what is looked at."""
        teacher, student = self.maps(pixels_B3SS)
        return teacher[-1], student[-1]


def load_map_pair(chassis: Path, merged: Path, device: torch.device) -> MapPair:
    """Load both on a device, with both necks of each."""
    pair = load_pair(chassis, merged, device)
    teacher, student = (Necks.from_folder(folder).to(device) for folder in (chassis, merged))
    return MapPair(pair.teacher, pair.student, device, necks=(teacher, student))
