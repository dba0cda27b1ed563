# SPDX-License-Identifier: Apache-2.0
"""All instances of a concept, on an image or through a video: named by a text, shown by example boxes, or both.

The original SAM 3 prompts its detector with the tokens of the text and those of the geometry encoder: one per example
box and one that sums up the image, which is there even without boxes. transformers (5.23) leaves the geometry encoder
out when there are no boxes, on images and in videos, and so finds other masks. `encode_geometry_always` mends that;
the rest of this module goes by it.

Letters: B images, O instances, N example boxes, S side of the model's square image, H W rows and columns of the
original, L rows of a mask as predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.processor import processor
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.inference.prompted import at_full_size, refuse_nan
from effsam3.models.memory.session import forget_as_it_tracks
from effsam3.models.text.tokens import PromptTokenizer

PADDING = -10  # the label with which transformers' SAM 3 marks boxes that only fill up a batch
ANY_CONCEPT = "visual"  # SAM 3's text for example boxes without one


@dataclass(frozen=True)
class Instances:
    """Instances on one image, on the CPU: `masks_OHW` bool, `boxes_O4` x1, y1, x2, y2 in pixels, `scores_O` 0..1.

    `ids` tell instances apart, across the frames of a video, too; they count from 1. `texts` are the prompts.
    """

    masks_OHW: Tensor
    boxes_O4: Tensor
    scores_O: Tensor
    ids: list[int]
    texts: list[str]


def encode_geometry_always(detector: nn.Module) -> None:
    """Have a `Sam3Model` or `Sam3LiteTextModel` encode the geometry of text prompts as the original SAM 3 does.

    Without boxes it then gets one that is padding: it is masked out of everything, and the geometry encoder runs. Of a
    `Sam3VideoModel`, give its `detector_model`.
    """
    detector.register_forward_pre_hook(_add_padding_box, with_kwargs=True)


def _add_padding_box(detector: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    if named.get("input_boxes") is not None:
        return arguments, named
    seen = named.get("vision_embeds")
    images = (arguments[0] if arguments else named["pixel_values"]) if seen is None else seen.fpn_hidden_states[0]
    box_B14 = torch.zeros(len(images), 1, 4, dtype=images.dtype, device=images.device)
    labels_B1 = torch.full((len(images), 1), PADDING, device=images.device)
    return arguments, named | {"input_boxes": box_B14, "input_boxes_labels": labels_B1}


def load_model(folder: Path) -> Any:
    """Load a chassis or merged folder, float32, frozen, in eval mode; its detector encodes the geometry always.

    Raises:
        ChassisError: the folder lacks tensors or holds others, or some that are not finite.
    """
    model: Any = load_whole(model_class(read_config(folder).model_type), folder)
    encode_geometry_always(model.detector_model)
    return model


class ConceptModel:
    """A whole SAM 3, its image, text or memory replaced or not, prompted by concepts; float32, frozen."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        """Load a chassis or merged folder.

        Raises:
            ChassisError: the folder lacks tensors or holds others, or some that are not finite.
        """
        self.model = torch.nn.Module.to(load_model(Path(folder)), device)
        forget_as_it_tracks(self.model.tracker_model)
        self.processor = processor(self.model.config)
        self.processor.tokenizer = PromptTokenizer()
        self.best_score = 0.0  # of all candidates so far, however low
        self.model.detector_model.register_forward_hook(self._look_at_scores)

    def _look_at_scores(self, detector: nn.Module, arguments: tuple, output) -> None:
        """Keep the best score; refuse what is no number, which no threshold would let through.

        Raises:
            ChassisError: a score is NaN.
        """
        refuse_nan(output.pred_logits, output.presence_logits, output.pred_masks)
        scores = output.pred_logits.sigmoid() * output.presence_logits.sigmoid()
        self.best_score = max(self.best_score, float(scores.max()))

    @torch.no_grad()
    def look(self, image_HW3: np.ndarray):
        """Encode an image (uint8 RGB) once for any number of prompts."""
        pixels_13SS = self.processor.image_processor(image_HW3, return_tensors="pt").pixel_values
        return self.model.detector_model.get_vision_features(pixels_13SS.to(self.model.device))

    @torch.no_grad()
    def detect(self, vision, texts: list[str], **boxes: Tensor) -> Any:
        """Return the detector's output, with the logits of all queries, for texts (P) on one image.

        Args:
            vision: what `look` made of the image; it serves all texts, and is not copied for them.
            boxes: `input_boxes` (P, N, 4) and `input_boxes_labels` (P, N) as transformers has them.

        Raises:
            TextTooLong: a text has more tokens than SAM 3 reads.
        """
        tokens = self.processor.tokenizer(texts, return_tensors="pt").to(self.model.device)
        maps, places = (
            tuple(level.expand(len(texts), *level.shape[1:]) for level in levels)
            for levels in (vision.fpn_hidden_states, vision.fpn_position_encoding)
        )
        shared = type(vision)(fpn_hidden_states=maps, fpn_position_encoding=places)
        return self.model.detector_model(vision_embeds=shared, **tokens, **boxes)

    @torch.no_grad()
    def find(
        self,
        vision,
        size: tuple[int, int],
        text: str | None = None,
        boxes_N4: Tensor | None = None,
        positive_N: Tensor | None = None,
        threshold: float = 0.5,
    ) -> Instances:
        """Find the instances of a concept on an image.

        Args:
            vision: what `look` made of the image.
            size: (H, W) of the original image.
            text: None: only the boxes.
            boxes_N4: examples, x1, y1, x2, y2 in pixels of the original image.
            positive_N: bool, False for an example of what is not meant; None: all are meant.
            threshold: instances with a higher score are kept.

        Returns:
            The instances, best first. The score is the instance's times that of the concept being there at all.

        Raises:
            TextTooLong: the text has more tokens than SAM 3 reads. (The original cuts it silently.)
        """
        device = self.model.device
        text = ANY_CONCEPT if text is None else text
        prompt = {}
        if boxes_N4 is not None:
            height, width = size
            relative_N4 = box_convert(boxes_N4.float(), "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
            labels_N = torch.ones(len(boxes_N4)) if positive_N is None else positive_N
            prompt = {
                "input_boxes": relative_N4[None].to(device),
                "input_boxes_labels": labels_N[None].long().to(device),
            }
        output = self.detect(vision, [text], **prompt)
        scores = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]
        order = scores.argsort(descending=True)
        # Best first, as `order` is.
        best = order[scores[order] > threshold]
        scale = torch.tensor([size[1], size[0]] * 2, device=device)
        return Instances(
            masks_OHW=at_full_size(output.pred_masks[0, best], size),
            boxes_O4=(output.pred_boxes[0, best] * scale).cpu(),
            scores_O=scores[best].cpu(),
            ids=list(range(1, len(best) + 1)),
            texts=[text] * len(best),
        )

    def follow(
        self, frames: Sequence[Tensor], size: tuple[int, int], texts: list[str], threshold: float | None = None
    ) -> Iterator[tuple[int, Instances]]:
        """Find and track all instances of the texts through a video; yields (frame, instances) frame by frame.

        Args:
            frames: normalised pixels (3, S, S) of each frame, read as they are needed and not kept.
            size: (H, W) of the original frames.
            threshold: score from which a new instance is tracked; None: config.json's (SAM 3: 0.7).

        Raises:
            TextTooLong: a text has more tokens than SAM 3 reads.
        """
        model, config = self.model, self.model.config
        model.new_det_thresh = config.new_det_thresh if threshold is None else threshold
        # What is not detected cannot be tracked: the lower bar must not be above the one that was asked for.
        model.score_threshold_detection = min(config.score_threshold_detection, model.new_det_thresh)
        session = self.processor.init_video_session(inference_device=model.device, dtype=torch.float32)
        session.processed_frames, (session.video_height, session.video_width) = frames, size
        self.processor.add_text_prompt(session, texts)
        for output in model.propagate_in_video_iterator(session):
            found = self.processor.postprocess_outputs(session, output)
            numbers = found["object_ids"].tolist()
            text_of = {number: text for text, own in found["prompt_to_obj_ids"].items() for number in own}
            yield (
                output.frame_idx,
                Instances(
                    masks_OHW=found["masks"].cpu(),
                    boxes_O4=found["boxes"].cpu(),
                    scores_O=found["scores"].cpu(),
                    ids=[number + 1 for number in numbers],  # transformers counts from 0, palettes' background
                    texts=[text_of[number] for number in numbers],
                ),
            )
