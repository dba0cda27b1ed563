# SPDX-License-Identifier: Apache-2.0
"""The teacher: SAM 3's frozen ViT trunk (and, for `tap: neck`, its FPN), and the guard that it is what it claims.

Letters: B images, C channels, G grid rows and columns, S image side in pixels, P positions of all images together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3VisionConfig, Sam3ViTModel
from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck

from effsam3.models.chassis.tensors import (
    NECK,
    TRUNK,
    ChassisError,
    fingerprint,
    load_part,
    read_config,
    read_tensors,
)
from effsam3.models.image.student import resize_BCHW
from effsam3.models.registry import of_type

# A trunk that merely resizes the image has R2 = 1 against the image; random trunks stay under 0.8, see LOG.md.
MAX_EXPLAINED_BY_PIXELS = 0.98


class Teacher(nn.Module):
    """Frozen SAM 3 vision features: normalised pixels (B, 3, S, S) to (B, C, G, G) float32.

    `tap: trunk` is the ViT's output (1024 channels), what a student replaces; `tap: neck` is the FPN's level at the
    trunk's own grid (256 channels). A smaller `grid` shrinks either, bilinear and antialiased.
    """

    part = "trunk"

    def __init__(self, config: Sam3VisionConfig, tap: str = "trunk", grid: int | None = None):
        """Build it from a SAM 3's sizes, without its weights.

        Raises:
            ChassisError: `grid` is finer than the teacher's.
        """
        super().__init__()
        trunk: Any = config.backbone_config
        self.image_size = trunk.image_size
        own_grid = trunk.image_size // trunk.patch_size
        self.grid = own_grid if grid is None else grid
        if self.grid > own_grid:
            raise ChassisError(
                f"embed.grid is {grid}, finer than the teacher's {own_grid}x{own_grid}; choose at most {own_grid}, or "
                "leave it out"
            )
        self.tap = tap
        self.trunk = Sam3ViTModel(trunk)
        self.neck = Neck(config) if tap == "neck" else None
        self.channels = trunk.hidden_size if tap == "trunk" else config.fpn_hidden_size
        self.fingerprint = ""  # of the trunk's weights, once it has them
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path, tap: str = "trunk", grid: int | None = None) -> Teacher:
        """Load it from a chassis folder.

        Raises:
            ChassisError: the folder's trunk is not SAM 3's ViT, is incomplete, or `grid` is finer than the teacher's.
        """
        whole = read_config(folder)
        config = whole.detector_config.vision_config
        if (kind := config.backbone_config.model_type) != (own := of_type(whole.model_type).trunk_type):
            raise ChassisError(
                f"sam3.checkpoint: the trunk of {folder} is a {kind!r}, a student already; the teacher must be SAM 3 "
                f"itself (backbone {own!r})"
            )
        tensors = read_tensors(folder, TRUNK)
        teacher = cls(config, tap, grid)
        load_part(teacher.trunk, tensors).float()
        if teacher.neck is not None:
            teacher.neck = Neck.from_folder(folder)
        teacher.fingerprint = fingerprint(tensors)
        return teacher

    @property
    def own(self) -> nn.Module:
        """What `fingerprint` is of: the trunk, without a neck."""
        return self.trunk

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode whatever mode the loop sets."""
        return super().train(False)

    def compile_layers(self) -> None:
        """Let torch.compile each layer of the trunk where it is; its tensors keep their names."""
        # Not the whole trunk: two graphs, of layers with and without windows, serve all of them and are soon compiled.
        for layer in self.trunk.layers:
            layer.compile(fullgraph=True)

    @torch.no_grad()
    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Return features (B, C, G, G), float32."""
        feat_BCGG = to_map(self.trunk(pixels_B3SS).last_hidden_state)
        if self.neck is not None:
            feat_BCGG = self.neck(feat_BCGG)
        return resize_BCHW(feat_BCGG.float(), (self.grid, self.grid))


class Neck(nn.Module):
    """SAM 3's frozen FPN, reduced to the level that keeps the trunk's grid: (B, 1024, G, G) to (B, 256, G, G)."""

    def __init__(self, config: Sam3VisionConfig):
        """Build it from a SAM 3's sizes, without its weights."""
        super().__init__()
        scale_factors: Any = config.scale_factors
        self.level = scale_factors.index(1.0)
        self.layer = Sam3VisionNeck(config).fpn_layers[self.level]
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path) -> Neck:
        """Load the detector's FPN layer at scale 1 from a chassis folder.

        Raises:
            ChassisError: it is missing or of other sizes.
        """
        neck = cls(read_config(folder).detector_config.vision_config)
        load_part(neck.layer, read_tensors(folder, f"{NECK}fpn_layers.{neck.level}."))
        return neck

    def forward(self, feat_BCGG: Tensor) -> Tensor:
        return self.layer(feat_BCGG)


def to_map(feat_BNC: Tensor) -> Tensor:
    """Turn row-major positions (B, G*G, C) into a map (B, C, G, G)."""
    side = round(feat_BNC.shape[1] ** 0.5)
    return feat_BNC.transpose(1, 2).unflatten(2, (side, side))


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters, buffers not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_features(feat_BCGG: Tensor, pixels_B3SS: Tensor) -> None:
    """Refuse features that a real trunk cannot have made of these images (two or more different ones).

    Raises:
        ChassisError: features that are not finite, do not depend on the image, or are a linear function of the resized
            image (R2 over all channels at or above 0.98): a resized picture passed off as features.
    """
    if not feat_BCGG.isfinite().all():
        raise ChassisError("the teacher's features are not finite; check sam3.checkpoint and train.precision")
    feat_BCGG = feat_BCGG.float()
    total = feat_BCGG.var(dim=(0, 2, 3), correction=0)
    # What differs from image to image at one position, against all that varies.
    between = (feat_BCGG - feat_BCGG.mean(dim=0)).square().mean(dim=(0, 2, 3))
    if len(feat_BCGG) > 1 and (between <= 1e-6 * total).all():
        raise ChassisError("the teacher gives every image the same features; check sam3.checkpoint")
    explained = explained_by_pixels(feat_BCGG, pixels_B3SS)
    if explained >= MAX_EXPLAINED_BY_PIXELS:
        raise ChassisError(
            f"the teacher's features are a linear function of the resized image (R2 = {explained:.3f}, a trunk stays "
            f"under {MAX_EXPLAINED_BY_PIXELS}): this is a resized picture, not SAM 3. Check sam3.checkpoint"
        )


def explained_by_pixels(feat_BCGG: Tensor, pixels_B3SS: Tensor) -> float:
    """R2 (at most 1) of the best linear prediction of the features from the image resized to the grid.

    The image is offered averaged, sampled bilinearly and at its nearest pixel, so that no way of resizing hides.
    """
    size = feat_BCGG.shape[-2:]
    resized = [
        F.interpolate(pixels_B3SS, size, mode="bilinear", align_corners=False, antialias=antialias)
        for antialias in (True, False)
    ] + [F.interpolate(pixels_B3SS, size, mode="nearest")]
    design_PK = torch.cat([*resized, torch.ones_like(resized[0][:, :1])], 1).movedim(1, -1).flatten(0, 2).double()
    target_PC = feat_BCGG.movedim(1, -1).flatten(0, 2).double()
    residual_PC = target_PC - design_PK @ (torch.linalg.pinv(design_PK) @ target_PC)
    total = (target_PC - target_PC.mean(0)).square().sum()
    return float(1 - residual_PC.square().sum() / total) if total > 0 else 1.0
