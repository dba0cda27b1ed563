# SPDX-License-Identifier: Apache-2.0
"""How well two SAM 3s agree in what their heads answer, 0..1: sums to be added up over batches and ranks.

Every share is soft: the smaller of two probabilities over the larger, so that it moves long before a threshold is
passed, and is 1 only where both answer alike.

Letters: R phrases, Q queries, N prompted objects, M side of the masks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effsam3.losses.detection import box_iou
from effsam3.models.heads.detector import Answers

PARTS = ("masks", "presence", "queries")


def nothing_compared(device: torch.device) -> dict[str, Tensor]:
    """Return the sums of no answers at all."""
    names = ("masks", "objects", "there", "there_most", "absent", "absent_most", "queries", "queries_most")
    return {f"heads_{name}": torch.zeros((), dtype=torch.float64, device=device) for name in names}


def mask_sums(logits_NMM: Tensor, teacher_NMM: Tensor) -> dict[str, Tensor]:
    """Sum the IoU of the masks (logits above 0) of the same prompts; 1 where both are empty."""
    mask, target = (logits > 0 for logits in (logits_NMM, teacher_NMM))
    both, either = (mask & target).sum((1, 2)), (mask | target).sum((1, 2))
    iou_N = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return {"heads_masks": iou_N.double().sum(), "heads_objects": torch.ones_like(iou_N).double().sum()}


def answer_sums(student: Answers, teacher: Answers, counted_R: Tensor | None = None) -> dict[str, Tensor]:
    """Compare the last layer's answers to phrases, query by query; `counted_R` (bool) leaves phrases out."""
    counted_R = torch.ones_like(teacher.presence_LR[-1]) if counted_R is None else counted_R
    there_R, other_R = (own.presence_LR[-1].double().sigmoid() for own in (student, teacher))
    score_RQ, target_RQ = (own.scores_RQ.double() for own in (student, teacher))
    # A query that is sure of an instance somewhere else agrees as little as one that finds none.
    iou_RQ = box_iou(student.boxes_LRQ4[-1], teacher.boxes_LRQ4[-1])

    def total(value_Rx: Tensor) -> Tensor:
        return (value_Rx.flatten(1).sum(1) * counted_R).sum()

    return {
        "heads_there": total(torch.minimum(there_R, other_R)[:, None]),
        "heads_there_most": total(torch.maximum(there_R, other_R)[:, None]),
        "heads_absent": total(1 - torch.maximum(there_R, other_R)[:, None]),
        "heads_absent_most": total(1 - torch.minimum(there_R, other_R)[:, None]),
        "heads_queries": total(torch.minimum(score_RQ, target_RQ) * iou_RQ),
        "heads_queries_most": total(torch.maximum(score_RQ, target_RQ)),
    }


def agreement(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Turn sums into `heads`, the mean of `PARTS`, and `heads_NAME` of each of them that was compared.

    `masks` is the mean IoU of prompted masks. `presence` is the mean of two shares, that of phrases being there and
    that of their being absent, so that it does not hang on how many are. `queries` is the share of the scores in which
    queries agree, each times the IoU of its boxes.
    """

    def share(name: str, most: str) -> float:
        return float(sums[f"heads_{name}"] / sums[f"heads_{most}"])

    found = {}
    if sums["heads_objects"] > 0:
        found["masks"] = share("masks", "objects")
    if sums["heads_there_most"] + sums["heads_absent_most"] > 0:
        found["presence"] = (share("there", "there_most") + share("absent", "absent_most")) / 2
        found["queries"] = share("queries", "queries_most")
    if not found:
        return {}
    return {"heads": sum(found.values()) / len(found)} | {f"heads_{name}": value for name, value in found.items()}
