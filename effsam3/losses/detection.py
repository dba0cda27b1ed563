# SPDX-License-Identifier: Apache-2.0
"""Losses on the instances that a detector finds for a phrase, against annotated ones; masks' own are in masks.py.

Formulas: DETR (Carion et al. 2020, arXiv:2005.12872) for one-to-one matching, L1 and GIoU in every layer of the
decoder; SAM 3's released training code for the costs of the matching, scores that only learn where a phrase is there,
and a presence of their own.

Letters: L decoder layers, R phrases, K = L R of them, Q queries, N instances of a phrase at most, M side of the masks.
Boxes are x1, y1, x2, y2 in 0..1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from effsam3.losses.masks import bce, dice, focal, shrink
from effsam3.models.heads.detector import Answers

CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0  # of the focal cost
FOUND_WEIGHT = 2.0  # of a query that has an instance, in the loss of the scores
EMPTY = 1e-7  # least area to divide by
OUT_OF_REACH = 1e4  # cost of an instance that is not there: no query is taken from one that is


class Instances(NamedTuple):
    """The annotated instances of R phrases, padded to N."""

    boxes_RN4: Tensor
    masks_RNMM: Tensor  # 0..1, of any side
    valid_RN: Tensor  # bool: no padding


def match(logits_KQ: Tensor, boxes_KQ4: Tensor, target_KN4: Tensor, valid_KN: Tensor) -> Tensor:
    """Return which query each instance is given, (K, N): together the cheapest, each query once; -1: none.

    None have the instances that are not valid and, of more instances than queries, the most expensive. Cost, with p
    the query's probability: 2 (-a (1 - p)^2 ln p + (1 - a) p^2 ln(1 - p)) + 5 L1 - 2 GIoU, a = 0.25, L1 of centre,
    width and height.
    """
    with torch.no_grad():
        boxes, target, logits = boxes_KQ4.float(), target_KN4.float(), logits_KQ.float()
        p = logits.sigmoid()
        score_KQ = (1 - ALPHA) * p**GAMMA * F.logsigmoid(-logits) - ALPHA * (1 - p) ** GAMMA * F.logsigmoid(logits)
        l1_KQN = torch.cdist(_centres(boxes), _centres(target), p=1)
        giou_KQN = giou(boxes[:, :, None], target[:, None])
        cost_KQN = CLASS_COST * score_KQ[..., None] + BOX_COST * l1_KQN - GIOU_COST * giou_KQN
        cost_KQN = torch.where(valid_KN[:, None], cost_KQN, OUT_OF_REACH)
        # scipy refuses NaN with an error of its own; the loss becomes NaN all the same, and the loop knows what to do.
        query_KN = _assign(cost_KQN.nan_to_num(OUT_OF_REACH, OUT_OF_REACH, -OUT_OF_REACH))
        return torch.where(valid_KN, query_KN, -1)


# An operator of its own, so that a dry run, whose tensors have no contents, need not solve it.
@torch.library.custom_op("effsam3::assign", mutates_args=())
def _assign(cost_KQN: Tensor) -> Tensor:
    query_KN = np.full((cost_KQN.shape[0], cost_KQN.shape[2]), -1)
    for own_N, cost_QN in zip(query_KN, cost_KQN.cpu().double().numpy(), strict=True):
        query, instance = linear_sum_assignment(cost_QN)
        own_N[instance] = query
    return torch.from_numpy(query_KN).to(cost_KQN.device)


@_assign.register_fake
def _(cost_KQN: Tensor) -> Tensor:
    return cost_KQN.new_empty(cost_KQN.shape[0], cost_KQN.shape[2], dtype=torch.int64)


def annotated_loss(answers: Answers, instances: Instances, annotated_R: Tensor) -> dict[str, Tensor]:
    """Compare the answers to phrases with their annotated instances.

    Each term is a sum over a phrase's instances where it is about instances, and then the mean over all phrases, so
    that dividing a batch in another way changes nothing. A phrase without instances is absent. One that is not
    annotated (`annotated_R` False) adds zero, and so every output has a gradient whatever the batch.

    Returns:
        Scalars, not weighted. Of every layer, with a matching of its own, summed: `box`, L1 of centre, width and
        height; `giou`, 1 - GIoU; `score`, of phrases that are there, 2 BCE(p, 1) of the matched queries and
        p^2 BCE(p, 0) of the others. `presence`, BCE, the layers' mean. Of the last layer: `focal` and `dice` of the
        matched masks; `semantic`, BCE against all instances in one mask, and of phrases that are there dice, too.
    """
    layers, phrases, _ = answers.logits_LRQ.shape
    valid_RN = instances.valid_RN & annotated_R[:, None]
    there_R = valid_RN.any(1)
    logits_KQ, boxes_KQ4 = answers.logits_LRQ.float().flatten(0, 1), answers.boxes_LRQ4.float().flatten(0, 1)
    target_KN4 = instances.boxes_RN4.float().repeat(layers, 1, 1)
    query_KN = match(logits_KQ, boxes_KQ4, target_KN4, valid_RN.repeat(layers, 1))
    query_RN = query_KN[-phrases:]
    logits_RNMM = answers.masks_of(query_RN).float()
    target_RNMM = shrink(instances.masks_RNMM, logits_RNMM.shape[-1])
    masks = {
        name: loss(logits_RNMM.flatten(0, 1)[:, None], target_RNMM.flatten(0, 1))[:, 0].unflatten(0, query_RN.shape)
        for name, loss in (("focal", focal), ("dice", dice))
    }
    whole = answers.semantic_RMM.float()[:, None], union_of(target_RNMM, valid_RN)
    presence_LR = F.binary_cross_entropy_with_logits(
        answers.presence_LR.float(), there_R.float().expand(layers, -1), reduction="none"
    )
    of_layers = {
        "box": _sum_of(box_distance(of_queries(boxes_KQ4, query_KN), target_KN4), query_KN),
        "giou": _sum_of(1 - giou(of_queries(boxes_KQ4, query_KN), target_KN4), query_KN),
        "score": _found_loss(logits_KQ, query_KN),
    }
    each_R = {
        **{name: value_K.unflatten(0, (layers, phrases)).sum(0) * there_R for name, value_K in of_layers.items()},
        "presence": presence_LR.mean(0),
        **{name: _sum_of(value_RN, query_RN) for name, value_RN in masks.items()},
        "semantic": bce(*whole)[:, 0] + dice(*whole)[:, 0] * there_R,
    }
    return {name: (value_R * annotated_R).mean() for name, value_R in each_R.items()}


def of_queries(values_KQx: Tensor, query_KN: Tensor) -> Tensor:
    """Return what the instances' queries have, (K, N, ...); where there is none, another query's."""
    row_K1 = torch.arange(len(query_KN), device=query_KN.device)[:, None]
    return values_KQx[row_K1, query_KN.clamp(min=0)]


def box_distance(boxes: Tensor, target: Tensor) -> Tensor:
    """L1 of centre, width and height, summed over the four numbers; (..., 4) to (...)."""
    return (_centres(boxes.float()) - _centres(target.float())).abs().sum(-1)


def giou(boxes: Tensor, target: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019, arXiv:1902.09630), -1..1; (..., 4) twice to (...), broadcast.

    torchvision's has shapes that depend on contents, which a dry run does not know.
    """
    both, union = _shared(boxes.float(), target.float())
    low = torch.minimum(boxes[..., :2], target[..., :2]).float()
    high = torch.maximum(boxes[..., 2:], target[..., 2:]).float()
    hull = _area(high - low)
    return both / union.clamp(min=EMPTY) - (hull - union) / hull.clamp(min=EMPTY)


