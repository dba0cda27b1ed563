# SPDX-License-Identifier: Apache-2.0
"""From decoded images to what SAM 3's trunk sees: resize, normalise, and which positions of a grid are image.

Legend: B batch, C colour (RGB), H W pixels of the original, S side of the square input in pixels, G side of a grid.
Pixels are uint8 0..255 until `normalise`, then float -1..1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torchvision.transforms.v2 import functional

Resize = Literal["square", "longest_side"]
IMAGE_MEAN = IMAGE_STD = 0.5  # of pixels / 255, all three colours, as in SAM 3's own processor
PAD_VALUE = 128  # the mean colour is 127.5, which uint8 has not; the valid mask leaves the padding out


def resize_image(image_HWC: np.ndarray, image_size: int, resize: Resize) -> tuple[torch.Tensor, tuple[int, int]]:
    """Resize a uint8 RGB image [H, W, 3] to the square input: uint8 [3, S, S] and its (rows, columns) of image.

    square: the whole image to S x S, bit for bit what SAM 3's processor does before it normalises.
    longest_side: the aspect ratio is kept, the right or the bottom is padded with PAD_VALUE.
    """
    assert image_HWC.dtype == np.uint8 and image_HWC.ndim == 3 and image_HWC.shape[2] == 3, image_HWC.shape
    # The permuted view is channels-last, which torch's uint8 kernel resizes three times faster, to the same values.
    pixels_CHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)
    if resize == "square":
        return functional.resize(pixels_CHW, [image_size, image_size], antialias=True), (image_size, image_size)
    assert resize == "longest_side", resize
    # By the function that tells the valid size of stored features, so that both agree to the pixel.
    height, width = resized_size(image_HWC.shape[0], image_HWC.shape[1], image_size, resize)
    padded_CHW = torch.full((3, image_size, image_size), PAD_VALUE, dtype=torch.uint8)
    padded_CHW[:, :height, :width] = functional.resize(pixels_CHW, [height, width], antialias=True)
    return padded_CHW, (height, width)


def resized_size(height: int, width: int, image_size: int, resize: str) -> tuple[int, int]:
    """Return the (rows, columns) that `resize_image` leaves of an image of this height and width."""
    if resize == "square":
        return image_size, image_size
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pixels 0..255 of any shape into float32 -1..1: (x / 255 - 0.5) / 0.5."""
    return (pixels.float() - 255 * IMAGE_MEAN) / (255 * IMAGE_STD)


def valid_mask(sizes_B2: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """Return float [B, 1, G, G]: 1 where a grid position sees image, 0 where it sees padding.

    `sizes_B2` holds the (rows, columns) of image as `resize_image` gives them; (0, 0) gives all zeros. Equal to ones
    on [:rows, :columns] of the S x S input, resized bilinearly (align_corners=False) to the grid, above one half.
    """
    centres_G = (torch.arange(grid, device=sizes_B2.device) + 0.5) * (image_size / grid) - 0.5
    share_B2G = (sizes_B2[..., None] - centres_G.clamp(0, image_size - 1)).clamp(0, 1)
    return (share_B2G[:, 0, :, None] * share_B2G[:, 1, None, :] > 0.5).float()[:, None]
