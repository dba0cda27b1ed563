# SPDX-License-Identifier: Apache-2.0
"""Coarse masks of phrases: every second row and column of what transformers' detector computes, for less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from effsam3.errors import RecipeError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.heads import pixels
from effsam3.models.heads.detector import answer, ask, detector_levels
from effsam3.models.inference.prompt_options import Asked, PredictError
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.predictor import Predictor, refuse_misfit
from effsam3.recipe.reader import load_recipe

ASKED = ["red circle", "blue square", "a dog"]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(chassis_folder("tiny_concepts"), device="cpu")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 1, 1), (3, 1, 5, 2)])
def test_every_second_place_of_a_doubled_map(shape):
    torch.manual_seed(0)
    coarse, weight = torch.randn(shape).double(), torch.randn(4, shape[1], 3, 3).double()
    whole = F.conv2d(F.interpolate(coarse, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(pixels.convolve_every_second(coarse, weight), whole[..., ::2, ::2])


def test_what_lies_between_is_interpolated():
    masks = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    found, (height, width) = pixels.fill_between(masks), masks.shape[-2:]
    assert found.shape == (2, 3, 8, 10) and torch.equal(found[..., ::2, ::2], masks)
    rows, columns = np.arange(2 * height) / 2, np.arange(2 * width) / 2
    for own, grown in zip(masks.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), strict=True):
        wide = np.stack([np.interp(columns, np.arange(width), row) for row in own])
        tall = np.stack([np.interp(rows, np.arange(height), column) for column in wide.T], 1)
        np.testing.assert_allclose(grown, tall)


@pytest.mark.parametrize("images", [1, 2])
def test_coarse_masks_are_those_of_transformers_at_every_second_place(predictor, images):
    """transformers' own detector, whose finest level is thinned out before its normalisation."""
    model, detector = predictor.concepts.model, predictor.concepts.model.detector_model
    feat = torch.randn(images, 64, 8, 8, generator=torch.Generator().manual_seed(3))
    image_R = torch.tensor([images - 1, 0, images - 1])
    given = ask(ASKED, image_R, PromptTokenizer())
    with torch.no_grad():
        fine = answer(model, detector_levels(model, feat), given)
        levels = detector_levels(model, feat, coarse_masks=True)
        found = answer(model, levels, given)
        maps, places = detector.vision_encoder.neck(feat)
        norm = detector.mask_decoder.pixel_decoder.norms[1]
        hook = norm.register_forward_pre_hook(lambda own, inputs: (inputs[0][..., ::2, ::2],))
        wanted = detector(
            vision_embeds=Sam3VisionEncoderOutput(
                fpn_hidden_states=tuple(level[image_R] for level in maps),
                fpn_position_encoding=tuple(place[image_R] for place in places),
            ),
            input_ids=given.input_ids_RT,
            attention_mask=given.attention_mask_RT,
        )
        hook.remove()
    assert levels.coarse_masks and wanted.pred_masks.shape[-2:] == (16, 16)
    torch.testing.assert_close(found.masks_RQMM, wanted.pred_masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.semantic_RMM, wanted.semantic_seg[:, 0], rtol=1e-4, atol=1e-4)
    # All but pixels is as without: the same boxes and scores to the bit.
    for name in ("logits_LRQ", "presence_LR", "boxes_LRQ4", "mask_queries_RQC", "mask_offsets_RQ"):
        assert torch.equal(getattr(found, name), getattr(fine, name))
    assert fine.pixels_RCMM.shape[-1] == 2 * found.pixels_RCMM.shape[-1] == 32


def test_they_cost_a_quarter_of_the_finest_level(predictor):
    """Counted: of an image's share of the finest level every fourth place, of a phrase's 4 products instead of 9."""
    model, texts = predictor.concepts.model, torch.zeros(1, 32, 64)
    given = ask(["x"], torch.zeros(1).long(), PromptTokenizer())._replace(texts_RTC=texts)
    feat, counts = torch.zeros(1, 64, 8, 8), []
    for coarse in (False, True):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            levels = detector_levels(model, feat, coarse_masks=coarse)
        with FlopCounterMode(display=False) as asked, torch.no_grad():
            answer(model, levels, given)
        counts.append((counted.get_total_flops(), asked.get_total_flops()))
    (image, phrase), (coarse_image, coarse_phrase) = counts
    product = 2 * 64 * 64  # of a place
    assert image - coarse_image == (32 * 32 - 16 * 16) * 9 * product
    semantic = 2 * 64 * (32 * 32 - 16 * 16)
    assert phrase - coarse_phrase == 16 * 16 * (9 - 4) * product + semantic


def test_predicted_with_the_same_scores_and_masks_of_the_image_s_size(predictor, image):
    fine, coarse = (predictor.image(image, text=ASKED, threshold=0, coarse_masks=own) for own in (False, True))
    plain = predictor.image(image, text=ASKED, threshold=0)
    assert torch.equal(plain.masks_OHW, fine.masks_OHW) and plain.texts == fine.texts == coarse.texts
    assert torch.equal(coarse.scores_O, fine.scores_O) and torch.equal(coarse.boxes_O4, fine.boxes_O4)
    assert coarse.masks_OHW.shape == fine.masks_OHW.shape == (36, 90, 120)
    differing = (coarse.masks_OHW != fine.masks_OHW).float().mean()
    assert 0 < differing < 0.2


def test_where_they_are_not_made():
    with pytest.raises(PredictError, match="--coarse-masks is for the instances that --text finds"):
        Asked((), ((1.0, 2.0, 30.0, 40.0, 1),), (), None, None, coarse_masks=True)
    asked = Asked(("a dog",), (), (), None, None, coarse_masks=True)
    refuse_misfit(asked, False, (90, 120))
    with pytest.raises(PredictError, match="--coarse-masks is for images"):
        refuse_misfit(asked, True, (90, 120))
    assert asked.as_json() == {"texts": ("a dog",), "coarse_masks": True}
    assert Asked(("a dog",), (), (), None, 0.0).as_json() == {"texts": ("a dog",), "threshold": 0.0}
    with pytest.raises(RecipeError, match="evaluate.coarse_masks: only concepts asks for phrases"):
        load_recipe("smoke/image", ["evaluate.coarse_masks=true"])
