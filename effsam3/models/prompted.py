# SPDX-License-Identifier: Apache-2.0
"""Masks for box and point prompts on still images, through SAM 3's tracker heads.

Letters: O prompts (objects), M candidate masks per prompt, L low-resolution mask side (4 per trunk position), S image
side.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import Sam3TrackerVideoModel

import effsam3.models.vision  # noqa: F401  registers the student trunk with transformers' auto classes
from effsam3.models.sam3 import quiet_transformers, refuse_partial


def load_tracker(folder: Path) -> Sam3TrackerVideoModel:
    """Load the tracker of a chassis or merged folder with its trunk, float32, frozen, in eval mode.

    Raises:
        ChassisError: the folder lacks tensors or holds others.
    """
    with quiet_transformers():
        model, info = Sam3TrackerVideoModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    refuse_partial(info, f"{folder} is not a whole SAM 3 for transformers' tracker")
    return model.eval().requires_grad_(False)


def trunk_of(tracker: Sam3TrackerVideoModel) -> torch.nn.Module:
    """The vision trunk, teacher's or student's: pixels (B, 3, S, S) to an output with `last_hidden_state`
    (B, N, D).
    """
    return tracker.vision_encoder.backbone


@torch.no_grad()
def prompted_masks(
    tracker: Sam3TrackerVideoModel, embeddings: list[Tensor], boxes_O4: Tensor | None, points_O2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Segment one image by boxes or by one positive point each (exactly one of the two is given).

    Args:
        embeddings: `tracker.get_image_embeddings` of one image; they serve any number of prompts.
        boxes_O4: x1, y1, x2, y2 in pixels of the model's square image.
        points_O2: x, y in the same pixels.

    Returns:
        Mask logits (O, L, L) and predicted IoU (O,): a box is unambiguous and gets the single mask; for a point, the
        best of three by predicted IoU, as SAM does.
    """
    labels = None if points_O2 is None else torch.ones(1, len(points_O2), 1, dtype=torch.int, device=points_O2.device)
    sparse, dense = tracker.prompt_encoder(
        input_points=None if points_O2 is None else points_O2[None, :, None],
        input_labels=labels,
        input_boxes=None if boxes_O4 is None else boxes_O4[None],
        input_masks=None,
    )
    logits_1OMLL, iou_1OM, _, _ = tracker.mask_decoder(
        image_embeddings=embeddings[-1],
        image_positional_embeddings=tracker.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=points_O2 is not None,
        high_resolution_features=embeddings[:-1],
    )
    best_O = iou_1OM[0].argmax(-1)
    each = torch.arange(len(best_O), device=best_O.device)
    return logits_1OMLL[0][each, best_O], iou_1OM[0][each, best_O]
