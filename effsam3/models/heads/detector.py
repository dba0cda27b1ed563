# SPDX-License-Identifier: Apache-2.0
"""Instances of phrases: SAM 3's detector, differentiable, with the answers of all its decoder's layers.

What an image is to the detector before anything is asked, `Levels`, is computed once, whatever number of phrases is
asked of it: the neck, the encoder's first self-attention, the token that sums up the image, and the image's share of
the pixels that masks are made of. The answers are those of transformers' detector.

Letters: B images, R phrases of all images, T tokens, N example boxes, P tokens of a prompt (a phrase and its boxes),
D channels of the trunk, G side of the grid, S = G G, C channels of the neck, L decoder layers, Q queries, F some of
them, M = 4 G side of the masks (2 G of coarse ones).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

from effsam3.models.heads.pixels import of_phrases, pixels_of, shares_of
from effsam3.models.heads.trunk import plus_view
from effsam3.models.text.tokens import PromptTokenizer

PADDING = -10  # the label with which transformers' SAM 3 marks boxes that only fill up a batch


class Asked(NamedTuple):
    """Phrases that are asked for, each on one image, and example boxes, if any phrase has one."""

    image_R: Tensor
    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    texts_RTC: Tensor | None = None  # what `encode_texts` has made of the phrases; None: it is still to be called
    boxes_RN4: Tensor | None = None  # centre x, y, width, height in 0..1
    box_labels_RN: Tensor | None = None  # 1, 0 of what is not meant, or PADDING

    def each(self, function: Callable[[Tensor], Tensor]) -> Asked:
        """Apply a function to all tensors."""
        return Asked(*(None if own is None else function(own) for own in self))  # type: ignore[arg-type]  # None stays where None may be


class Levels(NamedTuple):
    """What images are to the detector before anything is asked of them."""

    top_BCGG: Tensor  # the level that phrases look at
    place_1CGG: Tensor  # its positions, the same on any image
    seen_BSC: Tensor  # the level after the encoder's first self-attention
    tokens_BNC: Tensor  # what sums up an image, where there is no example box
    known_BN: Tensor  # bool: which of these tokens count
    shares: tuple[Tensor, ...]  # of the finer levels in the pixels, (B, C, ., .) each, finest last

    @property
    def coarse_masks(self) -> bool:
        """Whether every second row and column of the masks is left out."""
        return self.shares[-1].shape[-1] == self.shares[-2].shape[-1]


class Answers(NamedTuple):
    """What the detector answers to R phrases. Scores and masks are logits."""

    logits_LRQ: Tensor
    presence_LR: Tensor
    boxes_LRQ4: Tensor  # x1, y1, x2, y2 in 0..1
    mask_queries_RQC: Tensor  # a mask is its query's product with the pixels, plus its offset; of the last layer
    mask_offsets_RQ: Tensor
    pixels_RCMM: Tensor
    semantic_RMM: Tensor  # all instances in one mask

    @property
    def scores_RQ(self) -> Tensor:
        """The last layer's probabilities: of the query being an instance, times that of the phrase being there."""
        return self.logits_LRQ[-1].float().sigmoid() * self.presence_LR[-1].float().sigmoid()[:, None]

    @property
    def masks_RQMM(self) -> Tensor:
        """The masks of all queries. They are made when they are asked for: few of them are needed."""
        return _masks(self.mask_queries_RQC, self.mask_offsets_RQ, self.pixels_RCMM)

    def masks_of(self, query_RF: Tensor) -> Tensor:
        """Return the masks (R, F, M, M) of some queries of each phrase; of -1, none, another query's."""
        row_R1 = torch.arange(len(query_RF), device=query_RF.device)[:, None]
        place = row_R1, query_RF.clamp(min=0)
        return _masks(self.mask_queries_RQC[place], self.mask_offsets_RQ[place], self.pixels_RCMM)

    def phrase(self, row: int) -> Answers:
        """Return the answers to one of the phrases."""
        return Answers(*(own.narrow(dim, row, 1) for own, dim in zip(self, PHRASE_DIMS, strict=True)))


PHRASE_DIMS = (1, 1, 1, 0, 0, 0, 0)  # where R is, in each of the answers


def ask(phrases: Sequence[str], image_R: Tensor, tokenizer: PromptTokenizer) -> Asked:
    """Ask for phrases without example boxes; all tensors are on the device of `image_R`.

    Raises:
        TextTooLong: a phrase has more tokens than SAM 3 reads.
    """
    tokens, device = tokenizer(list(phrases), return_tensors="pt"), image_R.device
    return Asked(image_R, tokens["input_ids"].to(device), tokens["attention_mask"].to(device))


