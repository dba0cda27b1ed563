# SPDX-License-Identifier: Apache-2.0
"""The text benchmark, against plain loops over texts and tokens."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Sam3LiteTextModel, Sam3Processor, Sam3VideoModel

from effsam3.benchmarks.text import _nearest, load_text_features, plot_similarity, text_similarity, text_speed
from effsam3.errors import UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import ChassisError, load_part, quiet_transformers, read_config, read_tensors
from effsam3.models.registry import TINY_TEXT_STUDENTS
from effsam3.models.text.student import (
    DETECTOR,
    TEXT_ENCODER,
    TEXT_PROJECTION,
    TextTeacher,
    fold_repmixer,
    lite_text_detector_config,
    text_student,
    to_lite_text_tensors,
)
from effsam3.models.text.tokens import Tokenizer

TEXTS = ["a cat", "", "two large striped zebras, drinking", "x" * 300, "the red truck's left front wheel"]
WORDS = "red green old small striped wooden cat dog truck zebra wheel house".split()
PHRASES = [f"{first} {second}" for first in WORDS for second in WORDS] + [f"one {word}" for word in WORDS]


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


@pytest.fixture(scope="module")
def teacher(folder):
    return TextTeacher.from_folder(folder)


@pytest.fixture(scope="module")
def encode():
    return partial(Tokenizer().encode, context_length=32)


def random_student(name="tiny_text"):
    torch.manual_seed(0)
    student = text_student(name, 32, 128)
    student.set_feature_statistics(torch.randn(128), torch.rand(128) + 0.5)
    return student.eval()


@pytest.fixture(scope="module", params=TINY_TEXT_STUDENTS)
def merged(request, folder, tmp_path_factory):
    """(student, saved folder) of the tiny chassis with its text replaced."""
    student = random_student(request.param)
    config = read_config(folder)
    config.detector_config = lite_text_detector_config(config.detector_config, student.text_encoder.config)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(folder).items()
        if not name.startswith((TEXT_ENCODER, TEXT_PROJECTION))
    } | {DETECTOR + name: tensor for name, tensor in to_lite_text_tensors(student).items()}
    target = tmp_path_factory.mktemp("merged")
    with quiet_transformers():
        load_part(Sam3VideoModel(config), tensors).save_pretrained(target, save_original_format=False)
    return student, target


# The merged model's text


@torch.no_grad()
def test_the_merged_text_is_the_student_and_transformers_own(merged, folder, encode):
    student, target = merged
    features = load_text_features(target)
    assert not features.training and not any(parameter.requires_grad for parameter in features.parameters())
    processor, whole = Sam3Processor.from_pretrained(folder), Sam3LiteTextModel.from_pretrained(target).eval()
    for texts in (TEXTS, TEXTS[:3], TEXTS[:1]):
        ids_BL, mask_BL = encode(texts)
        found_BLC = features(ids_BL, mask_BL)
        assert found_BLC.shape == (*ids_BL.shape, 128) and found_BLC.dtype == torch.float32
        torch.testing.assert_close(found_BLC[mask_BL], student(ids_BL, mask_BL)[mask_BL], rtol=0, atol=1e-5)
    # Short ones only: transformers' processor pads but does not cut.
    wanted_BLC = whole.get_text_features(**processor(text=TEXTS[:3], return_tensors="pt")).pooler_output
    ids_BL, mask_BL = encode(TEXTS[:3])
    found_BLC = features(ids_BL, mask_BL)
    torch.testing.assert_close(found_BLC[mask_BL], wanted_BLC[:, : ids_BL.shape[1]][mask_BL], rtol=0, atol=1e-6)


def test_longer_texts_than_the_processors_are_refused(merged):
    ids_BL, mask_BL = Tokenizer().encode(["x" * 300], 40)
    with pytest.raises(AssertionError, match="40 tokens"):
        load_text_features(merged[1])(ids_BL, mask_BL)


def test_a_chassis_without_a_student_is_refused(folder):
    with pytest.raises(ChassisError, match="is not a whole Sam3LiteTextModel"):
        load_text_features(folder)


# Similarity


def test_the_teacher_against_itself_is_perfect(teacher, encode):
    found = text_similarity(teacher, teacher, encode, PHRASES)
    assert found["neighbour_agreement"] == found["retrieval"] == 1
    assert [found[name] for name in ("cosine", "cosine_centred", "pooled_cosine")] == pytest.approx([1, 1, 1])
    assert found["mse"] == 0 and found["texts"] == len(PHRASES)


def test_a_random_student_is_far_below(teacher, encode):
    found = text_similarity(teacher, random_student(), encode, PHRASES)
    assert max(abs(found[name]) for name in ("cosine", "cosine_centred", "pooled_cosine")) < 0.5
    assert found["retrieval"] < 0.1 and found["neighbour_agreement"] < 0.7


@pytest.mark.parametrize("batch", [1, 2, 64])
@torch.no_grad()
def test_against_plain_loops(teacher, encode, batch):
    student = random_student()
    pairs = []  # (teacher tokens, student tokens) of one text, which are all valid: one text needs no padding
    for text in TEXTS:
        ids_BL, mask_BL = encode([text])
        pairs.append((teacher(ids_BL, mask_BL)[0], student(ids_BL, mask_BL)[0]))
    every = torch.cat([target for target, _ in pairs])
    mean, deviation = every.mean(0), every.std(0, correction=0)
    cosine, centred, pooled, targets, preds = [], [], [], [], []
    by_length = {}
    for target, pred in pairs:
        here = [float(F.cosine_similarity(pred[i], target[i], dim=0)) for i in range(len(target))]
        by_length.setdefault(len(target), []).extend(here)
        cosine += here
        target_z, pred_z = (target - mean) / deviation, (pred - mean) / deviation
        centred += [float(F.cosine_similarity(pred_z[i], target_z[i], dim=0)) for i in range(len(target))]
        pooled.append(float(F.cosine_similarity(pred.mean(0), target.mean(0), dim=0)))
        targets.append(target_z.mean(0))
        preds.append(pred_z.mean(0))

    def nearest(vector, others):
        return max(others, key=lambda j: float(F.cosine_similarity(vector, others[j], dim=0)))

    same = retrieved = 0
    for i in range(5):
        rest = [{j: v for j, v in enumerate(vectors) if j != i} for vectors in (targets, preds)]
        same += nearest(targets[i], rest[0]) == nearest(preds[i], rest[1])
        retrieved += nearest(preds[i], dict(enumerate(targets))) == i

    found = text_similarity(teacher, student, encode, TEXTS, batch)
    assert found["cosine"] == pytest.approx(sum(cosine) / len(cosine), abs=1e-5)
    assert found["cosine_centred"] == pytest.approx(sum(centred) / len(centred), abs=1e-5)
    assert found["pooled_cosine"] == pytest.approx(sum(pooled) / 5, abs=1e-5)
    assert (found["neighbour_agreement"], found["retrieval"]) == (same / 5, retrieved / 5)
    assert list(found["by_length"]) == sorted(by_length)
    for length, values in by_length.items():
        assert found["by_length"][length]["cosine"] == pytest.approx(sum(values) / len(values), abs=1e-5)
        assert found["by_length"][length]["texts"] == len(values) / length


def test_texts_of_the_same_tokens_count_once(teacher, encode):
    once = text_similarity(teacher, random_student(), encode, PHRASES)
    twice = text_similarity(
        teacher, random_student(), encode, [*PHRASES, *(text.upper() for text in PHRASES), "y" * 300]
    )
    assert (once["texts"], twice["texts"]) == (len(PHRASES), len(PHRASES) + 1)
    for found in (once, twice):
        assert sum(group["texts"] for group in found["by_length"].values()) == found["texts"]


def test_one_text_is_refused(teacher, encode):
    with pytest.raises(UserError, match="2 held-out texts give 1 different"):
        text_similarity(teacher, teacher, encode, ["a cat", "A  cat"])


def test_neighbours_do_not_depend_on_the_chunks(monkeypatch):
    vectors = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    whole = vectors @ vectors.T
    assert torch.equal(_nearest(vectors, vectors, others=False), torch.arange(50))
    monkeypatch.setattr("effsam3.benchmarks.text.ROWS", 7)
    assert torch.equal(_nearest(vectors, vectors, others=True), whole.fill_diagonal_(-2).argmax(1))


# Speed and the picture


def test_speed_counts_and_ratios(merged, teacher):
    student, target = merged
    features = load_text_features(target)
    found = text_speed(teacher, features)
    assert found["student"]["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert set(found["student"]) == set(found["teacher"]) == set(found["ratio"])
    assert len(found["ratio"]) == 5 and all(value > 0 for value in found["ratio"].values())
    for name in ("8_tokens_ms", "32_tokens_captions_per_s"):
        gain = found["student"][name] / found["teacher"][name]
        assert found["ratio"][name] == pytest.approx(1 / gain if name.endswith("ms") else gain)
    folded = text_speed(teacher, fold_repmixer(features))
    assert folded["student"]["parameters"] <= found["student"]["parameters"]


def test_the_plot_is_a_picture(teacher, encode, tmp_path):
    results = {
        "captions": text_similarity(teacher, random_student(), encode, TEXTS),
        "phrases": text_similarity(teacher, random_student(), encode, PHRASES),
    }
    plot_similarity(results, tmp_path / "length.png")
    with Image.open(tmp_path / "length.png") as picture:
        assert picture.size == (800, 450) and len(picture.convert("RGB").getcolors(2**20)) > 20
