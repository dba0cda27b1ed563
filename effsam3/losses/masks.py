# SPDX-License-Identifier: Apache-2.0
"""Losses on predicted masks: pure functions, all in float32, one value per object.

Formulas: SAM 2's released training configuration (focal alpha 0.25, gamma 2), and what trainers of its memory on one's
own videos use (BCE, dice, a soft IoU, agreement over time). p is the sigmoid of a logit, t the target. Weights are the
recipe's.

Letters: N objects, M candidate masks per object, T frames, H W mask rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
SMOOTH = 1.0  # SAM 2's: keeps the dice of small masks from jumping


def focal(logits_NMHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Sigmoid focal loss, mean over pixels, (N, M): alpha_t (1 - p_t)^gamma BCE; `target_NHW` is 0..1."""
    target_NMHW = target_NHW[:, None].expand_as(logits_NMHW)
    bce = F.binary_cross_entropy_with_logits(logits_NMHW, target_NMHW, reduction="none")
    p = logits_NMHW.sigmoid()
    missed = p * (1 - target_NMHW) + (1 - p) * target_NMHW
    # Most pixels are background and easy; both factors keep them from drowning the object.
    alpha = FOCAL_ALPHA * target_NMHW + (1 - FOCAL_ALPHA) * (1 - target_NMHW)
    return (alpha * missed**FOCAL_GAMMA * bce).mean((-2, -1))


