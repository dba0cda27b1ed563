# SPDX-License-Identifier: Apache-2.0
"""A whole SAM 3 cut into parts that a runtime can hold: functions from tensors to tensors, of any batch.

What one part puts out by a name, another takes by the same name. The parts that remember are in memory_parts.py.

Letters: B images or prompts, O objects, P points, C channels, D channels of the trunk, G side of its grid, S side of
the image in pixels, L text tokens, N example boxes, K all example boxes, R side of a box's pooled features, E what is
known of a box's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

from effsam3.models.text.tokens import PROCESSOR_LENGTH

# Axes that may have any length when a file is used; all others are the model's own.
DYNAMIC = ("images", "texts", "prompts", "boxes", "objects", "points", "frames", "old_frames", "pointers")


@dataclass(frozen=True)
class Part:
    """One file. `inputs` and `outputs` are {name: its axes, such as "images 3 1008 1008"}, in the module's order."""

    name: str
    module: nn.Module
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def dynamic(self, name: str) -> dict[int, str]:
        """Return the dynamic axes of an input or output by their places."""
        axes = {**self.inputs, **self.outputs}[name].split()
        return {place: axis for place, axis in enumerate(axes) if axis in DYNAMIC}


def parts_of(model: Any) -> list[Part]:
    """Cut a whole model, as `concepts.load_model` returns it, into parts; their weights are the model's own.

    The order is that of use: a part's inputs are outputs of earlier parts, or what a user gives.
    """
    detector, tracker = model.detector_model, model.tracker_model
    side, grid = tracker.config.image_size, tracker.backbone_feature_sizes[-1][0]
    width = detector.config.vision_config.backbone_config.hidden_size
    channels = detector.config.detr_encoder_config.hidden_size
    sizes = [f"{size[0]} {size[0]}" for size in tracker.backbone_feature_sizes]
    features = {"features": f"images {width} {grid} {grid}"}
    maps = {f"map_{level}": f"{channels} {size}" for level, size in enumerate(sizes)}
    fine = {"fine_0": f"{channels // 8} {sizes[0]}", "fine_1": f"{channels // 4} {sizes[1]}"}
    top = f"{channels} {sizes[2]}"
    text, mask = {"text_features": f"{PROCESSOR_LENGTH} {channels}"}, {"attention_mask": f"{PROCESSOR_LENGTH}"}
    queries = detector.config.detr_decoder_config.num_queries
    parts = [
        Part("trunk", Trunk(detector.vision_encoder), {"pixels": f"images 3 {side} {side}"}, features),
        Part("detector_neck", DetectorNeck(detector.vision_encoder.neck), features, each("images", maps)),
        Part(
            "text_encoder",
            TextEncoder(detector),
            {"input_ids": f"texts {PROCESSOR_LENGTH}", **each("texts", mask)},
            each("texts", text),
        ),
        Part(
            "detector",
            Detector(detector, [size[0] for size in tracker.backbone_feature_sizes]),
            {
                **each("prompts", maps | text | mask),
                "boxes": "prompts boxes 4",
                "box_labels": "prompts boxes",
            },
            {
                "concept_masks": f"prompts {queries} {sizes[0]}",
                "concept_boxes": f"prompts {queries} 4",
                "concept_scores": f"prompts {queries}",
            },
        ),
        Part(
            "tracker_neck",
            TrackerNeck(model.tracker_neck, tracker),
            features,
            each("images", fine | {"top": top, "image_embedding": top}),
        ),
        Part(
            "mask_decoder",
            MaskDecoder(tracker),
            {
                **each("images", {"image_embedding": top} | fine),
                "points": "images objects points 2",
                "labels": "images objects points",
            },
            {
                "masks": f"images objects 4 {sizes[0]}",
                "scores": "images objects 4",
                "best": "images objects",
                "object_logits": "images objects",
                "object_pointers": f"images objects {channels}",
            },
        ),
    ]
    return parts


def each(axis: str, named: Mapping[str, str]) -> dict[str, str]:
    """Put an axis before those of every entry."""
    return {name: f"{axis} {axes}" for name, axes in named.items()}


# ---- the image


