# SPDX-License-Identifier: Apache-2.0
"""Instances of phrases: SAM 3's detector, differentiable, with the answers of all its decoder's layers.

Letters: B images, R phrases of all images, T tokens, D channels of the trunk, G side of the grid, C channels of the
neck, L decoder layers, Q queries, M = 4 G side of the masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput, inverse_sigmoid

from effsam3.models.heads.trunk import plus_view
from effsam3.models.inference.concepts import PADDING
from effsam3.models.text.tokens import PromptTokenizer


class Asked(NamedTuple):
    """Phrases that are asked for, each on one image, with an example box or padding in its place."""

    image_R: Tensor
    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    boxes_R14: Tensor  # centre x, y, width, height in 0..1
    box_labels_R1: Tensor  # 1, or PADDING


class Levels(NamedTuple):
    """What the detector's neck makes of images, finest first; the positions are those of any image."""

    maps: tuple[Tensor, ...]  # (B, C, ., .) each
    positions: tuple[Tensor, ...]  # (1, C, ., .) each


class Answers(NamedTuple):
    """What the detector answers to R phrases. Scores and masks are logits."""

    logits_LRQ: Tensor
    presence_LR: Tensor
    boxes_LRQ4: Tensor  # x1, y1, x2, y2 in 0..1
    masks_RQMM: Tensor  # of the last layer
    semantic_RMM: Tensor  # all instances in one mask

    @property
    def scores_RQ(self) -> Tensor:
        """The last layer's probabilities: of the query being an instance, times that of the phrase being there."""
        return self.logits_LRQ[-1].float().sigmoid() * self.presence_LR[-1].float().sigmoid()[:, None]


def ask(phrases: Sequence[str], image_R: Tensor, tokenizer: PromptTokenizer) -> Asked:
    """Ask for phrases without example boxes; all tensors are on the device of `image_R`.

    Raises:
        TextTooLong: a phrase has more tokens than SAM 3 reads.
    """
    tokens, device = tokenizer(list(phrases), return_tensors="pt"), image_R.device
    # A box that is padding: without any, transformers leaves out the geometry encoder, which SAM 3 always runs.
    boxes_R14, labels_R1 = torch.zeros(len(phrases), 1, 4), torch.full((len(phrases), 1), PADDING)
    tensors = (tokens["input_ids"], tokens["attention_mask"], boxes_R14, labels_R1)
    return Asked(image_R, *(tensor.to(device) for tensor in tensors))


def detector_levels(model: Any, feat_BDGG: Tensor, view_BC: Tensor | None = None) -> Levels:
    """Run the detector's neck once per image, for any number of phrases.

    Args:
        model: a `Sam3VideoModel`, or what else has a `detector_model`.
        feat_BDGG: of a trunk, whichever: the model's own does not run.
        view_BC: is added to every level, see `plus_view`.
    """
    maps, positions = model.detector_model.vision_encoder.neck(feat_BDGG)
    return Levels(plus_view(maps, view_BC), tuple(position_BC[:1] for position_BC in positions))


def answer(model: Any, levels: Levels, asked: Asked, recompute: bool = False) -> Answers:
    """Ask the detector for phrases on the images of `levels`.

    Args:
        recompute: keep no activations, but compute them again in the backward pass, phrase by phrase: the memory of
            one phrase instead of R.

    Raises:
        ValueError: no phrase is asked for.
    """
    if not len(asked.image_R):
        raise ValueError("no phrase is asked for, and transformers cannot answer none")
    if not recompute:
        return _answer(model, levels, asked)
    alone = [Asked(*(tensor[row : row + 1] for tensor in asked)) for row in range(len(asked.image_R))]
    found = [checkpoint(partial(_answer, model), levels, one, use_reentrant=False) for one in alone]
    joined = zip(*found, strict=True)
    return Answers(*(torch.cat(parts, dim) for parts, dim in zip(joined, (1, 1, 1, 0, 0), strict=True)))


def _answer(model: Any, levels: Levels, asked: Asked) -> Answers:
    detector = model.detector_model
    vision = Sam3VisionEncoderOutput(
        fpn_hidden_states=tuple(level_BC[asked.image_R] for level_BC in levels.maps),
        fpn_position_encoding=tuple(
            position_1C.expand(len(asked.image_R), -1, -1, -1) for position_1C in levels.positions
        ),
    )
    # The model itself returns the last layer's only.
    with _outputs_of(detector.detr_decoder, detector.dot_product_scoring) as seen:
        output = detector(
            vision_embeds=vision,
            input_ids=asked.input_ids_RT,
            attention_mask=asked.attention_mask_RT,
            input_boxes=asked.boxes_R14,
            input_boxes_labels=asked.box_labels_R1,
        )
    decoded = seen[detector.detr_decoder]
    steps_LRQ4 = detector.detr_decoder.box_head(decoded.intermediate_hidden_states)
    boxes_LRQ4 = (inverse_sigmoid(decoded.reference_boxes) + steps_LRQ4).sigmoid()
    return Answers(
        logits_LRQ=seen[detector.dot_product_scoring][..., 0],
        presence_LR=decoded.presence_logits[..., 0],
        boxes_LRQ4=box_convert(boxes_LRQ4, "cxcywh", "xyxy"),
        masks_RQMM=output.pred_masks,
        semantic_RMM=output.semantic_seg[:, 0],
    )


@contextmanager
def _outputs_of(*modules: nn.Module) -> Iterator[dict[nn.Module, Any]]:
    """Collect what the modules return while the context is open."""
    seen: dict[nn.Module, Any] = {}
    hooks = [module.register_forward_hook(lambda own, _, output: seen.update({own: output})) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
