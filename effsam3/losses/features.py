# SPDX-License-Identifier: Apache-2.0
"""Distillation losses on feature maps: pure functions, all in float32.

Letters: B images, C channels, H W grid rows and columns. `valid_B1HW` is 1 on the image and 0 on padding; an image
without one valid position (unreadable, or padding of a batch) counts nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def standardise(feat_BCHW: Tensor, mean_C: Tensor, deviation_C: Tensor) -> Tensor:
    """Bring every channel to mean 0 and deviation 1 by the teacher's statistics."""
    return (feat_BCHW.float() - mean_C[:, None, None]) / deviation_C[:, None, None]


def mean_over_images(value_BHW: Tensor, valid_B1HW: Tensor) -> Tensor:
    """Return the mean over each image's valid positions, then over the images that have any; 0 if none has."""
    valid_BHW = valid_B1HW[:, 0]
    # Per image first: a narrow image has fewer valid positions, but must not count less.
    count_B = valid_BHW.sum((1, 2))
    mean_B = (value_BHW * valid_BHW).sum((1, 2)) / count_B.clamp(min=1)
    return mean_B.sum() / (count_B > 0).sum().clamp(min=1)


class _Compared(torch.autograd.Function):
    """Squared error, summed over channels, and cosine distance of float32 maps, (B, H, W) each.

    By a formula for both gradients at once: torch's own keep and read several more copies of the maps. The target gets
    no gradient.
    """

    @staticmethod
    def forward(ctx, pred_BCHW: Tensor, target_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        assert not ctx.needs_input_grad[1], "the target is a teacher's"
        error_BHW = (pred_BCHW - target_BCHW).square_().sum(1)
        # As small as F.cosine_similarity lets a norm be.
        pred_norm_BHW, target_norm_BHW = (
            torch.linalg.vector_norm(feat, dim=1).clamp(min=1e-8) for feat in (pred_BCHW, target_BCHW)
        )
        cosine_BHW = (pred_BCHW * target_BCHW).sum(1) / (pred_norm_BHW * target_norm_BHW)
        ctx.save_for_backward(pred_BCHW, target_BCHW, pred_norm_BHW, target_norm_BHW, cosine_BHW)
        return error_BHW, 1 - cosine_BHW

    @staticmethod
    def backward(ctx, by_error_BHW: Tensor, by_distance_BHW: Tensor) -> tuple[Tensor, None]:
        pred_BCHW, target_BCHW, pred_norm_BHW, target_norm_BHW, cosine_BHW = ctx.saved_tensors
        of_pred_BHW = 2 * by_error_BHW + by_distance_BHW * cosine_BHW / pred_norm_BHW.square()
        of_target_BHW = -2 * by_error_BHW - by_distance_BHW / (pred_norm_BHW * target_norm_BHW)
        grad_BCHW = (pred_BCHW * of_pred_BHW[:, None]).addcmul_(target_BCHW, of_target_BHW[:, None])
        return grad_BCHW, None


def mse_per_position(pred_BCHW: Tensor, target_BCHW: Tensor, channels: str) -> Tensor:
    """Squared error (B, H, W), averaged (`channels: mean`) or summed (`channels: sum`, EfficientSAM3's) over C."""
    # In float32, because differences of bf16 features lose most of their digits.
    error_BCHW = (pred_BCHW.float() - target_BCHW.float()).square()
    return error_BCHW.mean(1) if channels == "mean" else error_BCHW.sum(1)


def feature_loss(
    pred_BCHW: Tensor,
    target_BCHW: Tensor,
    valid_B1HW: Tensor,
    channels: str,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masked MSE and masked cosine distance between feature maps, as scalars `mse` and `cosine`.

    Both maps are standardised first by `statistics`, the teacher's mean and deviation (C each), where they are given.
    With `channels: sum` on raw features this is EfficientSAM3's stage 1 loss: the mean over images of
    sum((p - t)^2 m) / max(sum(m), 1) and of sum((1 - cos) m) / max(sum(m), 1).
    """
    pred, target = (
        feat.float() if statistics is None else standardise(feat, *statistics) for feat in (pred_BCHW, target_BCHW)
    )
    error_BHW, distance_BHW = _Compared.apply(pred, target)
    if channels == "mean":
        error_BHW = error_BHW / pred_BCHW.shape[1]
    return {"mse": mean_over_images(error_BHW, valid_B1HW), "cosine": mean_over_images(distance_BHW, valid_B1HW)}


def relative_error(pred_BCHW: Tensor, target_BCHW: Tensor, valid_B1HW: Tensor) -> Tensor:
    """Masked squared error in units of the target's own mean square: 1 for a prediction of zero. A scalar.

    For maps without statistics of their own, such as what the neck makes of the features.
    """
    error = mean_over_images(mse_per_position(pred_BCHW, target_BCHW, "mean"), valid_B1HW)
    energy = mean_over_images(target_BCHW.float().square().mean(1), valid_B1HW)
    # Relative, because a neck's output has no recorded statistics and any scale.
    return error / energy.clamp(min=1e-12)


def agreement_sums(
    pred_BCHW: Tensor, target_BCHW: Tensor, valid_B1HW: Tensor, mean_C: Tensor, deviation_C: Tensor
) -> dict[str, Tensor]:
    """Sum over valid positions how close a student is, to be added up over batches and ranks.

    `positions` counts them. `cosine` is on raw features; `cosine_centred` and `mse` are on features standardised by
    the teacher's mean and deviation, where always predicting the mean scores 0 and 1; `cosine_of_mean` is the raw
    cosine of that predictor.
    """
    pred, target = pred_BCHW.float(), target_BCHW.float()
    centred, target_centred = (standardise(feat, mean_C, deviation_C) for feat in (pred, target))
    per_position = {
        "cosine": F.cosine_similarity(pred, target, dim=1),
        "cosine_centred": F.cosine_similarity(centred, target_centred, dim=1),
        "mse": mse_per_position(centred, target_centred, "mean"),
        # What a student without any skill reaches: raw features share a large mean, so a cosine of 0.9 may mean
        # nothing.
        "cosine_of_mean": F.cosine_similarity(mean_C[:, None, None].expand_as(target), target, dim=1),
    }
    # Double, because a float32 sum of ones stops growing at 16.8 million positions.
    valid = valid_B1HW[:, 0].double()
    return {name: (value * valid).sum() for name, value in per_position.items()} | {"positions": valid.sum()}


def map_means(sums: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Turn sums of several maps into means: over all maps, each counting alike, and {map: means}.

    `sums` are those of `agreement_sums` under names `map/sum`.
    """
    by_map: dict[str, dict[str, float]] = {}
    for name, value in sums.items():
        one, _, key = name.partition("/")
        by_map.setdefault(one, {})[key] = float(value)
    for own in by_map.values():
        positions = max(own.pop("positions"), 1.0)
        own |= {key: value / positions for key, value in own.items()}
    keys = next(iter(by_map.values()))
    return {key: sum(own[key] for own in by_map.values()) / len(by_map) for key in keys}, by_map
