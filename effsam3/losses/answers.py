# SPDX-License-Identifier: Apache-2.0
"""What a detector answers to phrases, against what another one answers: no annotations are needed.

Both have the same queries, so that query i of one is held to query i of the other and nothing is matched.

Letters: L decoder layers, R phrases, Q queries, some of which (F) have masks that count, M side of the masks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effsam3.losses.detection import box_distance, giou
from effsam3.losses.masks import bce, dice
from effsam3.models.heads.detector import Answers


def teacher_loss(
    student: Answers, teacher: Answers, counted_R: Tensor | None = None, found: float = 0.3, most: int = 32
) -> dict[str, Tensor]:
    """Hold the student's answers to the teacher's.

    Of a phrase's queries, those count whose score s = p(query) p(presence) by the teacher is high. Each term is the
    mean over all phrases, so that dividing a batch in another way changes nothing. Targets are probabilities: the
    minimum of a BCE is their entropy, not 0.

    Args:
        counted_R: bool, False for phrases that add zero; None: all count.
        found: teacher's score above which a query's mask is taught.
        most: masks of a phrase that are taught, those of the highest scores: they are most of the memory.

    Returns:
        Scalars, not weighted. The layers' means: `presence`, BCE; `score`, BCE of the queries' logits, summed over
        queries, times the teacher's presence; `box`, L1 of centre, width and height, and `giou`, 1 - GIoU, both summed
        over queries with the weights s. Of the last layer: `bce` and `dice` of masks, summed over queries with the
        weights s; `semantic`, BCE of all instances in one mask.
    """
    score_RQ = teacher.scores_RQ
    presence_LR = _bce(student.presence_LR, teacher.presence_LR)
    score_LRQ = _bce(student.logits_LRQ, teacher.logits_LRQ)
    boxes = student.boxes_LRQ4.float(), teacher.boxes_LRQ4.float()
    # A fixed number of queries, so that no shape depends on what the teacher finds.
    score_RF, query_RF = score_RQ.topk(min(most, score_RQ.shape[1]), dim=1)
    score_RF = score_RF * (score_RF > found)
    logits_RFMM, target_RFMM = (own.masks_of(query_RF).float() for own in (student, teacher))
    pair = logits_RFMM.flatten(0, 1)[:, None], target_RFMM.flatten(0, 1).sigmoid()
    masks = {
        name: (loss(*pair)[:, 0].unflatten(0, score_RF.shape) * score_RF).sum(1)
        for name, loss in (("bce", bce), ("dice", dice))
    }
    each_R = {
        "presence": presence_LR.mean(0),
        "score": score_LRQ.sum(2).mean(0) * teacher.presence_LR[-1].float().sigmoid(),
        "box": (box_distance(*boxes) * score_RQ).sum(2).mean(0),
        "giou": ((1 - giou(*boxes)) * score_RQ).sum(2).mean(0),
        **masks,
        "semantic": _bce(student.semantic_RMM, teacher.semantic_RMM).mean((1, 2)),
    }
    return {name: (value_R if counted_R is None else value_R * counted_R).mean() for name, value_R in each_R.items()}


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), target.float().sigmoid(), reduction="none")
