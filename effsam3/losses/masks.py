# SPDX-License-Identifier: Apache-2.0
"""Losses on predicted masks, SAM 2's published set: pure functions, all in float32, one value per object.

Formulas: SAM 2's released training configuration (focal alpha 0.25, gamma 2). Weights are the recipe's.

Letters: N objects, M candidate masks per object, H W mask rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


def focal(logits_NMHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Sigmoid focal loss, mean over pixels, (N, M): alpha_t (1 - p_t)^gamma BCE; `target_NHW` is 0..1."""
    target_NMHW = target_NHW[:, None].expand_as(logits_NMHW)
    bce = F.binary_cross_entropy_with_logits(logits_NMHW, target_NMHW, reduction="none")
    p = logits_NMHW.sigmoid()
    missed = p * (1 - target_NMHW) + (1 - p) * target_NMHW
    # Most pixels are background and easy; both factors keep them from drowning the object.
    alpha = FOCAL_ALPHA * target_NMHW + (1 - FOCAL_ALPHA) * (1 - target_NMHW)
    return (alpha * missed**FOCAL_GAMMA * bce).mean((-2, -1))


def dice(logits_NMHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Dice loss, (N, M): 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)."""
    p_NMK, target_N1K = logits_NMHW.sigmoid().flatten(2), target_NHW[:, None].flatten(2)
    overlap = (p_NMK * target_N1K).sum(-1)
    return 1 - (2 * overlap + 1) / (p_NMK.sum(-1) + target_N1K.sum(-1) + 1)


def iou(logits_NMHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Intersection over union of `logits > 0` and `target > 0.5`, (N, M); 0 when both are empty."""
    mask, target = (logits_NMHW > 0).flatten(2), (target_NHW[:, None] > 0.5).flatten(2)
    return (mask & target).sum(-1) / (mask | target).sum(-1).clamp(min=1)


def mask_losses(
    logits_NMHW: Tensor,
    iou_NM: Tensor,
    presence_N: Tensor,
    target_NHW: Tensor,
    weights: Mapping[str, float],
    squared_iou: bool = False,
) -> dict[str, Tensor]:
    """Return the four terms for each object, (N,) each and not weighted: `focal`, `dice`, `iou`, `presence`.

    The masks' terms count for the candidate whose weighted sum of both is lowest; every candidate's predicted IoU is
    held to its true one. An object that is not in the frame only has the presence term. The logits are those of the
    decoder, not gated by presence: a visible object that is scored absent keeps a finite loss and its gradient.

    Args:
        iou_NM: predicted IoU of each candidate.
        presence_N: logit of the object being in the frame.
        target_NHW: 0..1; fractions where the target was made smaller by averaging.
        weights: those of `focal` and `dice` in the loss, which decide the candidate; others are not read.
        squared_iou: square the error of the predicted IoU, as in SAM; else its absolute value, as in SAM 2.
    """
    # Sums over a million pixels and powers of small numbers need more than bf16.
    logits_NMHW, target_NHW = logits_NMHW.float(), target_NHW.float()
    present_N = target_NHW.flatten(1).any(1).float()
    focal_NM, dice_NM = focal(logits_NMHW, target_NHW), dice(logits_NMHW, target_NHW)
    # Only the best candidate learns, so the three can specialise in part, object and group instead of averaging them.
    best_N1 = (weights["focal"] * focal_NM + weights["dice"] * dice_NM).argmin(1, keepdim=True)
    error_NM = iou_NM.float() - iou(logits_NMHW, target_NHW)
    return {
        "focal": focal_NM.gather(1, best_N1)[:, 0] * present_N,
        "dice": dice_NM.gather(1, best_N1)[:, 0] * present_N,
        "iou": (error_NM.square() if squared_iou else error_NM.abs()).mean(1) * present_N,
        "presence": F.binary_cross_entropy_with_logits(presence_N.float(), present_N, reduction="none"),
    }


def at_side(logits_NMLL: Tensor, masks_NSS: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Bring logits (up, bilinear) and boolean masks (down, averaged) to `side` pixels for the losses."""
    target_NSS = masks_NSS.float()
    if target_NSS.shape[-1] != side:
        # By area, so that a thin object fades instead of vanishing.
        target_NSS = F.interpolate(target_NSS[:, None], (side, side), mode="area")[:, 0]
    logits = logits_NMLL.float()
    if logits.shape[-1] != side:
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
    return logits, target_NSS


def object_weights(clip_N: Tensor, clips: int) -> Tensor:
    """Weight of each object, (N,), summing to 1: clips weigh alike, and so do the objects of a clip.

    So a micro-batch's loss is a mean over its clips, and dividing a batch in another way changes nothing.
    """
    count_B = torch.bincount(clip_N, minlength=clips)
    # Without this, a clip with three objects would count three times as much as one with a single object.
    return 1 / (count_B[clip_N] * clips)