# ---- once for all phrases of an image


def detector_levels(
    model: Any, feat_BDGG: Tensor, view_BC: Tensor | None = None, coarse_masks: bool = False
) -> Levels:
    """Run on images what does not depend on phrases.

    Args:
        model: a `Sam3VideoModel`, or what else has a `detector_model`.
        feat_BDGG: of a trunk, whichever: the model's own does not run.
        view_BC: is added to every level of the neck, see `plus_view`.
        coarse_masks: answers are to have every second row and column of the masks only, see `pixels.py`.
    """
    maps, places = model.detector_model.vision_encoder.neck(feat_BDGG)
    # SAM 3 leaves out the coarsest of the four.
    return read_levels(model.detector_model, plus_view(maps, view_BC)[:-1], places[-2][:1], coarse_masks)


def read_levels(detector: Any, maps: tuple[Tensor, ...], place_1CGG: Tensor, coarse_masks: bool = False) -> Levels:
    """Return what the neck's maps, finest first, are to the detector; `place_1CGG` are the last one's positions."""
    top_BCGG, layer = maps[-1], detector.detr_encoder.layers[0]
    flat_BSC = _flat(top_BCGG)
    normed_BSC = layer.layer_norm1(flat_BSC)
    placed_BSC = normed_BSC + _flat(place_1CGG)
    attended_BSC, _ = layer.self_attn(query=placed_BSC, key=placed_BSC, value=normed_BSC)
    # A box that is padding: without any, transformers leaves out the geometry encoder, which SAM 3 always runs.
    boxes_B14 = top_BCGG.new_zeros(len(top_BCGG), 1, 4)
    labels_B1 = torch.full((len(top_BCGG), 1), PADDING, device=top_BCGG.device)
    return Levels(
        top_BCGG,
        place_1CGG,
        flat_BSC + layer.dropout(attended_BSC),
        *_geometry(detector, top_BCGG, place_1CGG, boxes_B14, labels_B1),
        shares_of(detector.mask_decoder.pixel_decoder, maps, coarse_masks),
    )


