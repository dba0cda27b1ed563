# SPDX-License-Identifier: Apache-2.0
"""Masks for box, point and mask prompts, on still images and through videos, by SAM 3's tracker.

Letters: O prompts (objects), N points, M candidate masks per prompt, L low-resolution mask side (4 per trunk
position), S image side, H W rows and columns of the original frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    PreTrainedModel,
    Sam3ImageProcessor,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoProcessor,
)
from transformers.models.sam2_video.video_processing_sam2_video import Sam2VideoVideoProcessor

from effsam3.errors import ChassisError
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.memory.session import forget_as_it_tracks
from effsam3.models.memory.tracker import EfficientTracker

# model_type of a release's tracker_config -> class
TRACKERS = {"sam3_tracker_video": Sam3TrackerVideoModel, "effsam3_tracker_video": EfficientTracker}


@dataclass(frozen=True)
class Prompts:
    """What is shown of objects on one image, in pixels of the original.

    Only masks, one per object; or only boxes, one per object; or points of one object, with one box or none.

    Attributes:
        boxes_O4: x1, y1, x2, y2, float.
        points_N2: x, y, float.
        labels_N: of the points: 1 on the object, 0 next to it.
        masks_OHW: bool, of the original size.
    """

    boxes_O4: Tensor | None = None
    points_N2: Tensor | None = None
    labels_N: Tensor | None = None
    masks_OHW: Tensor | None = None

    @property
    def objects(self) -> int:
        """How many objects are shown."""
        if self.points_N2 is not None:
            return 1
        shown = self.boxes_O4 if self.masks_OHW is None else self.masks_OHW
        return 0 if shown is None else len(shown)


def load_tracker(folder: Path) -> Sam3TrackerVideoModel:
    """Load the tracker of a chassis or merged folder with its trunk, float32, frozen, in eval mode.

    Its sessions do not grow with the video, see `effsam3.models.memory.session`.

    Raises:
        ChassisError: the folder lacks tensors or holds others, or some that are not finite.
    """
    tracker = load_whole(TRACKERS[read_config(folder).tracker_config.model_type], folder)
    forget_as_it_tracks(tracker)
    return tracker


def tracker_within(model: PreTrainedModel) -> Sam3TrackerVideoModel:
    """Return the tracker of a whole `Sam3VideoModel` as `load_tracker` does, but of the model's own weights.

    Inside the whole model it is handed the trunk's features; here it gets the trunk as well, which nothing copies.
    """
    whole: Any = model
    tracker = whole.tracker_model
    with torch.device("meta"):
        encoder: Any = AutoModel.from_config(tracker.config.vision_config)
    encoder.backbone, encoder.neck = whole.detector_model.vision_encoder.backbone, whole.tracker_neck
    tracker.vision_encoder = encoder.eval()
    return tracker


def trunk_of(tracker: Sam3TrackerVideoModel) -> torch.nn.Module:
    """Return the vision trunk, teacher's or student's: pixels (B, 3, S, S) to an output with `last_hidden_state`
    (B, N, D).
    """
    encoder: Any = tracker.vision_encoder
    return encoder.backbone


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
    points_O12 = None if points_O2 is None else points_O2[:, None]
    labels_O1 = None if points_O2 is None else torch.ones(len(points_O2), 1, dtype=torch.int, device=points_O2.device)
    return _decode(tracker, embeddings, boxes_O4, points_O12, labels_O1)


@torch.no_grad()
def shown_masks(
    tracker: Sam3TrackerVideoModel, pixels_3SS: Tensor, size: tuple[int, int], prompts: Prompts
) -> tuple[Tensor, Tensor]:
    """Segment one image by boxes or points.

    Args:
        pixels_3SS: the image resized and normalised for the model.
        size: (H, W) of the original image.

    Returns:
        Masks (O, H, W), bool, and predicted IoU (O,), on the CPU.
    """
    scale_xy = torch.tensor([pixels_3SS.shape[-1] / size[1], pixels_3SS.shape[-2] / size[0]])
    boxes_O4, points_1N2, labels_1N = prompts.boxes_O4, None, None
    if boxes_O4 is not None:
        boxes_O4 = (boxes_O4 * scale_xy.repeat(2)).to(tracker.device)
    if prompts.points_N2 is not None and prompts.labels_N is not None:
        points_1N2 = (prompts.points_N2 * scale_xy)[None].to(tracker.device)
        labels_1N = prompts.labels_N[None].to(tracker.device)
    embeddings = tracker.get_image_embeddings(pixels_3SS[None].to(tracker.device))
    logits_OLL, iou_O = _decode(tracker, embeddings, boxes_O4, points_1N2, labels_1N)
    return at_full_size(logits_OLL, size), iou_O.cpu()


@torch.no_grad()
def tracked_masks(
    tracker: Sam3TrackerVideoModel, frames: Sequence[Tensor], size: tuple[int, int], prompts: Prompts
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Track through a video what is shown on its first frame.

    Args:
        frames: pixels (3, S, S) of each frame, normalised for the model, read as they are needed and not kept.
        size: (H, W) of the original frames.

    Yields:
        The frame's index, masks (O, H, W), bool, and the probability (O,) that each object is visible, on the CPU.
    """
    processor = prompt_processor(tracker)
    session = processor.init_video_session(inference_device=tracker.device, dtype=torch.float32)
    session.processed_frames, (session.video_height, session.video_width) = frames, size
    if prompts.masks_OHW is not None:
        shown: dict[str, Any] = {"input_masks": list(prompts.masks_OHW)}
    else:
        shown = {}
        if prompts.boxes_O4 is not None:
            shown["input_boxes"] = prompts.boxes_O4[None].tolist()
        if prompts.points_N2 is not None and prompts.labels_N is not None:
            shown |= {
                "input_points": prompts.points_N2[None, None].tolist(),
                "input_labels": prompts.labels_N[None, None].tolist(),
            }
    processor.add_inputs_to_inference_session(session, 0, list(range(1, prompts.objects + 1)), **shown)
    for index in range(len(frames)):
        output = tracker(session, frame_idx=index)
        refuse_nan(output.pred_masks, output.object_score_logits)
        masks_OHW = at_full_size(output.pred_masks[:, 0], size)
        yield index, masks_OHW, output.object_score_logits.flatten().sigmoid().cpu()


