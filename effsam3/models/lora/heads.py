# SPDX-License-Identifier: Apache-2.0
"""A SAM 3 that is prompted on still images, differentiable: by points and boxes through its tracker's mask decoder, by
phrases through its detector.

Letters: B images, O objects of all images, N some of them, R images with a phrase, S image side in pixels, D channels
of the trunk, C of the necks, G side of the grid, L = 4 G side of the masks, M candidate masks, P points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from effsam3.models.image.teacher import to_map
from effsam3.models.memory.prompts import NO_POINT


class Shown(NamedTuple):
    """Objects that are shown by points: `image_O` says on which image, labels are as in models/memory/prompts.py."""

    image_O: Tensor
    points_OP2: Tensor  # x, y in pixels of the model's image
    labels_OP: Tensor


class Asked(NamedTuple):
    """Images whose instances of a phrase are asked for, with example boxes or padding in their place."""

    image_R: Tensor
    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    boxes_R14: Tensor  # centre x, y, width, height in 0..1
    box_labels_R1: Tensor


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


def trunk_features(model: Any, pixels_B3SS: Tensor) -> Tensor:
    """Return the trunk's output as a map, (B, D, G, G)."""
    return to_map(model.detector_model.vision_encoder.backbone(pixels_B3SS).last_hidden_state)


def decode_shown(model: Any, feat_BDGG: Tensor, shown: Shown, view_BC: Tensor | None = None) -> Iterator[Decoded]:
    """Yield the masks of objects that are shown alike: one point gives three candidates, more or a box a single one.

    Objects with other numbers of points are decoded apart: a point that only fills up would change the mask.
    """
    tracker = model.tracker_model
    fine, middle, top = plus_view(model.tracker_neck(feat_BDGG)[0][:3], view_BC)
    # Here once for all objects of an image, as in transformers.
    fine, middle = tracker.mask_decoder.conv_s0(fine), tracker.mask_decoder.conv_s1(middle)
    top = top + tracker.no_memory_embedding.reshape(1, -1, 1, 1)
    position_1CGG = tracker.get_image_wide_positional_embeddings()
    counts_O = (shown.labels_OP != NO_POINT).sum(1)
    for count in sorted(set(counts_O.tolist())):
        objects_N = (counts_O == count).nonzero()[:, 0]
        image_N = shown.image_O[objects_N]
        sparse, dense = tracker.prompt_encoder(
            input_points=shown.points_OP2[objects_N, None, :count],
            input_labels=shown.labels_OP[objects_N, None, :count],
            input_boxes=None,
            input_masks=None,
        )
        logits, iou, _, _ = tracker.mask_decoder(
            image_embeddings=top[image_N],
            image_positional_embeddings=position_1CGG.expand(len(image_N), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=count == 1,
            high_resolution_features=[fine[image_N], middle[image_N]],
        )
        yield Decoded(objects_N, logits[:, 0], iou[:, 0])


def find_asked(model: Any, feat_BDGG: Tensor, asked: Asked, view_BC: Tensor | None = None) -> ModelOutput:
    """Return the detector's output for the R images: all its queries' masks, boxes and scores."""
    detector = model.detector_model
    levels, positions = detector.vision_encoder.neck(feat_BDGG[asked.image_R])
    view_RC = None if view_BC is None else view_BC[asked.image_R]
    vision = Sam3VisionEncoderOutput(
        fpn_hidden_states=(*plus_view(levels[:3], view_RC), levels[3]), fpn_position_encoding=positions
    )
    return detector(
        vision_embeds=vision,
        input_ids=asked.input_ids_RT,
        attention_mask=asked.attention_mask_RT,
        input_boxes=asked.boxes_R14,
        input_boxes_labels=asked.box_labels_R1,
    )


def plus_view(levels: tuple[Tensor, ...], view_BC: Tensor | None) -> tuple[Tensor, ...]:
    """Add to every level of a neck the embedding of each image's view, the same at all positions."""
    return tuple(levels) if view_BC is None else tuple(level + view_BC[:, :, None, None] for level in levels)
