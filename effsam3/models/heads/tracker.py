# SPDX-License-Identifier: Apache-2.0
"""Objects shown by points and boxes: SAM 3's tracker on still images, differentiable.

Letters: B images, O objects of all images, N some of them, D channels of the trunk, C of the neck, G side of the grid,
L = 4 G side of the masks, M candidate masks, P points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effsam3.models.heads.trunk import plus_view
from effsam3.models.memory.prompts import NO_POINT


class Shown(NamedTuple):
    """Objects that are shown by points: `image_O` says on which image, labels are as in models/memory/prompts.py."""

    image_O: Tensor
    points_OP2: Tensor  # x, y in pixels of the model's image
    labels_OP: Tensor


@dataclass(frozen=True)
class Decoded:
    """Masks for the objects `objects_N` of a `Shown`."""

    objects_N: Tensor
    logits_NMLL: Tensor
    iou_NM: Tensor

    def best(self) -> Tensor:
        """Return the logits (N, L, L) of the candidate with the highest predicted IoU."""
        each_N = torch.arange(len(self.objects_N), device=self.iou_NM.device)
        return self.logits_NMLL[each_N, self.iou_NM.argmax(1)]


def tracker_levels(model: Any, feat_BDGG: Tensor, view_BC: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what the tracker's mask decoder reads of images, finest first; it serves any number of prompts.

    Args:
        model: a `Sam3VideoModel`, or what else has a `tracker_model` and its `tracker_neck`.
        feat_BDGG: of a trunk, whichever: the model's own does not run.
        view_BC: is added to every level, see `plus_view`.
    """
    tracker = model.tracker_model
    fine, middle, top = plus_view(model.tracker_neck(feat_BDGG)[0][:3], view_BC)
    # Here once for all objects of an image, as in transformers.
    fine, middle = tracker.mask_decoder.conv_s0(fine), tracker.mask_decoder.conv_s1(middle)
    return fine, middle, top + tracker.no_memory_embedding.reshape(1, -1, 1, 1)


def decode_shown(model: Any, levels: tuple[Tensor, ...], shown: Shown) -> Iterator[Decoded]:
    """Yield the masks of objects that are shown alike: one point gives three candidates, more or a box a single one.

    Objects with other numbers of points are decoded apart: a point that only fills up would change the mask.
    `levels` are those of `tracker_levels`.
    """
    counts_O = (shown.labels_OP != NO_POINT).sum(1)
    for count in sorted(set(counts_O.tolist())):
        objects_N = (counts_O == count).nonzero()[:, 0]
        alike = (shown.points_OP2[objects_N, :count], shown.labels_OP[objects_N, :count])
        yield Decoded(objects_N, *decode_alike(model, levels, Shown(shown.image_O[objects_N], *alike)))


def decode_alike(model: Any, levels: tuple[Tensor, ...], shown: Shown) -> tuple[Tensor, Tensor]:
    """Return mask logits (O, M, L, L) and predicted IoU (O, M) of objects that are all shown by as many points.

    Each object is a prompt of its own: none sees another's points.
    """
    tracker, (fine, middle, top) = model.tracker_model, levels
    position_1CGG = tracker.get_image_wide_positional_embeddings()
    sparse, dense = tracker.prompt_encoder(
        input_points=shown.points_OP2[:, None],
        input_labels=shown.labels_OP[:, None],
        input_boxes=None,
        input_masks=None,
    )
    logits, iou, _, _ = tracker.mask_decoder(
        image_embeddings=top[shown.image_O],
        image_positional_embeddings=position_1CGG.expand(len(shown.image_O), -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=shown.labels_OP.shape[1] == 1,
        high_resolution_features=[fine[shown.image_O], middle[shown.image_O]],
    )
    return logits[:, 0], iou[:, 0]