def prompt_processor(tracker: Sam3TrackerVideoModel) -> Sam3TrackerVideoProcessor:
    """Return a processor that only resizes prompts: frames come resized and normalised."""
    size = {"height": tracker.config.image_size, "width": tracker.config.image_size}
    return Sam3TrackerVideoProcessor(Sam3ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size))


def _decode(
    tracker: Sam3TrackerVideoModel,
    embeddings: list[Tensor],
    boxes_O4: Tensor | None,
    points_ON2: Tensor | None,
    labels_ON: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the logits (O, L, L) and predicted IoU (O,) for prompts in pixels of the model's image.

    A single point is ambiguous: of its three masks the best is taken.
    """
    sparse, dense = tracker.prompt_encoder(
        input_points=None if points_ON2 is None else points_ON2[None],
        input_labels=None if labels_ON is None else labels_ON[None],
        input_boxes=None if boxes_O4 is None else boxes_O4[None],
        input_masks=None,
    )
    logits_1OMLL, iou_1OM, _, _ = tracker.mask_decoder(
        image_embeddings=embeddings[-1],
        image_positional_embeddings=tracker.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=boxes_O4 is None and points_ON2 is not None and points_ON2.shape[1] == 1,
        high_resolution_features=embeddings[:-1],
    )
    refuse_nan(logits_1OMLL, iou_1OM)
    # Of a single mask the best is that mask: both kinds of prompt go one way.
    best_O = iou_1OM[0].argmax(-1)
    each = torch.arange(len(best_O), device=best_O.device)
    return logits_1OMLL[0][each, best_O], iou_1OM[0][each, best_O]


def refuse_nan(*outputs: Tensor) -> None:
    """Refuse what a model computes if it is no number: it would look like an empty mask, or like nothing found.

    Raises:
        ChassisError: a value is NaN.
    """
    if any(output.isnan().any() for output in outputs):
        raise ChassisError(
            "the model computes NaN of finite weights: they are those of no trained model, or of another one than its "
            "config.json describes; take another checkpoint"
        )


def at_full_size(logits_OLL: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (O, H, W), bool, on the CPU; one at a time, since hundreds of large images in float32 take gigabytes."""
    masks_OHW = torch.zeros(len(logits_OLL), *size, dtype=torch.bool)
    for mask_HW, logits_LL in zip(masks_OHW, logits_OLL.float(), strict=True):
        mask_HW.copy_(F.interpolate(logits_LL[None, None], size, mode="bilinear", align_corners=False)[0, 0] > 0)
    return masks_OHW
