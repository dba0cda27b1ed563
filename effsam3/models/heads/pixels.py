# SPDX-License-Identifier: Apache-2.0
"""The pixels that a detector's masks are made of: SAM 3's pixel decoder, with what phrases share computed once.

The decoder goes from the coarsest level, which depends on the phrase, to the finest. At each finer one it doubles what
it has, adds the image's own map and convolves both. A convolution is linear: the map's share does not depend on the
phrase, and the doubled share needs a quarter of the products, as most of what it reads is there twice.

Coarse masks need every second row and column of the finest level only. They are made as they are in all masks, but the
level's normalisation sees a quarter of the places; `fill_between` makes masks of the full size of them.

Letters: B images, R phrases, C channels, H W rows and columns of the coarser map, G side of the coarsest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS_AT_ONCE = 1 << 26  # numbers held at a time: all phrases' would be most of what a forward pass holds


def shares_of(pixel_decoder: Any, maps: tuple[Tensor, ...], coarse: bool = False) -> tuple[Tensor, ...]:
    """Return what the maps of images, finest first, add at each finer level, coarsest first; bias included.

    `coarse`: of the finest level only every second row and column, from the first on.
    """
    shares = [pixel_decoder.conv_layers[step](level_BCxx) for step, level_BCxx in enumerate(maps[-2:0:-1])]
    finest = pixel_decoder.conv_layers[len(shares)]
    last = F.conv2d(maps[0], finest.weight, finest.bias, 2, 1) if coarse else finest(maps[0])
    return (*shares, last)


def pixels_of(pixel_decoder: Any, coarse_RCGG: Tensor, shares: tuple[Tensor, ...], image_R: Tensor) -> Tensor:
    """Return the pixels (R, C, M, M) of phrases; `shares` are those of all images, `image_R` says on which each is.

    Of coarse shares they are every second row and column: (R, C, M / 2, M / 2).
    """
    found = coarse_RCGG
    for step, share_BCxx in enumerate(shares):
        convolve = convolve_doubled if share_BCxx.shape[-1] > found.shape[-1] else convolve_every_second
        own = convolve(found, pixel_decoder.conv_layers[step].weight) + of_phrases(share_BCxx, image_R)
        found = F.relu(pixel_decoder.norms[step](own))
    return found


def of_phrases(tensor_B: Tensor, image_R: Tensor) -> Tensor:
    """Return what each phrase's image has, (R, ...); of a single image nothing is copied."""
    return tensor_B.expand(len(image_R), *tensor_B.shape[1:]) if len(tensor_B) == 1 else tensor_B[image_R]


def convolve_doubled(coarse_RCHW: Tensor, weight: Tensor) -> Tensor:
    """Double a map by repeating rows and columns, and convolve it with a 3x3 `weight`, zeros around: (R, ., 2H, 2W).

    Each of the nine taps is applied to the coarse map, where there is a quarter of the places, and put where it
    belongs.
    """
    each_tap = weight.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None]  # 1x1, one after another
    rows = max(1, TAPS_AT_ONCE // (len(each_tap) * coarse_RCHW[0, 0].numel()))
    found = []
    for some in coarse_RCHW.split(rows):
        taps_R33CHW = F.conv2d(some, each_tap).unflatten(1, (3, 3, -1))  # by row, by column
        found.append(_between(_between(taps_R33CHW, -2), -1))
    return found[0] if len(found) == 1 else torch.cat(found)


def convolve_every_second(coarse_RCHW: Tensor, weight: Tensor) -> Tensor:
    """Return every second row and column, from the first on, of what `convolve_doubled` returns: (R, ., H, W).

    Place 2y of the doubled map has y - 1 before it, and y at and after it: a 2x2 kernel.
    """
    rows = torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2)
    kernel = torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], 3)
    return F.conv2d(F.pad(coarse_RCHW, (1, 0, 1, 0)), kernel)


def fill_between(masks_RFHW: Tensor) -> Tensor:
    """Return masks (R, F, 2H, 2W) of which `masks_RFHW` are every second row and column.

    What lies between two is their mean; the last row and column are there twice.
    """
    for dim in (-2, -1):
        after = torch.cat([masks_RFHW.narrow(dim, 1, masks_RFHW.shape[dim] - 1), masks_RFHW.narrow(dim, -1, 1)], dim)
        masks_RFHW = torch.stack([masks_RFHW, (masks_RFHW + after) / 2], dim).flatten(dim - 1, dim)
    return masks_RFHW


def _between(taps_R3: Tensor, dim: int) -> Tensor:
    """Add up three taps (second axis) where they belong along `dim`, which doubles.

    Place 2y of the doubled map has y - 1 before it and y after it, place 2y + 1 has y before it and y + 1 after it.
    """
    before, own, after = taps_R3.unbind(1)
    most = own.shape[dim] - 1
    even, odd = own + after, before + own
    even.narrow(dim, 1, most).add_(before.narrow(dim, 0, most))
    odd.narrow(dim, 0, most).add_(after.narrow(dim, 1, most))
    return torch.stack([even, odd], dim).flatten(dim - 1, dim)
