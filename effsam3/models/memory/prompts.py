# SPDX-License-Identifier: Apache-2.0
"""Prompts drawn from true masks: a point inside, a loose box, the mask itself, and clicks that correct a prediction.

Labels are SAM's: 1 inside, 0 outside, 2 and 3 a box's corners, -1 no point.

Letters: N objects, S image side in pixels, K = S * S.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KINDS = ("mask", "point", "box")
NO_POINT = -1
BOX_NOISE, BOX_NOISE_PX = 0.1, 20.0  # a corner moves by at most this share of the side, and this many pixels


def draw_kind(shares: dict[str, float], rng: np.random.Generator) -> str:
    """Draw one of `KINDS` by its share."""
    weights = np.array([shares[kind] for kind in KINDS], dtype=float)
    return str(rng.choice(KINDS, p=weights / weights.sum()))


def draw_prompt(mask_SS: Tensor, kind: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a prompt for one object: points (2, 2) as x, y in pixels and labels (2,); `mask` has no points.

    `mask_SS` is boolean and not empty. The point is uniform over the mask. The corners of the tight box are moved by
    up to `BOX_NOISE` of its sides, as SAM 2 trains.
    """
    points, labels = torch.zeros(2, 2), torch.full((2,), NO_POINT, dtype=torch.int32)
    if kind == "mask":
        return points, labels
    rows, columns = (axis.numpy() for axis in mask_SS.nonzero(as_tuple=True))
    if kind == "point":
        chosen = rng.integers(len(rows))
        points[0] = torch.tensor([float(columns[chosen]), float(rows[chosen])])
        labels[0] = 1
        return points, labels
    side = mask_SS.shape[-1]
    # Noise, because users do not draw tight boxes.
    box = np.array([[columns.min(), rows.min()], [columns.max(), rows.max()]], dtype=float)
    reach = np.minimum(BOX_NOISE * (box[1] - box[0]), BOX_NOISE_PX)
    box = (box + rng.uniform(-1, 1, (2, 2)) * reach).clip(0, side - 1)
    return torch.from_numpy(box).float(), torch.tensor([2, 3], dtype=torch.int32)


def draw_clicks(pred_NSS: Tensor, masks_NSS: Tensor, chance_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one correcting click for each object: points (N, 1, 2) as x, y and labels (N, 1).

    One of the pixels where prediction and truth (both boolean) differ: 1 where something was missed, 0 where too much
    was taken. A perfect prediction gets a 0 from outside the object, or a 1 if it fills the image. `chance_N`, uniform
    in 0..1, selects the pixel: drawn for each object apart, it gives the same click whatever else is in the batch.
    """
    wrong_NSS = pred_NSS != masks_NSS
    perfect_N = ~wrong_NSS.flatten(1).any(1)
    allowed_NK = torch.where(perfect_N[:, None, None], ~masks_NSS, wrong_NSS).flatten(1)
    # An object that fills the image leaves no pixel outside: any pixel will do.
    allowed_NK = allowed_NK | ~allowed_NK.any(1, keepdim=True)
    place_NK = allowed_NK.cumsum(1)
    count_N = place_NK[:, -1]
    # By rank among the allowed pixels, computed for all objects at once and without a loop over pixels.
    wanted_N = (chance_N * count_N).long().clamp(max=count_N - 1)
    chosen_N = torch.searchsorted(place_NK, wanted_N[:, None] + 1)[:, 0]
    side = masks_NSS.shape[-1]
    points_N2 = torch.stack([chosen_N % side, chosen_N // side], 1).float()
    labels_N = masks_NSS.flatten(1).gather(1, chosen_N[:, None])
    return points_N2[:, None], labels_N.to(torch.int32)
