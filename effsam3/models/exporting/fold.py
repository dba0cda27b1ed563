# SPDX-License-Identifier: Apache-2.0
"""Branches and norms of students multiplied out, which are there for training only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from effsam3.models.exporting.parts import Trunk
from effsam3.models.image.student import StudentBackbone
from effsam3.models.text.student import fold_repmixer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Folded(NamedTuple):
    """What was folded: BatchNorms before and after, and by how much the output moved, as a share of its range."""

    norms_before: int
    norms_after: int
    drift: float


@torch.no_grad()
def fold(model: Any, seed: int = 0) -> dict[str, Folded]:
    """Fold the trunk and the text encoder of a whole model in place; it must be float32 and in eval mode.

    Returns:
        What was folded by the names of the parts; SAM 3's own have nothing to fold. Norms that are left have no
        convolution of their own before them as timm knows it; onnxruntime and OpenVINO fold most of them.
    """
    detector = model.detector_model
    draw = torch.Generator().manual_seed(seed)
    found = {}
    trunk = detector.vision_encoder.backbone
    if isinstance(trunk, StudentBackbone) and norms(trunk):
        side = trunk.config.image_size
        pixels = torch.rand(1, 3, side, side, generator=draw) * 2 - 1
        before, there = Trunk(detector.vision_encoder)(pixels), norms(trunk)
        # Once and in float32: a second time fails for some trunks, and half precision comes back mixed.
        trunk.trunk = reparameterize_model(trunk.trunk)
        found["trunk"] = Folded(there, norms(trunk), share(before, Trunk(detector.vision_encoder)(pixels)))
    if there := norms(detector.text_encoder):
        ids = torch.randint(1, 40000, (1, 32), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        before = detector.text_encoder(**inputs).last_hidden_state
        detector.text_encoder = fold_repmixer(detector.text_encoder)
        after = detector.text_encoder(**inputs).last_hidden_state
        found["text_encoder"] = Folded(there, norms(detector.text_encoder), share(before, after))
    return found


def norms(module: nn.Module) -> int:
    """Count BatchNorms."""
    return sum(isinstance(part, NORMS) for part in module.modules())


def share(wanted: Tensor, found: Tensor) -> float:
    """Return the largest difference as a share of the range of what is wanted; of one number, the difference."""
    full, other = wanted.double(), found.double()
    return float((full - other).abs().max()) / (float(full.max() - full.min()) or 1.0)
