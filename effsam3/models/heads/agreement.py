# SPDX-License-Identifier: Apache-2.0
"""What SAM 3's heads make of a student's features, next to what they make of a teacher's.

Feature agreement does not tell it: features that are near in cosine may mean nothing to the heads, and features that
mean the same may be far away.

Letters: B images, D channels of the trunk, G side of its grid, O objects and R phrases of all images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effsam3.losses.agreement import answer_sums, mask_sums, nothing_compared
from effsam3.models.heads.detector import Asked, answer, detector_levels
from effsam3.models.heads.tracker import Shown, decode_shown, tracker_levels

IMAGES = 4  # at once: levels, masks and scores of a large validation batch would not fit next to a student


@torch.no_grad()
def agreement_sums(
    student: Any, feat_BDGG: Tensor, teacher: Any, teacher_BDGG: Tensor, shown: Shown, asked: Asked
) -> dict[str, Tensor]:
    """Prompt two SAM 3s alike, on features of the same images, and sum up how well they agree.

    The sums are added over batches and ranks, and `losses.agreement.agreement` turns them into numbers; their names
    all begin with `heads_` and are the same whatever is shown and asked. Of a batch, only images that are prompted
    count.

    Args:
        student: whole SAM 3 in eval mode; its trunk does not run.
        teacher: likewise; the same one, where only the trunk differs.
    """
    sums = nothing_compared(feat_BDGG.device)
    for first in range(0, len(feat_BDGG), IMAGES):
        part = slice(first, first + IMAGES)
        pair = (student, feat_BDGG[part]), (teacher, teacher_BDGG[part])
        for found in (_masks(pair, _part(shown, part)), _answers(pair, _part(asked, part))):
            sums |= {name: sums[name] + value for name, value in found.items()}
    return sums


def _part(prompts: Any, part: slice) -> Any:
    """Return the prompts of the images `part`, counted from its first."""
    image = prompts[0]
    inside = (image >= part.start) & (image < part.stop)
    return type(prompts)(image[inside] - part.start, *(None if own is None else own[inside] for own in prompts[1:]))


def _masks(pair: tuple[tuple[Any, Tensor], ...], shown: Shown) -> dict[str, Tensor]:
    if not len(shown.image_O):
        return {}
    both = []
    for model, feat_BDGG in pair:
        parts = list(decode_shown(model, tracker_levels(model, feat_BDGG), shown))
        both.append(torch.cat([part.best() for part in parts]))
    return mask_sums(*both)


def _answers(pair: tuple[tuple[Any, Tensor], ...], asked: Asked) -> dict[str, Tensor]:
    if not len(asked.image_R):
        return {}
    own, other = (answer(model, detector_levels(model, feat_BDGG), asked) for model, feat_BDGG in pair)
    return answer_sums(own, other)
