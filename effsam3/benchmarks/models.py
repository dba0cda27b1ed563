# SPDX-License-Identifier: Apache-2.0
"""The two models that every benchmark compares: the chassis as the teacher, the merged model as the student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from effsam3.models.prompted import load_tracker, trunk_of
from effsam3.models.teacher import to_map


@dataclass(frozen=True)
class Pair:
    """Teacher and student, whole trackers on one device, frozen."""

    teacher: nn.Module
    student: nn.Module
    device: torch.device

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.teacher.config.image_size

    @torch.no_grad()
    def features(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's trunk features, (B, C, G, G) each."""
        teacher, student = (
            to_map(trunk_of(model)(pixels_B3SS.to(self.device)).last_hidden_state)
            for model in (self.teacher, self.student)
        )
        return teacher, student


def load_pair(chassis: Path, merged: Path) -> Pair:
    """Load both on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Pair(load_tracker(chassis).to(device), load_tracker(merged).to(device), device)