def _geometry(
    detector: Any, top_RCGG: Tensor, place_1CGG: Tensor, boxes_RN4: Tensor, labels_RN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens of example boxes and of the image itself, and which of them count."""
    given_RN = labels_RN != PADDING
    found = detector.geometry_encoder(
        box_embeddings=boxes_RN4,
        box_mask=given_RN,
        box_labels=torch.where(given_RN, labels_RN, 0),
        img_feats=(top_RCGG,),
        img_pos_embeds=(place_1CGG,),
    )
    return found.last_hidden_state, found.attention_mask


# ---- for each phrase


def answer(model: Any, levels: Levels, asked: Asked, recompute: bool = False) -> Answers:
    """Ask the detector for phrases on the images of `levels`.

    Args:
        recompute: keep no activations of phrases, but compute them again in the backward pass, phrase by phrase: the
            memory of one phrase instead of R.

    Raises:
        ValueError: no phrase is asked for.
    """
    if not len(asked.image_R):
        raise ValueError("no phrase is asked for, and transformers cannot answer none")
    own = partial(_answer, model.detector_model)
    # What many phrases make at once is too large for a CPU's caches, which costs it more than calls do.
    if not recompute and (torch.is_grad_enabled() or asked.image_R.device.type != "cpu"):
        return own(levels, asked)
    alone = [asked.each(itemgetter(slice(row, row + 1))) for row in range(len(asked.image_R))]
    found = [checkpoint(own, levels, one, use_reentrant=False) if recompute else own(levels, one) for one in alone]
    return Answers(*(torch.cat(own, dim) for own, dim in zip(zip(*found, strict=True), PHRASE_DIMS, strict=True)))


def encode_texts(detector: Any, input_ids_RT: Tensor, attention_mask_RT: Tensor) -> Tensor:
    """Return what the text encoder makes of phrases, (R, T, C)."""
    found = detector.get_text_features(input_ids=input_ids_RT, attention_mask=attention_mask_RT, return_dict=True)
    return found.pooler_output


def _answer(detector: Any, levels: Levels, asked: Asked) -> Answers:
    image_R, grid = asked.image_R, levels.top_BCGG.shape[-2:]
    prompt_RPC, known_RP = _prompt(detector, levels, asked)
    seen_RSC, place_1SC = of_phrases(levels.seen_BSC, image_R), _flat(levels.place_1CGG)
    reads = create_bidirectional_mask(
        detector.detr_encoder.config, seen_RSC, known_RP, encoder_hidden_states=prompt_RPC
    )
    seen_RSC = _fuse(detector.detr_encoder, seen_RSC, place_1SC, prompt_RPC, reads)
    decoder = detector.detr_decoder
    decoded = decoder(
        vision_features=seen_RSC,
        text_features=prompt_RPC,
        vision_pos_encoding=place_1SC,
        text_mask=known_RP,
        spatial_shapes=torch.tensor([grid], device=seen_RSC.device),
    )
    states_LRQC = decoded.intermediate_hidden_states
    boxes_LRQ4 = (inverse_sigmoid(decoded.reference_boxes) + decoder.box_head(states_LRQC)).sigmoid()
    logits_LRQ1 = detector.dot_product_scoring(
        decoder_hidden_states=states_LRQC, text_features=prompt_RPC, text_mask=known_RP
    )
    masks = detector.mask_decoder
    attended_RSC, _ = masks.prompt_cross_attn(
        query=masks.prompt_cross_attn_norm(seen_RSC), key=prompt_RPC, value=prompt_RPC, attention_mask=reads
    )
    coarse_RCGG = (seen_RSC + masks.prompt_cross_attn_dropout(attended_RSC)).mT.unflatten(2, grid)
    pixels_RCMM = pixels_of(masks.pixel_decoder, coarse_RCGG, levels.shares, image_R)
    # The pixels' projection is linear, so the few queries take it instead of the many pixels.
    projection, embedded_RQC = masks.instance_projection, masks.mask_embedder(states_LRQC[-1])
    return Answers(
        logits_LRQ=logits_LRQ1[..., 0],
        presence_LR=decoded.presence_logits[..., 0],
        boxes_LRQ4=box_convert(boxes_LRQ4, "cxcywh", "xyxy"),
        mask_queries_RQC=embedded_RQC @ projection.weight[:, :, 0, 0],
        mask_offsets_RQ=embedded_RQC @ projection.bias,
        pixels_RCMM=pixels_RCMM,
        semantic_RMM=masks.semantic_projection(pixels_RCMM)[:, 0],
    )


def _prompt(detector: Any, levels: Levels, asked: Asked) -> tuple[Tensor, Tensor]:
    """Return the tokens of the phrases, of their example boxes and of their images, and which of them count."""
    texts_RTC = asked.texts_RTC
    if texts_RTC is None:
        texts_RTC = encode_texts(detector, asked.input_ids_RT, asked.attention_mask_RT)
    if asked.boxes_RN4 is None or asked.box_labels_RN is None:
        tokens_RNC, known_RN = (of_phrases(own, asked.image_R) for own in (levels.tokens_BNC, levels.known_BN))
    else:
        top_RCGG = of_phrases(levels.top_BCGG, asked.image_R)
        tokens_RNC, known_RN = _geometry(detector, top_RCGG, levels.place_1CGG, asked.boxes_RN4, asked.box_labels_RN)
    return torch.cat([texts_RTC, tokens_RNC], 1), torch.cat([asked.attention_mask_RT.bool(), known_RN], 1)


def _fuse(encoder: Any, seen_RSC: Tensor, place_1SC: Tensor, prompt_RPC: Tensor, reads: Tensor | None) -> Tensor:
    """Run the encoder from behind its first self-attention."""
    first, *others = encoder.layers
    crossed_RSC, _ = first.cross_attn(
        query=first.layer_norm2(seen_RSC), key=prompt_RPC, value=prompt_RPC, attention_mask=reads
    )
    seen_RSC = seen_RSC + first.dropout(crossed_RSC)
    seen_RSC = seen_RSC + first.dropout(first.mlp(first.layer_norm3(seen_RSC)))
    for layer in others:
        seen_RSC = layer(
            seen_RSC, prompt_feats=prompt_RPC, vision_pos_encoding=place_1SC, prompt_cross_attn_mask=reads
        )
    return seen_RSC


def _flat(map_BCGG: Tensor) -> Tensor:
    """Return a map as a sequence, (B, S, C)."""
    return map_BCGG.flatten(2).mT


def _masks(queries_RFC: Tensor, offsets_RF: Tensor, pixels_RCMM: Tensor) -> Tensor:
    found_RFS = torch.baddbmm(offsets_RF[..., None], queries_RFC, pixels_RCMM.flatten(2))
    return found_RFS.unflatten(2, pixels_RCMM.shape[-2:])
