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
from effsam3.models.heads.detector import PADDING, Answers, Asked, Levels, answer, detector_levels, encode_texts
from effsam3.models.heads.pixels import fill_between
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.inference.prompted import at_full_size, refuse_nan
from effsam3.models.memory.session import forget_as_it_tracks
from effsam3.models.text.tokens import PromptTokenizer

PHRASES = 8  # of an image at once: a phrase takes 200 MB at full size
TEXTS = 1024  # that are remembered as the text encoder has read them, 32 KB each
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


def masks_of(levels: Levels, answers: Answers, query_RF: Tensor) -> Tensor:
    """Return the masks (R, F, M, M) of some queries of each phrase, of coarse ones with what lies between."""
    masks = answers.masks_of(query_RF)
    return fill_between(masks) if levels.coarse_masks else masks


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
        self.texts: dict[str, tuple[Tensor, ...]] = {}  # remembered: ids, attention mask and features of each
        # A video's frames go through transformers' own forward.
        self.model.detector_model.register_forward_hook(self._look_at_output)

    def _look_at_output(self, detector: nn.Module, arguments: tuple, output) -> None:
        self._look_at_scores(output.pred_logits, output.presence_logits, output.pred_masks)

    def _look_at_scores(self, logits_PQ: Tensor, presence_P1: Tensor, *of_masks: Tensor) -> None:
        """Keep the best score; refuse what is no number, which no threshold would let through.

        Raises:
            ChassisError: a score is NaN.
        """
        refuse_nan(logits_PQ, presence_P1, *of_masks)
        self.best_score = max(self.best_score, float((logits_PQ.sigmoid() * presence_P1.sigmoid()).max()))

    @torch.no_grad()
    def look(self, image_HW3: np.ndarray, coarse_masks: bool = False) -> Levels:
        """Encode an image (uint8 RGB) once for any number of prompts.

        `coarse_masks`: compute every second row and column of the masks only, for fewer operations.
        """
        pixels_13SS = self.processor.image_processor(image_HW3, return_tensors="pt").pixel_values
        feat_1DGG = trunk_features(self.model, pixels_13SS.to(self.model.device))
        return detector_levels(self.model, feat_1DGG, coarse_masks=coarse_masks)

    @torch.no_grad()
    def detect(
        self, levels: Levels, texts: Sequence[str], boxes_N4: Tensor | None = None, labels_N: Tensor | None = None
    ) -> Answers:
        """Return the detector's answers to texts on one image, each text with the same example boxes.

        Args:
            levels: what `look` made of the image; it serves all texts, and is not copied for them.
            boxes_N4: centre x, y, width, height in 0..1.
            labels_N: 1, or 0 of what is not meant.

        Raises:
            TextTooLong: a text has more tokens than SAM 3 reads.
        """
        image_R = torch.zeros(len(texts), dtype=torch.int64)
        boxes = [None if own is None else own.expand(len(texts), *own.shape) for own in (boxes_N4, labels_N)]
        asked = Asked(image_R, *self._read(texts), *boxes).each(lambda own: own.to(self.model.device))
        answers = answer(self.model, levels, asked)
        logits_RQ, presence_R1 = answers.logits_LRQ[-1], answers.presence_LR[-1, :, None]
        self._look_at_scores(logits_RQ, presence_R1, answers.mask_queries_RQC, answers.pixels_RCMM)
        return answers

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return token ids, attention mask and features of texts; the text encoder reads none of them twice."""
        if len(self.texts) > TEXTS:
            self.texts.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        if new:
            tokens = self.processor.tokenizer(new, return_tensors="pt").to(self.model.device)
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            features = encode_texts(self.model.detector_model, ids, mask)
            self.texts |= dict(zip(new, zip(ids, mask, features, strict=True), strict=True))
        return tuple(torch.stack(own) for own in zip(*(self.texts[text] for text in texts), strict=True))

    def find(
        self,
        levels: Levels,
        size: tuple[int, int],
        text: str | None = None,
        boxes_N4: Tensor | None = None,
        positive_N: Tensor | None = None,
        threshold: float = 0.5,
    ) -> Instances:
        """Find the instances of a concept on an image; arguments are those of `find_each`.

        `text`: None: only the boxes.
        """
        texts = [ANY_CONCEPT if text is None else text]
        return next(self.find_each(levels, size, texts, boxes_N4, positive_N, threshold))

    @torch.no_grad()
    def find_each(
        self,
        levels: Levels,
        size: tuple[int, int],
        texts: Sequence[str],
        boxes_N4: Tensor | None = None,
        positive_N: Tensor | None = None,
        threshold: float = 0.5,
    ) -> Iterator[Instances]:
        """Find the instances of several concepts on an image; yields those of each text.

        Args:
            levels: what `look` made of the image.
            size: (H, W) of the original image.
            boxes_N4: examples, x1, y1, x2, y2 in pixels of the original image.
            positive_N: bool, False for an example of what is not meant; None: all are meant.
            threshold: instances with a higher score are kept.

        Yields:
            The instances, best first. The score is the instance's times that of the concept being there at all.

        Raises:
            TextTooLong: the text has more tokens than SAM 3 reads. (The original cuts it silently.)
        """
        (height, width), labels_N = size, None
        if boxes_N4 is not None:
            boxes_N4 = box_convert(boxes_N4.float(), "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
            labels_N = torch.ones(len(boxes_N4)).long() if positive_N is None else positive_N.long()
        for start in range(0, len(texts), PHRASES):
            some = texts[start : start + PHRASES]
            answers = self.detect(levels, some, boxes_N4, labels_N)
            for row, text in enumerate(some):
                own = answers.phrase(row)
                scores_Q = own.scores_RQ[0]
                order = scores_Q.argsort(descending=True)
                best = order[scores_Q[order] > threshold]  # best first, as `order` is
                scale = torch.tensor([width, height] * 2, device=best.device)
                yield Instances(
                    masks_OHW=at_full_size(masks_of(levels, own, best[None])[0], size),
                    boxes_O4=(own.boxes_LRQ4[-1, 0, best] * scale).cpu(),
                    scores_O=scores_Q[best].cpu(),
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
