# SPDX-License-Identifier: Apache-2.0
"""Phrases that share an image: the answers and gradients of transformers' detector, for fewer operations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads import pixels
from effsam3.models.heads.detector import answer, ask, detector_levels
from effsam3.models.inference.concepts import PHRASES, ConceptModel
from effsam3.models.text.tokens import PromptTokenizer

ASKED = ["red circle", "blue square", "a dog", "green triangle", "yellow circle"]
IMAGE_R = torch.tensor([1, 0, 1, 1, 0])
BOXES = torch.tensor([[[0.5, 0.4, 0.3, 0.2]], [[0.3, 0.6, 0.2, 0.4]], [[0.0] * 4], [[0.5] * 4], [[0.2] * 4]])
LABELS = torch.tensor([[1], [0], [-10], [1], [1]])


@pytest.fixture
def model():
    """A detector that is alive, in float64, so that only mistakes show."""
    folder = chassis_folder("tiny_concepts")
    return load_whole(model_class(read_config(folder).model_type), folder).double()


@pytest.fixture
def feat(model):
    width = model.config.detector_config.vision_config.backbone_config.hidden_size
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, width, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()


def asked(boxes):
    given = ask(ASKED, IMAGE_R, PromptTokenizer())
    return given._replace(boxes_RN4=BOXES.double(), box_labels_RN=LABELS) if boxes else given


def plain(model, feat, given):
    """What transformers' detector answers to all of them, the image gathered for every phrase."""
    boxes = given.boxes_RN4, given.box_labels_RN
    if boxes[0] is None:
        boxes = torch.zeros(len(ASKED), 1, 4, dtype=feat.dtype), torch.full((len(ASKED), 1), -10)
    maps, places = model.detector_model.vision_encoder.neck(feat)
    output = model.detector_model(
        vision_embeds=Sam3VisionEncoderOutput(
            fpn_hidden_states=tuple(level[IMAGE_R] for level in maps),
            fpn_position_encoding=tuple(place[IMAGE_R] for place in places),
        ),
        input_ids=given.input_ids_RT,
        attention_mask=given.attention_mask_RT,
        input_boxes=boxes[0],
        input_boxes_labels=boxes[1],
    )
    return [getattr(output, f"pred_{name}") for name in ("masks", "boxes", "logits")] + [
        output.presence_logits[:, 0],
        output.semantic_seg[:, 0],
    ]


def shared(model, feat, given, recompute=False):
    found = answer(model, detector_levels(model, feat), given, recompute)
    last = found.boxes_LRQ4[-1], found.logits_LRQ[-1], found.presence_LR[-1]
    return [found.masks_RQMM, *last, found.semantic_RMM]


# ---- the same answers


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 1, 1), (3, 1, 5, 2)])
def test_a_doubled_map_is_convolved_without_doubling_it(shape, monkeypatch):
    torch.manual_seed(0)
    coarse = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, shape[1], 3, 3, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(F.interpolate(coarse, scale_factor=2, mode="nearest"), weight, padding=1)
    scale = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * scale).sum(), (coarse, weight))
    for most in (1 << 26, 1):  # all at once, and row by row
        monkeypatch.setattr(pixels, "TAPS_AT_ONCE", most)
        found = pixels.convolve_doubled(coarse, weight)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((found * scale).sum(), (coarse, weight)), wanted)


@pytest.mark.parametrize("boxes", [False, True])
def test_on_a_cpu_phrases_are_answered_one_after_the_other(model, feat, boxes):
    """Without gradients, so that what they make fits its caches; the answers are the same."""
    sizes, given = [], asked(boxes)
    decoder = model.detector_model.detr_decoder
    decoder.register_forward_pre_hook(lambda _, __, own: sizes.append(len(own["vision_features"])), with_kwargs=True)
    expected = plain(model, feat, given)
    with torch.no_grad():
        found = shared(model, feat, given)
    assert sizes == [len(ASKED)] + [1] * len(ASKED)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("boxes", [False, True])
def test_answers_and_all_gradients_are_those_of_transformers_detector(model, feat, boxes, recompute):
    model.requires_grad_(True)
    given, learning = asked(boxes), [feat, *model.detector_model.parameters()]
    results = []
    for found in (plain(model, feat, given), shared(model, feat, given, recompute)):
        scales = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view(part.shape) for part in found]
        total = sum((part * scale).mean() for part, scale in zip(found, scales, strict=True))
        results.append((found, torch.autograd.grad(total, learning, allow_unused=True)))
    (expected, wanted), (found, gradients) = results
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    reached = [gradient is not None for gradient in wanted]
    assert reached == [gradient is not None for gradient in gradients] and sum(reached) > 150
    for one, other in zip(gradients, wanted, strict=True):
        assert one is None or torch.allclose(one, other, rtol=1e-6, atol=1e-9 * float(other.abs().max()) + 1e-12)