class Trunk(nn.Module):
    """Normalised pixels (B, 3, S, S) to features (B, D, G, G)."""

    def __init__(self, vision_encoder: Any):
        super().__init__()
        self.backbone = vision_encoder.backbone

    def forward(self, pixels: Tensor) -> Tensor:
        feat_BND = self.backbone(pixels).last_hidden_state
        grid = pixels.shape[-1] // self.backbone.config.patch_size
        return feat_BND.transpose(1, 2).unflatten(2, (grid, grid))


class DetectorNeck(nn.Module):
    """Features to the detector's three maps, finest first."""

    def __init__(self, neck: Any):
        super().__init__()
        self.layers = neck.fpn_layers[:-1]  # SAM 3 never reads the coarsest map

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(features) for layer in self.layers)


class TrackerNeck(nn.Module):
    """Features to what the mask decoder takes: two fine maps, and the top one without and with a lack of memory."""

    def __init__(self, neck: Any, tracker: Any):
        super().__init__()
        self.layers = neck.fpn_layers[:-1]
        self.conv_s0, self.conv_s1 = tracker.mask_decoder.conv_s0, tracker.mask_decoder.conv_s1
        self.no_memory = tracker.no_memory_embedding

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        fine, middle, top = (layer(features) for layer in self.layers)
        return self.conv_s0(fine), self.conv_s1(middle), top, top + self.no_memory.reshape(1, -1, 1, 1)


# ---- concepts


class TextEncoder(nn.Module):
    """Token ids and their mask (B, L) to features (B, L, C)."""

    def __init__(self, detector: Any):
        super().__init__()
        self.text_encoder, self.text_projection = detector.text_encoder, detector.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.text_projection(hidden)


class Detector(nn.Module):
    """Maps, text features and example boxes to masks (logits), boxes (x1, y1, x2, y2 in 0..1) and scores in 0..1.

    Boxes are center x, center y, width and height in 0..1; their label is 1, 0 for what is not meant, or -10 for
    none: a prompt without examples has one such box.
    """

    def __init__(self, detector: Any, sides: list[int]):
        super().__init__()
        self.detector = detector
        # transformers reads the grid from a tensor, of which an exporter does not know the numbers.
        decoder, grid = detector.detr_decoder, (sides[-1], sides[-1])
        bias_of = type(decoder)._get_rpb_matrix
        decoder._get_rpb_matrix = lambda boxes, _: bias_of(decoder, boxes, grid)
        # And it takes the boxes of each image apart, which fixes the number of images.
        encoder = detector.geometry_encoder
        encoder._encode_boxes = lambda boxes, mask, labels, feat: (_encode_boxes(encoder, boxes, labels, feat), mask)
        encode, channels = detector.vision_encoder.neck.position_encoding, encoder.hidden_size
        for level, side in enumerate(sides):
            place_1CHW = encode((1, channels, side, side), detector.device, torch.float32)
            self.register_buffer(f"place_{level}", place_1CHW)

    def forward(
        self,
        map_0: Tensor,
        map_1: Tensor,
        map_2: Tensor,
        text_features: Tensor,
        attention_mask: Tensor,
        boxes: Tensor,
        box_labels: Tensor,
    ) -> tuple[Tensor, ...]:
        maps = (map_0, map_1, map_2)
        places = tuple(self.get_buffer(f"place_{level}").expand_as(feat) for level, feat in enumerate(maps))
        # SAM 3 drops the last level; whatever stands there is not looked at.
        seen = SimpleNamespace(
            fpn_hidden_states=(*maps, map_2), fpn_position_encoding=(*places, places[2]), hidden_states=None,
            attentions=None,
        )  # fmt: skip
        found = self.detector(
            vision_embeds=seen,
            text_embeds=SimpleNamespace(pooler_output=text_features),
            attention_mask=attention_mask,
            input_boxes=boxes,
            input_boxes_labels=box_labels,
        )
        scores = found.pred_logits.sigmoid() * found.presence_logits.sigmoid()
        return found.pred_masks, found.pred_boxes, scores