def box_iou(boxes: Tensor, target: Tensor) -> Tensor:
    """Intersection over union, 0..1; (..., 4) twice to (...), broadcast."""
    both, union = _shared(boxes.float(), target.float())
    return both / union.clamp(min=EMPTY)


def _shared(boxes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    (low, high), (other_low, other_high) = boxes.split(2, -1), target.split(2, -1)
    both = _area((torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0))
    return both, _area(high - low) + _area(other_high - other_low) - both


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]  # the gradient of `prod` asks the device whether there are zeros, and waits


def score_loss(logits_RQ: Tensor, query_RN: Tensor) -> Tensor:
    """BCE of the queries' scores, mean over queries, (R,): 1 for those that were given an instance, else 0."""
    logits_RQ = logits_RQ.float()
    return F.binary_cross_entropy_with_logits(logits_RQ, _given(logits_RQ, query_RN), reduction="none").mean(1)


def union_of(masks_RNMM: Tensor, valid_RN: Tensor) -> Tensor:
    """Return all instances in one mask, (R, M, M)."""
    # A sum, because pixels that two instances share at their border add up.
    return (masks_RNMM * valid_RN[..., None, None]).sum(1).clamp(max=1)


def mean_of(values_RN: Tensor, query_RN: Tensor) -> Tensor:
    """Return the mean over the instances that have a query, (R,), 0 without any."""
    return _sum_of(values_RN, query_RN) / (query_RN >= 0).sum(1).clamp(min=1)


def _found_loss(logits_KQ: Tensor, query_KN: Tensor) -> Tensor:
    """Sum over queries, (K,). p^2 (with its gradient) mutes what is right already: most queries find nothing."""
    found_KQ = _given(logits_KQ, query_KN)
    bce_KQ = F.binary_cross_entropy_with_logits(logits_KQ, found_KQ, reduction="none")
    return (torch.where(found_KQ > 0, FOUND_WEIGHT, logits_KQ.sigmoid().square()) * bce_KQ).sum(1)


def _given(logits_KQ: Tensor, query_KN: Tensor) -> Tensor:
    """Return 1 for queries that were given an instance, 0 for others, (K, Q)."""
    return torch.zeros_like(logits_KQ).scatter_add(1, query_KN.clamp(min=0), (query_KN >= 0).to(logits_KQ.dtype))


def _sum_of(values_KN: Tensor, query_KN: Tensor) -> Tensor:
    """Return the sum over the instances that have a query, (K,)."""
    return torch.where(query_KN >= 0, values_KN, 0.0).sum(1)


def _centres(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "xyxy", "cxcywh")
