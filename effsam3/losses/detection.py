# SPDX-License-Identifier: Apache-2.0
"""Losses on the instances that a detector finds for a phrase: matching, scores and boxes; masks are in masks.py.

Formulas: DETR (Carion et al. 2020, arXiv:2005.12872): costs and weights of the matching; L1 of matched boxes.

Letters: R images with a phrase, Q queries, N instances of an image at most, of which `valid_RN` are there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

CLASS_COST, BOX_COST, GIOU_COST = 1.0, 5.0, 2.0
OUT_OF_REACH = 1e4  # cost of an instance that is not there: no query is taken from one that is


def match(logits_RQ: Tensor, boxes_RQ4: Tensor, target_RN4: Tensor, valid_RN: Tensor) -> Tensor:
    """Return which query each instance is given, (R, N): together the cheapest, each query once.

    Boxes are x1, y1, x2, y2 in 0..1. Cost: 5 L1 - 2 GIoU - the query's probability.
    """
    with torch.no_grad():
        boxes, target = boxes_RQ4.float(), target_RN4.float()
        cost_RQN = BOX_COST * torch.cdist(boxes, target, p=1) - CLASS_COST * logits_RQ.float().sigmoid()[..., None]
        giou_RQN = torch.stack([generalized_box_iou(own, other) for own, other in zip(boxes, target, strict=True)])
        cost_RQN = torch.where(valid_RN[:, None], cost_RQN - GIOU_COST * giou_RQN, OUT_OF_REACH)
        # scipy refuses NaN with an error of its own; the loss becomes NaN all the same, and the loop knows what to do.
        return _assign(cost_RQN.nan_to_num(OUT_OF_REACH, OUT_OF_REACH, -OUT_OF_REACH))


# An operator of its own, so that a dry run, whose tensors have no contents, need not solve it.
@torch.library.custom_op("effsam3::assign", mutates_args=())
def _assign(cost_RQN: Tensor) -> Tensor:
    chosen = [linear_sum_assignment(cost_QN.T)[1] for cost_QN in cost_RQN.cpu().double().numpy()]
    return torch.from_numpy(np.stack(chosen)).to(cost_RQN.device)


@_assign.register_fake
def _(cost_RQN: Tensor) -> Tensor:
    return cost_RQN.new_empty(cost_RQN.shape[0], cost_RQN.shape[2], dtype=torch.int64)


def score_loss(logits_RQ: Tensor, query_RN: Tensor, valid_RN: Tensor) -> Tensor:
    """BCE of the queries' scores, mean over queries, (R,): 1 for those that were given an instance, else 0."""
    logits_RQ = logits_RQ.float()
    target_RQ = torch.zeros_like(logits_RQ).scatter_add(1, query_RN, valid_RN.float())
    return F.binary_cross_entropy_with_logits(logits_RQ, target_RQ, reduction="none").mean(1)


def box_loss(boxes_RN4: Tensor, target_RN4: Tensor, valid_RN: Tensor) -> Tensor:
    """L1 of the instances' boxes, summed over the four numbers, mean over instances, (R,)."""
    return mean_of((boxes_RN4.float() - target_RN4).abs().sum(-1), valid_RN)


def mean_of(values_RN: Tensor, valid_RN: Tensor) -> Tensor:
    """Return the mean over what is valid in each row, (R,), 0 without any."""
    return torch.where(valid_RN, values_RN, 0.0).sum(1) / valid_RN.sum(1).clamp(min=1)
