# SPDX-License-Identifier: Apache-2.0
"""Prompts: points, a loose box, the mask itself, drawn from true masks or from none; clicks that correct a prediction.

Labels are SAM's: 1 inside, 0 outside, 2 and 3 a box's corners, -1 no point.

Letters: N objects, S image side in pixels, P points, K some pixels or all S * S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("mask", "point", "box", "mixed")  # mixed: a box and points
NO_POINT = -1
FEWEST = 2  # places for points of a prompt: a box's corners
BOX_SIDES = (1 / 16, 1 / 2)  # of boxes where no object is known, in shares of the image


@dataclass(frozen=True)
class PromptStyle:
    """How points and boxes are drawn."""

    points: int = 1  # inside, at most: a mask may have fewer pixels
    centre: bool = False  # the first of them is the mask's mean row and column, where that is inside
    negatives: int = 0  # points outside
    jitter: float = 0.1  # a box's corner moves by at most this share of its side ...
    jitter_px: float = 20.0  # ... and this many pixels


def draw_kind(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    """Draw one of `KINDS` by its share; a kind without one is not drawn."""
    weights = np.array([shares.get(kind, 0.0) for kind in KINDS])
    return str(rng.choice(KINDS, p=weights / weights.sum()))


def draw_prompt(
    mask_SS: Tensor, kind: str, rng: np.random.Generator, style: PromptStyle = PromptStyle()
) -> tuple[Tensor, Tensor]:
    """Draw a prompt for one object: points (P, 2) as x, y in pixels and labels (P,), P at least `FEWEST`.

    `mask_SS` is boolean. An empty one and the kind `mask` give no points. Points are uniform over the mask, and over
    what is outside, without one twice. The corners of the tight box are moved at random, as SAM 2 trains.
    """
    points: list[tuple[float, float]] = []
    labels: list[int] = []
    if kind != "mask" and mask_SS.any():
        if kind in ("box", "mixed"):
            points, labels = _box(mask_SS, rng, style), [2, 3]
        if kind in ("point", "mixed"):
            inside = _inside(mask_SS, rng, style)
            outside = _pick((~mask_SS).nonzero(), style.negatives, rng) if style.negatives else []
            points, labels = points + inside + outside, labels + [1] * len(inside) + [0] * len(outside)
    unused = max(FEWEST - len(points), 0)
    return torch.tensor(points + [(0.0, 0.0)] * unused), torch.tensor(labels + [NO_POINT] * unused, dtype=torch.int32)


def draw_anywhere(kind: str, place: int, places: int, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a point or a box where no object is known: points (P, 2) as x, y in pixels and labels (P,), P = 1 or 2.

    The image is divided into a square grid of at least `places` cells; the point, or the box's centre, is anywhere in
    the one of `place`. A box's sides are `BOX_SIDES` of the image, drawn in proportion: there are as many small ones.
    """
    columns = math.isqrt(places - 1) + 1
    centre = (np.array([place % columns, place // columns]) + rng.random(2)) * (side / columns) - 0.5
    if kind == "point":
        corners, labels = centre.clip(0, side - 1)[None], [1]
    else:
        smallest, largest = np.log(BOX_SIDES).tolist()
        half = np.exp(rng.uniform(smallest, largest, 2)) * side / 2
        corners, labels = np.stack([centre - half, centre + half]).clip(0, side - 1), [2, 3]
    return torch.tensor(corners, dtype=torch.float32), torch.tensor(labels, dtype=torch.int32)


def rescale(points: Tensor, side: int, other: int) -> Tensor:
    """Bring points in pixels of a square image of one side to one of another side; a pixel is where its centre is."""
    return (points + 0.5) * (other / side) - 0.5


def _box(mask_SS: Tensor, rng: np.random.Generator, style: PromptStyle) -> list[tuple[float, float]]:
    rows, columns = (axis.numpy() for axis in mask_SS.nonzero(as_tuple=True))
    # Noise, because users do not draw tight boxes.
    box = np.array([[columns.min(), rows.min()], [columns.max(), rows.max()]], dtype=float)
    reach = np.minimum(style.jitter * (box[1] - box[0]), style.jitter_px)
    box = (box + rng.uniform(-1, 1, (2, 2)) * reach).clip(0, mask_SS.shape[-1] - 1)
    return [(x, y) for x, y in box.tolist()]


def _inside(mask_SS: Tensor, rng: np.random.Generator, style: PromptStyle) -> list[tuple[float, float]]:
    places_K2 = mask_SS.nonzero()
    row, column = places_K2.double().mean(0).int().tolist()
    if not (style.centre and mask_SS[row, column]):
        return _pick(places_K2, style.points, rng)
    others_K2 = places_K2[(places_K2 != torch.tensor([row, column])).any(1)]
    return [(float(column), float(row)), *_pick(others_K2, style.points - 1, rng)]


def _pick(places_K2: Tensor, count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Draw some of these places (row, column), none of them twice, as x, y."""
    chosen: list[int] = []
    for taken in range(min(count, len(places_K2))):
        place = int(rng.integers(len(places_K2) - taken))  # among those that are left
        for earlier in sorted(chosen):
            place += place >= earlier
        chosen.append(place)
    return [(float(column), float(row)) for row, column in places_K2[chosen].tolist()]


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
