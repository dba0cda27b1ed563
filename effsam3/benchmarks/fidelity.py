# SPDX-License-Identifier: Apache-2.0
"""Feature fidelity: how near the student's trunk comes to the teacher's on held-out images.

Letters: B images, C channels, G grid rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch

from effsam3.benchmarks.models import Pair
from effsam3.data.transforms import normalise, valid_mask
from effsam3.errors import UserError
from effsam3.losses.features import agreement_sums, relative_error


def feature_fidelity(pair: Pair, batches) -> dict[str, Any]:
    """Return means over all valid positions of all images in `batches` (of `ImageFeatures`).

    The means are those of `losses.agreement_sums`, by the teacher's training statistics; `neck` is the relative error
    (0 perfect, 1 as bad as zeros) of what the tracker's neck makes of the features; `images` counts.
    """
    encoder: Any = pair.student.vision_encoder
    neck = encoder.neck.fpn_layers[encoder.config.scale_factors.index(1.0)]
    sums: dict[str, torch.Tensor] = {}
    neck_error, images, unreadable = 0.0, 0, []
    for batch in batches:
        unreadable += [f"{key}: {reason}" for key, reason in batch["unreadable"]]
        # Padding and unreadable images have no size.
        kept = batch["sizes"][:, 0] > 0
        if not kept.any():
            continue
        target, pred = pair.features(normalise(batch["pixels"][kept]))
        mask = valid_mask(batch["sizes"][kept], pair.image_size, target.shape[-1]).to(pair.device)
        for name, value in agreement_sums(pred, target, mask, pair.mean_C, pair.deviation_C).items():
            sums[name] = sums.get(name, 0) + value
        with torch.no_grad():
            neck_error += float(relative_error(neck(pred), neck(target), mask)) * len(target)
        images += len(target)
    if not images:
        raise UserError(f"none of the held-out images can be read ({unreadable[0]}); put them back, or index again")
    positions = float(sums.pop("positions"))
    means = {name: float(value) / positions for name, value in sums.items()}
    return means | {"neck": neck_error / images, "images": images, "unreadable": unreadable}
