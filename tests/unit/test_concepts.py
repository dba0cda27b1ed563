# SPDX-License-Identifier: Apache-2.0
"""Concepts: the geometry token of prompts without boxes, boxes, batches, texts, and the same through a video."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from transformers import Sam3LiteTextModel, Sam3Processor

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config
from effsam3.models.inference.concepts import ConceptModel, encode_geometry_always
from effsam3.models.text.student import lite_text_config, lite_text_detector_config
from effsam3.models.text.tokens import PROCESSOR_LENGTH, TextTooLong, Tokenizer

SIZE = (90, 120)


@pytest.fixture(scope="module")
def model() -> ConceptModel:
    return ConceptModel(chassis_folder("tiny"))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def by_hand(detector, pixels, ids, mask):
    """Scores, boxes and mask logits as the original computes them: the prompt is the text, then the image's token."""
    vision = detector.vision_encoder(pixels)
    maps, places = vision.fpn_hidden_states[:3], vision.fpn_position_encoding[:3]
    geometry = detector.geometry_encoder
    token_B1C = geometry.cls_embed.weight.expand(len(pixels), 1, -1)
    token_B1C = geometry.prompt_layer_norm(geometry.final_proj(token_B1C))
    for layer in geometry.layers:
        token_B1C = layer(token_B1C, maps[2].flatten(2).mT, places[2].flatten(2).mT, prompt_mask=None)
    token_B1C = geometry.output_layer_norm(token_B1C)
    hidden = detector.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    prompt_BLC = torch.cat([detector.text_projection(hidden), token_B1C], 1)
    mask_BL = torch.cat([mask.bool(), torch.ones(len(mask), 1, dtype=torch.bool)], 1)

    encoded = detector.detr_encoder([maps[2]], prompt_BLC, [places[2]], text_mask=mask_BL)
    decoded = detector.detr_decoder(
        encoded.last_hidden_state,
        encoded.text_features,
        encoded.pos_embeds_flattened,
        text_mask=mask_BL,
        spatial_shapes=encoded.spatial_shapes,
    )
    queries = decoded.intermediate_hidden_states
    logits = detector.dot_product_scoring(queries, encoded.text_features, mask_BL)[-1, ..., 0]
    centre = decoded.reference_boxes[-1].logit(eps=1e-3) + detector.detr_decoder.box_head(queries[-1])
    x, y, w, h = centre.sigmoid().unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    masks = detector.mask_decoder(queries[-1], list(maps), encoded.last_hidden_state, prompt_BLC, mask_BL).pred_masks
    return logits.sigmoid() * decoded.presence_logits[-1].sigmoid(), boxes, masks


def tokens(*texts: str):
    """Ids and mask, by our own tokenizer, padded as the processors pad."""
    rows = Tokenizer().tokenize(list(texts), PROCESSOR_LENGTH)
    ids = torch.tensor([row + [49407] * (PROCESSOR_LENGTH - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (PROCESSOR_LENGTH - len(row)) for row in rows])


def sorted_by_score(scores, *others):
    order = scores.argsort(descending=True)
    return scores[order], *(other[order] for other in others)


def assert_same_instances(found, scores, boxes, logits, size=SIZE):
    """Compare with what the network put out for one image."""
    scores, boxes, logits = sorted_by_score(scores, boxes, logits)
    torch.testing.assert_close(found.scores_O, scores, rtol=1e-4, atol=1e-6)
    scale = torch.tensor([size[1], size[0], size[1], size[0]])
    torch.testing.assert_close(found.boxes_O4, boxes * scale, rtol=1e-4, atol=1e-3)
    masks = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0] > 0
    assert masks.any() and not masks.all()
    assert (found.masks_OHW != masks).float().mean() < 1e-4


# ---- text alone


@torch.no_grad()
def test_a_text_comes_with_the_geometry_encoders_token(model, image):
    detector = model.model.detector_model
    pixels = model.processor.image_processor(image, return_tensors="pt").pixel_values
    ids, mask = tokens("a dog")
    scores, boxes, logits = by_hand(detector, pixels, ids, mask)
    assert_same_instances(model.find(model.look(image), SIZE, "a dog", threshold=0), scores[0], boxes[0], logits[0])

    hook = detector._forward_pre_hooks.popitem()  # transformers as it is, without the token
    plain = detector(pixels, input_ids=ids, attention_mask=mask)
    detector._forward_pre_hooks[hook[0]] = hook[1]
    assert (plain.pred_masks - logits).norm() / logits.norm() > 0.02


@torch.no_grad()
@pytest.mark.parametrize("positional", [True, False])
def test_two_images_with_a_text_each_and_a_text_student(positional):
    config = read_config(chassis_folder("tiny")).detector_config
    student = lite_text_config("tiny_text_plain", PROCESSOR_LENGTH)
    torch.manual_seed(0)
    detector = Sam3LiteTextModel(lite_text_detector_config(config, student)).eval()
    for parameter in detector.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    encode_geometry_always(detector)
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    ids, mask = tokens("a dog", "a red car on the road")
    scores, boxes, logits = by_hand(detector, pixels, ids, mask)
    given, named = ((pixels,), {}) if positional else ((), {"pixel_values": pixels})
    output = detector(*given, input_ids=ids, attention_mask=mask, **named)
    torch.testing.assert_close(output.pred_logits.sigmoid() * output.presence_logits.sigmoid(), scores)
    torch.testing.assert_close(output.pred_boxes, boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.pred_masks, logits, rtol=1e-3, atol=1e-4)


