# SPDX-License-Identifier: Apache-2.0
"""Feature fidelity: how near the student's trunk, or its necks, come to the teacher's on held-out images.

Letters: B images, C channels, G grid rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effsam3.benchmarks.models import MapPair, Pair
from effsam3.data.transforms import normalise, valid_mask
from effsam3.errors import UserError
from effsam3.losses.features import agreement_sums, map_means, relative_error
from effsam3.models.vision.training import MAPS


def feature_fidelity(pair: Pair, batches) -> dict[str, Any]:
    """Return means over all valid positions of all images in `batches` (of `ImageFeatures`).

    The means are those of `losses.agreement_sums`, by the teacher's training statistics; `neck` is the relative error
    (0 perfect, 1 as bad as zeros) of what the tracker's neck makes of the features; `images` counts.
    """
    encoder: Any = pair.student.vision_encoder
    neck = encoder.neck.fpn_layers[encoder.config.scale_factors.index(1.0)]
    sums: dict[str, torch.Tensor] = {}
    unreadable: list[str] = []
    neck_error, images = 0.0, 0
    for pixels, sizes in readable(batches, unreadable):
        target, pred = pair.features(pixels)
        mask = valid_mask(sizes, pair.image_size, target.shape[-1]).to(pair.device)
        add(sums, agreement_sums(pred, target, mask, pair.mean_C, pair.deviation_C))
        with torch.no_grad():
            neck_error += float(relative_error(neck(pred), neck(target), mask)) * len(target)
        images += len(target)
    positions = float(sums.pop("positions"))
    means = {name: float(value) / positions for name, value in sums.items()}
    return means | {"neck": neck_error / images, "images": images, "unreadable": unreadable}


def map_fidelity(pair: MapPair, batches) -> dict[str, Any]:
    """Return how near the maps of a student of trunk and necks come to the teacher's.

    The means are those of `losses.agreement_sums`: over all `MAPS`, and of each under `maps`; `images` counts.
    """
    sums: dict[str, torch.Tensor] = {}
    unreadable: list[str] = []
    images = 0
    for pixels, sizes in readable(batches, unreadable):
        each = zip(MAPS, *pair.maps(pixels), pair.mean_LC, pair.deviation_LC, strict=True)
        for name, target, pred, mean_C, deviation_C in each:
            mask = valid_mask(sizes, pair.image_size, target.shape[-1]).to(pair.device)
            found = agreement_sums(pred, target, mask, mean_C, deviation_C)
            add(sums, {f"{name}/{key}": value for key, value in found.items()})
        images += len(pixels)
    means, by_map = map_means(sums)
    return means | {"maps": by_map, "images": images, "unreadable": unreadable}


def readable(batches, unreadable: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the normalised pixels and the sizes of the images that can be read; the others go into `unreadable`.

    Raises:
        UserError: none can be.
    """
    images = 0
    for batch in batches:
        unreadable += [f"{key}: {reason}" for key, reason in batch["unreadable"]]
        # Padding and unreadable images have no size.
        kept = batch["sizes"][:, 0] > 0
        if kept.any():
            images += int(kept.sum())
            yield normalise(batch["pixels"][kept]), batch["sizes"][kept]
    if not images:
        raise UserError(f"none of the held-out images can be read ({unreadable[0]}); put them back, or index again")


def add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add up sums, in place."""
    for name, value in found.items():
        sums[name] = sums[name] + value if name in sums else value