def _encode_boxes(encoder: Any, boxes_BN4: Tensor, labels_BN: Tensor, feat_BCGG: Tensor) -> Tensor:
    """Return what transformers' `Sam3GeometryEncoder` makes of example boxes, (B, N, C), for any B and N."""
    images, count = labels_BN.shape
    # All boxes in one list, each with the number of its image, as torchvision's own kernel has them.
    image_BN1 = torch.arange(images, device=boxes_BN4.device)[:, None, None].expand(-1, count, 1)
    corners_BN4 = box_convert(boxes_BN4, "cxcywh", "xyxy") * feat_BCGG.shape[-1]
    rois_K5 = torch.cat([image_BN1.to(boxes_BN4.dtype), corners_BN4], 2).flatten(0, 1)
    pooled_KCRR = roi_align(feat_BCGG, rois_K5, encoder.roi_size)
    place_KE = encoder._encode_box_coordinates(*boxes_BN4.flatten(0, 1).unbind(1))
    seen_KC = encoder.boxes_pool_project(pooled_KCRR).flatten(1) + encoder.boxes_pos_enc_project(place_KE)
    seen_BNC = seen_KC.unflatten(0, (images, count))
    return encoder.label_embed(labels_BN) + encoder.boxes_direct_project(boxes_BN4) + seen_BNC


# ---- objects that are shown


class MaskDecoder(nn.Module):
    """Points of objects to mask logits, four candidates each, predicted IoU, and which candidate SAM 3 takes.

    Points are x, y in pixels of the model's image; labels are 1 on the object, 0 next to it, 2 and 3 for the upper
    left and lower right corner of a box, -1 for no point at all. Candidate 0 is for prompts that are clear. What
    SAM 3 takes: of a single point or none the best of 1 to 3; else 0, or the best of 1 to 3 if 0 is not stable.
    `object_logits` are above 0 for objects that are there; `object_pointers` are what a video's later frames read.
    """

    def __init__(self, tracker: Any):
        super().__init__()
        self.prompt_encoder, self.decoder = tracker.prompt_encoder, copy(tracker.mask_decoder)
        self.falls_back = self.decoder.dynamic_multimask_via_stability
        # Asked for the stable one of all candidates, the decoder then returns them all.
        self.decoder.dynamic_multimask_via_stability = True
        self.decoder._dynamic_multimask_via_stability = lambda masks, scores: (masks, scores)
        self.pointer, self.no_pointer = tracker.object_pointer_proj, tracker.no_object_pointer
        self.place_1CGG: Tensor
        self.register_buffer("place_1CGG", tracker.get_image_wide_positional_embeddings())

    def forward(
        self, image_embedding: Tensor, fine_0: Tensor, fine_1: Tensor, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        images, objects = labels.shape[:2]

        def by_object(value: Tensor) -> Tensor:
            return value[:, 0].unflatten(0, (images, objects))

        # Each object is an image of its own to the decoder: exporters repeat images wrongly (onnxscript 0.7).
        sparse, dense = self.prompt_encoder(points.flatten(0, 1)[:, None], labels.flatten(0, 1)[:, None], None, None)
        embedding, *fine = (
            feat[:, None].expand(-1, objects, -1, -1, -1).flatten(0, 1) for feat in (image_embedding, fine_0, fine_1)
        )
        masks, scores, tokens, logits = (by_object(found) for found in self._decode(embedding, sparse, dense, fine))

        best_of_three = 1 + scores[:, :, 1:].argmax(2)
        is_stable = torch.ones_like(best_of_three, dtype=torch.bool)
        if self.falls_back:
            stability = self.decoder._get_stability_scores(masks[:, :, 0])
            is_stable = stability >= self.decoder.dynamic_multimask_stability_thresh
        clear = (labels >= 0).sum(2) > 1
        best = torch.where(clear & is_stable, 0, best_of_three)
        # As SAM 3: where a clear prompt falls back on another mask, the pointer remains that of mask 0.
        taken = torch.where(clear, 0, best_of_three)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
        pointer = torch.where(logits > 0, self.pointer(tokens.gather(2, taken)[:, :, 0]), self.no_pointer)
        return masks, scores, best, logits[..., 0], pointer

    def _decode(self, embedding: Tensor, sparse: Tensor, dense: Tensor, fine: list[Tensor]) -> tuple[Tensor, ...]:
        """Return masks, scores and tokens of all four candidates, and the object's logit."""
        seen: list[Tensor] = []
        # transformers returns the tokens of the candidates that are asked for; here all of them pass by.
        with self.decoder.transformer.register_forward_hook(lambda *call: seen.append(call[-1][0])):
            masks, scores, _, logits = self.decoder(
                embedding, self.place_1CGG.expand_as(embedding), sparse, dense, False, fine
            )
        return masks, scores, seen[0][:, :, 2 : 2 + self.decoder.num_mask_tokens], logits