def test_a_long_text_is_refused_on_images_and_in_videos(model, image):
    with pytest.raises(TextTooLong, match="60 tokens long; SAM 3 reads 30"):
        model.find(None, SIZE, "dog " * 60)
    with pytest.raises(TextTooLong, match="31 tokens long"):
        next(model.follow([], SIZE, ["a dog", "\u2019 " * 31]))


@pytest.mark.parametrize("text", ["a person\u2019s hat", "Tom &amp; Jerry", "\u201cA\u201d  \ufb01ne CAT \U0001f600"])
def test_the_text_encoder_sees_open_clips_tokens(model, image, text):
    """On images and in videos, whatever transformers' own tokenizer makes of the text."""
    seen = []
    encoder = model.model.detector_model.text_encoder
    hook = encoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True)
    model.find(model.look(image), SIZE, text)
    pixels = model.processor.image_processor(image, return_tensors="pt").pixel_values
    list(model.follow([pixels[0]], SIZE, [text]))
    hook.remove()
    wanted = [49406, *SimpleTokenizer().encode(text), 49407]
    wanted += [49407] * (PROCESSOR_LENGTH - len(wanted))
    assert [ids.tolist() for ids in seen] == [[wanted], [wanted]]


def test_the_threshold_keeps_the_best(model, image):
    vision = model.look(image)
    every = model.find(vision, SIZE, "a dog", threshold=0)
    assert len(every.scores_O) == 10 and every.scores_O.tolist() == sorted(every.scores_O.tolist(), reverse=True)
    best = model.find(vision, SIZE, "a dog", threshold=float(every.scores_O[3]))
    assert best.ids == [1, 2, 3] and best.texts == ["a dog"] * 3
    assert best.boxes_O4.equal(every.boxes_O4[:3]) and best.masks_OHW.equal(every.masks_OHW[:3])
    none = model.find(vision, SIZE, "a dog", threshold=0.99)
    assert none.masks_OHW.shape == (0, *SIZE) and none.boxes_O4.shape == (0, 4) and none.ids == []


# ---- example boxes


@torch.no_grad()
@pytest.mark.parametrize("text", ["a dog", None])
@pytest.mark.parametrize("positive", [None, [True, False]])
def test_boxes_are_those_of_transformers_processor(model, image, text, positive):
    boxes = [[20.0, 30.0, 100.0, 85.0], [5.0, 60.0, 50.0, 88.0]]
    labels = None if positive is None else [[int(label) for label in positive]]
    processor = Sam3Processor.from_pretrained(chassis_folder("tiny"))
    inputs = processor(image, text, input_boxes=[boxes], input_boxes_labels=labels, return_tensors="pt")
    output = model.model.detector_model(**{name: inputs[name] for name in inputs if name != "original_sizes"})
    scores = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]
    labels_N = None if positive is None else torch.tensor(positive)
    found = model.find(model.look(image), SIZE, text, torch.tensor(boxes), labels_N, threshold=0)
    assert_same_instances(found, scores, output.pred_boxes[0], output.pred_masks[0])
    assert set(found.texts) == {"visual" if text is None else text}


# ---- videos


def test_a_videos_first_frame_is_seen_as_an_image_is(model, image):
    """The detector of a video gets the geometry encoder's token, too."""
    frames = [model.processor.image_processor(image, return_tensors="pt").pixel_values[0]] * 2
    on_image = model.find(model.look(image), SIZE, "a dog", threshold=0)
    threshold = float(on_image.scores_O[:4].sum() - on_image.scores_O[:3].sum()) - 1e-6
    steps = list(model.follow(frames, SIZE, ["a dog"], threshold))
    assert [index for index, _ in steps] == [0, 1]
    found = steps[0][1]
    assert len(found.ids) == len(set(found.ids)) and set(found.texts) == {"a dog"}
    assert found.masks_OHW.shape == (len(found.ids), *SIZE) and found.masks_OHW.any()
    best = set(on_image.scores_O[:4].round(decimals=5).tolist())
    assert set(found.scores_O.round(decimals=5).tolist()) <= best and found.ids


def test_several_texts_share_a_video_and_each_object_knows_its_own(model, image):
    frames = [model.processor.image_processor(image, return_tensors="pt").pixel_values[0]]
    by_text = {text: model.find(model.look(image), SIZE, text, threshold=0).scores_O for text in ("a dog", "two cars")}
    threshold = min(float(scores[0]) for scores in by_text.values()) - 1e-6
    ((_, found),) = model.follow(frames, SIZE, list(by_text), threshold)
    assert set(found.texts) == set(by_text)
    for text, score in zip(found.texts, found.scores_O, strict=True):
        assert (by_text[text] - score).abs().min() < 1e-5
    assert len(list(model.follow(frames, SIZE, ["a dog"]))[0][1].ids) == 0  # SAM 3's own threshold is back