def test_what_is_frozen_gets_no_gradient_and_single_masks_are_those_of_all(model, feat):
    model.requires_grad_(False)
    found = answer(model, detector_levels(model, feat), asked(False))
    queries = torch.tensor([[3, -1], [0, 5], [2, 2], [7, 1], [4, 6]])
    some = found.masks_of(queries)
    for row, own in enumerate(queries.clamp(min=0).tolist()):
        torch.testing.assert_close(some[row], found.masks_RQMM[row, own])
        torch.testing.assert_close(found.phrase(row).masks_of(queries[row : row + 1])[0], some[row])
    some.sum().backward()
    assert feat.grad.any() and not [name for name, own in model.named_parameters() if own.grad is not None]


# ---- for less


def operations(function):
    with FlopCounterMode(display=False) as counted:
        function()
    return counted.get_total_flops()


def test_a_phrase_costs_what_it_does_not_share(model, feat):
    """Counted, not timed, and exactly: what transformers' detector takes, less what is computed once or not at all.

    The text encoder is left out: a student's has a price of its own.
    """
    detector, feat = model.detector_model, feat.detach()[:1]
    masks, queries = detector.mask_decoder, model.config.detector_config.detr_decoder_config.num_queries
    width = model.config.detector_config.detr_encoder_config.hidden_size
    texts = torch.zeros(4, 32, width).double()

    def ours(phrases):
        given = ask(["x"] * phrases, torch.zeros(phrases).long(), PromptTokenizer())
        given = given._replace(texts_RTC=texts[:phrases])
        return operations(lambda: answer(model, detector_levels(model, feat), given))

    of_image = operations(lambda: detector_levels(model, feat))
    of_phrase = ours(1) - of_image
    assert ours(4) == of_image + 4 * of_phrase

    maps, places = detector.vision_encoder.neck(feat)
    seen = Sam3VisionEncoderOutput(fpn_hidden_states=maps, fpn_position_encoding=places)
    box = {"input_boxes": torch.zeros(1, 1, 4).double(), "input_boxes_labels": torch.full((1, 1), -10)}
    read = {"text_embeds": SimpleNamespace(pooler_output=texts[:1]), "attention_mask": torch.ones(1, 32)}
    whole = operations(lambda: detector(vision_embeds=seen, **read, **box))

    flat, pixels_of_one = maps[2].flatten(2).mT, torch.zeros(1, width, 32, 32).double()
    first = operations(lambda: detector.detr_encoder.layers[0].self_attn(flat, flat, flat))
    convolutions = operations(lambda: masks.pixel_decoder(list(maps[:3])))
    shares = pixels.shares_of(masks.pixel_decoder, maps[:3])
    less = operations(lambda: pixels.pixels_of(masks.pixel_decoder, maps[2], shares, torch.zeros(1).long()))
    assert less == convolutions / 4
    projected = operations(lambda: masks.instance_projection(pixels_of_one)) - 2 * queries * width**2
    drawn = 2 * queries * width * 32 * 32  # the masks, of which only those that are asked for are made
    boxes = torch.zeros(1, 1, 4).double(), torch.ones(1, 1).bool(), torch.zeros(1, 1).long()
    geometry = operations(lambda: detector.geometry_encoder(*boxes, maps[2:3], places[2:3]))
    assert of_phrase == whole - first - (convolutions - less) - projected - drawn - geometry
    assert of_phrase < 0.6 * whole


# ---- prediction


@pytest.fixture(scope="module")
def concepts():
    return ConceptModel(chassis_folder("tiny_concepts"))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def test_phrases_of_an_image_are_found_together_as_one_by_one(concepts, image):
    texts = [f"thing {number}" for number in range(PHRASES + 1)]
    box, positive = torch.tensor([[20.0, 30.0, 70.0, 80.0], [5.0, 5.0, 40.0, 20.0]]), torch.tensor([True, False])
    for example in ((), (box, positive)):
        together = list(concepts.find_each(concepts.look(image), (90, 120), texts, *example, threshold=0))
        assert [one.texts[0] for one in together] == texts
        for text, found in zip(texts, together, strict=True):
            alone = concepts.find(concepts.look(image), (90, 120), text, *example, threshold=0)
            torch.testing.assert_close(found.scores_O, alone.scores_O, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.boxes_O4, alone.boxes_O4, rtol=1e-4, atol=1e-2)
            assert (found.masks_OHW != alone.masks_OHW).float().mean() < 1e-4 and found.masks_OHW.any()


def test_trunk_and_neck_run_once_for_an_image_and_the_text_encoder_once_for_a_text(concepts, image):
    counts = {}
    detector = concepts.model.detector_model
    parts = {
        "trunk": detector.vision_encoder.backbone,
        "neck": detector.vision_encoder.neck,
        "text": detector.text_encoder,
    }
    hooks = [
        part.register_forward_hook(lambda own, _, output, name=name: counts.update({name: counts.get(name, 0) + 1}))
        for name, part in parts.items()
    ]
    for texts in (["a", "b", "c"], ["c", "a"], ["a", "d"]):
        list(concepts.find_each(concepts.look(image), (90, 120), texts))
    for hook in hooks:
        hook.remove()
    assert counts == {"trunk": 3, "neck": 3, "text": 2}