def bce(logits_NMHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Binary cross entropy, mean over pixels, (N, M): -t ln p - (1 - t) ln(1 - p)."""
    target_NMHW = target_NHW[:, None].expand_as(logits_NMHW)
    return F.binary_cross_entropy_with_logits(logits_NMHW, target_NMHW, reduction="none").mean((-2, -1))


def dice(logits_NMHW: Tensor, target_NHW: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Dice loss, (N, M): 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)."""
    p_NMK, target_N1K = logits_NMHW.sigmoid().flatten(2), target_NHW[:, None].flatten(2)
    overlap = (p_NMK * target_N1K).sum(-1)
    return 1 - (2 * overlap + smooth) / (p_NMK.sum(-1) + target_N1K.sum(-1) + smooth)


def soft_iou(logits_NMHW: Tensor, target_NHW: Tensor, smooth: float = SMOOTH) -> Tensor:
    """IoU loss of probabilities, (N, M): 1 - (sum(p t) + smooth) / (sum(p) + sum(t) - sum(p t) + smooth)."""
    p_NMK, target_N1K = logits_NMHW.sigmoid().flatten(2), target_NHW[:, None].flatten(2)
    overlap = (p_NMK * target_N1K).sum(-1)
    return 1 - (overlap + smooth) / (p_NMK.sum(-1) + target_N1K.sum(-1) - overlap + smooth)


def temporal(logits_NTHW: Tensor, target_NTHW: Tensor, valid_NT: Tensor, of_logits: bool = False) -> Tensor:
    """Disagreement about what changes from frame to frame, (N,): mean of (|p' - p| - |t' - t|)^2 over pixels.

    Then the mean over the pairs of frames that are both valid (boolean); 0 without any, as for a single frame.
    `of_logits` compares logits instead of probabilities: then it has no upper limit.
    """
    value_NTHW = logits_NTHW.float() if of_logits else logits_NTHW.float().sigmoid()
    error_NPHW = (value_NTHW.diff(dim=1).abs() - target_NTHW.float().diff(dim=1).abs()).square()
    valid_NP = valid_NT[:, 1:] & valid_NT[:, :-1]
    return (error_NPHW.mean((2, 3)) * valid_NP).sum(1) / valid_NP.sum(1).clamp(min=1)


def iou(logits_NMHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Intersection over union of `logits > 0` and `target > 0.5`, (N, M); 0 when both are empty."""
    mask, target = (logits_NMHW > 0).flatten(2), (target_NHW[:, None] > 0.5).flatten(2)
    return (mask & target).sum(-1) / (mask | target).sum(-1).clamp(min=1)


MASK_TERMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "focal": lambda logits, target, smooth: focal(logits, target),
    "dice": dice,
    "bce": lambda logits, target, smooth: bce(logits, target),
    "soft_iou": soft_iou,
}


def mask_losses(
    logits_NMHW: Tensor,
    iou_NM: Tensor,
    presence_N: Tensor,
    target_NHW: Tensor,
    weights: Mapping[str, float],
    squared_iou: bool = False,
    smooth: float = SMOOTH,
) -> dict[str, Tensor]:
    """Return the terms of each object, (N,) each and not weighted: `iou`, `presence`, and those of `MASK_TERMS` that
    have a weight.

    The masks' terms count for the candidate whose weighted sum is lowest; every candidate's predicted IoU is held to
    its true one. An object that is not in the frame only has the presence term. The logits are those of the decoder,
    not gated by presence: a visible object that is scored absent keeps a finite loss and its gradient.

    Args:
        iou_NM: predicted IoU of each candidate.
        presence_N: logit of the object being in the frame.
        target_NHW: 0..1; fractions where the target was made smaller by averaging.
        weights: those of `MASK_TERMS` in the loss, which decide the candidate; others are not read.
        squared_iou: square the error of the predicted IoU, as in SAM; else its absolute value, as in SAM 2.
        smooth: of `dice` and `soft_iou`.
    """
    # Sums over a million pixels and powers of small numbers need more than bf16.
    logits_NMHW, target_NHW = logits_NMHW.float(), target_NHW.float()
    present_N = target_NHW.flatten(1).any(1).float()
    terms = {name: term(logits_NMHW, target_NHW, smooth) for name, term in MASK_TERMS.items() if name in weights}
    # Only the best candidate learns, so the three can specialise in part, object and group instead of averaging them.
    best_N1 = (
        torch.stack([weights[name] * value_NM for name, value_NM in terms.items()]).sum(0).argmin(1, keepdim=True)
    )
    error_NM = iou_NM.float() - iou(logits_NMHW, target_NHW)
    return {
        **{name: value_NM.gather(1, best_N1)[:, 0] * present_N for name, value_NM in terms.items()},
        "iou": (error_NM.square() if squared_iou else error_NM.abs()).mean(1) * present_N,
        "presence": F.binary_cross_entropy_with_logits(presence_N.float(), present_N, reduction="none"),
    }


def distilled(logits_NMHW: Tensor, teacher_NMHW: Tensor) -> dict[str, Tensor]:
    """Return `bce` and `dice`, (N,) each: every candidate mask against the teacher's of the same place, mean over M.

    The target t are the teacher's probabilities, so where it is in doubt the student learns to be, too. Both terms are
    0 if, and only if, the masks are equal: `bce` is that of the student less that of the teacher itself, the
    Kullback-Leibler divergence, and `dice` has squares below the line, 1 - (2 sum(p t) + smooth) / (sum(p^2) +
    sum(t^2) + smooth), after V-Net (Milletari et al. 2016, arXiv:1606.04797).
    """
    logits, teacher = logits_NMHW.float(), teacher_NMHW.float()
    p_NMK, t_NMK = logits.sigmoid().flatten(2), teacher.sigmoid().flatten(2)
    # The plain dice has its minimum at a sharp mask, whatever the doubt.
    overlap, sizes = (p_NMK * t_NMK).sum(-1), p_NMK.square().sum(-1) + t_NMK.square().sum(-1)
    own, least = (
        F.binary_cross_entropy_with_logits(one.flatten(2), t_NMK, reduction="none").mean(-1)
        for one in (logits, teacher)
    )
    return {
        "bce": (own - least).mean(1),
        "dice": (1 - (2 * overlap + SMOOTH) / (sizes + SMOOTH)).mean(1),
    }


def at_side(logits_NMLL: Tensor, masks_NSS: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Bring logits (up, bilinear) and boolean masks (down, averaged) to `side` pixels for the losses."""
    logits = logits_NMLL.float()
    if logits.shape[-1] != side:
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
    return logits, shrink(masks_NSS, side)


def shrink(masks: Tensor, side: int) -> Tensor:
    """Return masks (..., S, S) averaged to (..., side, side), float32."""
    masks = masks.float()
    if masks.shape[-1] == side:
        return masks
    # By area, so that a thin object fades instead of vanishing.
    return F.interpolate(masks.flatten(0, -3)[:, None], (side, side), mode="area")[:, 0].unflatten(0, masks.shape[:-2])


def object_weights(clip_N: Tensor, clips: int) -> Tensor:
    """Weight of each object, (N,), summing to 1: clips weigh alike, and so do the objects of a clip.

    So a micro-batch's loss is a mean over its clips, and dividing a batch in another way changes nothing.
    """
    count_B = torch.bincount(clip_N, minlength=clips)
    # Without this, a clip with three objects would count three times as much as one with a single object.
    return 1 / (count_B[clip_N] * clips)


def frame_weights(counts_NT: Tensor, clip_N: Tensor, clips: int) -> Tensor:
    """Weight of each object on each frame, (N, T): clips weigh alike, and so does all that counts in one (boolean).

    A clip in which nothing counts weighs nothing; the others add up to 1 / clips each.
    """
    count_B = torch.zeros(clips, device=clip_N.device).index_add(0, clip_N, counts_NT.sum(1).float())
    return counts_NT / (count_B.clamp(min=1)[clip_N] * clips)[:, None]
