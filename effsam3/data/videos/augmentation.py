# SPDX-License-Identifier: Apache-2.0
"""How training clips are mirrored, turned, sheared and recoloured.

Letters: T frames, M masks, H W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

TURN, SHEAR = 25, 20  # degrees either way, at most; as SAM 2 is trained, like the colours
COLOUR = np.array([0.1, 0.03, 0.03])  # brightness, contrast and saturation of a clip change by this share
FRAME_COLOUR = np.array([0.1, 0.05, 0.05])  # and those of each frame
FILL = 128  # what a turned frame shows where there is no video; the mean colour


@dataclass(frozen=True)
class Augmentation:
    """What is done to a clip, alike in all its frames but for a little colour."""

    mirror: bool
    angle: float  # degrees
    shear_x: float  # degrees
    shear_y: float
    grey: bool  # 1 clip in 20
    colour: np.ndarray  # factors of brightness, contrast and saturation
    frame_seed: int  # of each frame's own factors

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Augmentation:
        """Draw one for a clip."""
        return cls(
            mirror=bool(rng.random() < 0.5),
            angle=float(rng.uniform(-TURN, TURN)),
            shear_x=float(rng.uniform(-SHEAR, SHEAR)),
            shear_y=float(rng.uniform(-SHEAR, SHEAR)),
            grey=bool(rng.random() < 0.05),
            colour=rng.uniform(1 - COLOUR, 1 + COLOUR),
            frame_seed=int(rng.integers(2**32)),
        )

    def move_frames(self, frames_T3HW: Tensor) -> Tensor:
        """Mirror, turn and shear, bilinearly."""
        return self._move(frames_T3HW, InterpolationMode.BILINEAR, [FILL] * 3)

    def move_masks(self, masks_MHW: Tensor) -> Tensor:
        """Return the same to bool masks, by the nearest pixel."""
        return self._move(masks_MHW[:, None].to(torch.uint8), InterpolationMode.NEAREST, [0])[:, 0].bool()

    def unturned(self) -> Augmentation:
        """Without turn and shear."""
        return replace(self, angle=0.0, shear_x=0.0, shear_y=0.0)

    def recolour(self, pixels: Tensor) -> Tensor:
        """Change brightness, contrast and saturation of the clip, and of each frame a little more. uint8 (T, ...)."""
        rng = np.random.default_rng(self.frame_seed)
        factors_T3 = self.colour * rng.uniform(1 - FRAME_COLOUR, 1 + FRAME_COLOUR, (len(pixels), 3))
        frames = []
        for frame, (brightness, contrast, saturation) in zip(pixels, factors_T3.tolist(), strict=True):
            frame = functional.adjust_brightness(frame, brightness)
            frame = functional.adjust_contrast(frame, contrast)
            frames.append(functional.adjust_saturation(frame, 0.0 if self.grey else saturation))
        return torch.stack(frames)

    def _move(self, images: Tensor, interpolation: InterpolationMode, fill: list[int]) -> Tensor:
        if self.mirror:
            images = functional.horizontal_flip(images)
        if self.angle == self.shear_x == self.shear_y == 0:
            return images
        return functional.affine(
            images, self.angle, [0, 0], 1.0, [self.shear_x, self.shear_y], interpolation=interpolation, fill=fill
        )
