# SPDX-License-Identifier: Apache-2.0
"""What a detector's answers are worth, at the size of its own masks: for validation, where no file is read or written.

Letters: R phrases, Q queries, N instances of a phrase, M side of the masks, D queries that count, S columns of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from effsam3.benchmarks.concepts.cgf1 import COLUMNS, SCORE, count
from effsam3.models.heads.detector import Answers


def answered_row(answers: Answers, masks_RNMM: Tensor, valid_RN: Tensor, counted_R: Tensor) -> Tensor:
    """Return the added rows of the phrases that count, (S,), float64: `cgf1.metrics` turns sums of them into numbers.

    Args:
        masks_RNMM: true instances, bool, of the answers' side.
        valid_RN: which of them are there; a phrase without any is a negative.
        counted_R: bool.
    """
    row_S = np.zeros(COLUMNS)
    found_RQ = answers.scores_RQ >= SCORE
    for row in counted_R.nonzero()[:, 0].tolist():
        found_1D = found_RQ[row].nonzero().T
        found_DMM = answers.phrase(row).masks_of(found_1D)[0] > 0
        row_S += count(mask_ious(found_DMM, masks_RNMM[row, valid_RN[row]]).cpu().numpy()).row_S
    return torch.from_numpy(row_S).to(answers.logits_LRQ.device)


def mask_ious(masks_DMM: Tensor, others_NMM: Tensor) -> Tensor:
    """Return the intersection over union of boolean masks, (D, N), float32; 0 of two empty ones."""
    masks_DP, others_NP = masks_DMM.flatten(1).float(), others_NMM.flatten(1).float()
    with torch.autocast(masks_DP.device.type, enabled=False):  # which would round counts of pixels to 8 bits
        both_DN = masks_DP @ others_NP.T
    return both_DN / (masks_DP.sum(1)[:, None] + others_NP.sum(1) - both_DN).clamp(min=1)
