# SPDX-License-Identifier: Apache-2.0
"""The text teacher and students, against transformers' own models and the published counts."""

import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3LiteTextModel, Sam3Model, Sam3Processor, Sam3VideoModel

from effsam3.errors import UserError
from effsam3.models.chassis.claims import check_weights
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import ChassisError, load_part, quiet_transformers, read_config, read_tensors
from effsam3.models.registry import TEXT_STUDENTS, TINY_TEXT_STUDENTS, text_student_row
from effsam3.models.text.student import (
    DETECTOR,
    TEXT_ENCODER,
    TEXT_PROJECTION,
    TextTeacher,
    check_tokens,
    fold_repmixer,
    lite_text_detector_config,
    text_student,
    to_lite_text_tensors,
)
from effsam3.models.text.tokens import Tokenizer

TEXTS = ["a cat", "", "two large striped zebras, drinking", "x" * 300, "the red truck's left front wheel"]
ROWS = TEXT_STUDENTS | TINY_TEXT_STUDENTS


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


@pytest.fixture(scope="module")
def teacher(folder):
    return TextTeacher.from_folder(folder)


@pytest.fixture(scope="module")
def batch():
    """Ids and mask (5, 32), as transformers' processor pads them: the fourth text fills all 32."""
    return Tokenizer().encode(TEXTS, 32)


@pytest.fixture
def spoil(folder, tmp_path):
    """A function that changes the tensors of a copy of the tiny chassis and returns the copy."""

    def rewrite(change):
        target = tmp_path / "chassis"
        shutil.copytree(folder, target)
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return rewrite


def trained(name, context_length=32, channels=128, seed=0):
    """A student whose norms, scales, statistics and positions are no longer what they start as."""
    torch.manual_seed(seed)
    student = text_student(name, context_length, channels)
    with torch.no_grad():
        for key, tensor in student.state_dict().items():
            if key.endswith(("running_var", "feature_scale")):
                tensor.uniform_(0.5, 2)
            elif key.endswith("layer_scale") or tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return student.eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The teacher


def test_the_teacher_is_transformers_text_features(folder, teacher, batch):
    ids_BL, mask_BL = batch
    with torch.no_grad():
        wanted_BLC = Sam3Model.from_pretrained(folder).eval().get_text_features(ids_BL, mask_BL).pooler_output
    found_BLC = teacher(ids_BL, mask_BL)
    assert torch.equal(found_BLC, wanted_BLC) and found_BLC.dtype == torch.float32
    assert found_BLC.shape == (5, 32, 128) and (teacher.channels, teacher.context_length) == (128, 32)


def test_the_teacher_does_not_see_padding(teacher, batch):
    ids_BL, mask_BL = (tensor[:3] for tensor in batch)
    short_BLC = teacher(ids_BL[:, :9], mask_BL[:, :9])
    assert mask_BL.sum(1).max() == 9
    torch.testing.assert_close(short_BLC[mask_BL[:, :9]], teacher(ids_BL, mask_BL)[mask_BL], rtol=0, atol=2e-6)


def test_the_teacher_is_frozen_and_always_in_eval_mode(folder):
    teacher = TextTeacher.from_folder(folder).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_real_weights_and_tokens_pass_the_guard(teacher, batch):
    check_weights(teacher, "tiny")
    check_weights(teacher, "tiny", teacher.fingerprint)
    check_tokens(teacher(*batch), batch[1])


def test_the_guard_refuses(teacher, batch):
    with pytest.raises(ChassisError, match="353,724,672"):
        check_weights(teacher, "facebook/sam3")
    with pytest.raises(ChassisError, match="the recipe asks for 0123"):
        check_weights(teacher, "tiny", "0123")
    with pytest.raises(ChassisError, match="every token the same"):
        check_tokens(teacher(*batch)[:1, :1].expand(5, 32, 128), batch[1])
    broken_BLC = teacher(*batch)
    broken_BLC[0, 0, 0] = float("inf")
    with pytest.raises(ChassisError, match="not finite"):
        check_tokens(broken_BLC, batch[1])


def test_the_guard_refuses_spoiled_tensors(spoil, teacher):
    name = TEXT_PROJECTION + "weight"
    spoiled = TextTeacher.from_folder(spoil(lambda tensors: tensors.update({name: torch.zeros_like(tensors[name])})))
    assert spoiled.fingerprint != teacher.fingerprint
    with pytest.raises(ChassisError, match="text_projection.weight is constant"):
        check_weights(spoiled, "tiny")


def test_tensors_that_are_no_numbers_are_named(spoil):
    name = TEXT_PROJECTION + "weight"
    with pytest.raises(ChassisError, match="text_projection.weight has NaN"):
        TextTeacher.from_folder(
            spoil(lambda tensors: tensors.update({name: torch.full_like(tensors[name], float("nan"))}))
        )


def test_a_missing_tensor_is_named(spoil):
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    with pytest.raises(ChassisError, match="missing: 1 .*layers.1.mlp.fc1.weight"):
        TextTeacher.from_folder(spoil(lambda tensors: tensors.pop(TEXT_ENCODER + name)))


# The students


@pytest.mark.parametrize("context_length", [16, 32, 77])
@pytest.mark.parametrize("name", ROWS)
def test_parameter_counts(name, context_length):
    row = text_student_row(name)
    with torch.device("meta"):
        student = text_student(name, context_length, 256)
    assert count(student) == row.params(context_length, 256)
    if context_length == 77:
        assert (count(student.text_encoder), count(student)) == (row.encoder_params, row.total_params)


def test_the_published_counts():
    assert [row.total_params for row in TEXT_STUDENTS.values()] == [42_572_544, 63_559_424, 123_847_168]
    assert all(row.published_millions is None for row in TINY_TEXT_STUDENTS.values())
    with pytest.raises(UserError, match="no text student is called 'mobileclip_s2'; did you mean mobileclip_s"):
        text_student_row("mobileclip_s2")


@pytest.mark.parametrize("name", TINY_TEXT_STUDENTS)
def test_every_trainable_parameter_gets_a_gradient(name, batch):
    student = text_student(name, 32, 128).train()
    student(*batch).square().sum().backward()
    trainable = {key: parameter for key, parameter in student.named_parameters() if parameter.requires_grad}
    frozen = {key for key, _ in student.named_parameters()} - set(trainable)
    assert frozen == {"text_encoder.projection.weight"}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trainable.values())
    # A key's bias shifts all of a query's scores alike: its gradient is zero but for rounding.
    assert all(parameter.grad.any() for key, parameter in trainable.items() if not key.endswith("k_proj.bias"))


@pytest.mark.parametrize("name", TINY_TEXT_STUDENTS)
@pytest.mark.parametrize("training", [False, True])
def test_shorter_padding_changes_no_token(name, batch, training):
    ids_BL, mask_BL = (tensor[:3] for tensor in batch)
    full, short = trained(name).train(training), trained(name).train(training)
    short_BLC = short(ids_BL[:, :9], mask_BL[:, :9])
    assert short_BLC.shape == (3, 9, 128)
    torch.testing.assert_close(short_BLC[mask_BL[:, :9]], full(ids_BL, mask_BL)[mask_BL], rtol=0, atol=1e-5)
    # In training, too, the statistics of BatchNorm are those of the padding used afterwards.
    for key, tensor in full.state_dict().items():
        torch.testing.assert_close(short.state_dict()[key], tensor, rtol=0, atol=1e-5)


def test_more_tokens_than_positions_are_refused(batch):
    with pytest.raises(AssertionError, match="32 tokens, the student reads 16"):
        text_student("tiny_text_plain", 16, 128)(*batch)


# The merged model


@pytest.fixture(scope="module", params=TINY_TEXT_STUDENTS)
def merged(request, folder, tmp_path_factory):
    """(student, tensors, saved folder) of the tiny chassis with only its text replaced."""
    student = trained(request.param)
    config = read_config(folder)
    config.detector_config = lite_text_detector_config(config.detector_config, student.text_encoder.config)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(folder).items()
        if not name.startswith((TEXT_ENCODER, TEXT_PROJECTION))
    } | {DETECTOR + name: tensor for name, tensor in to_lite_text_tensors(student).items()}
    model = load_part(Sam3VideoModel(config), dict(tensors))
    target = tmp_path_factory.mktemp("merged")
    with quiet_transformers():
        model.save_pretrained(target, save_original_format=False)
    return student, tensors, target


@pytest.mark.parametrize("model_class", [Sam3VideoModel, Sam3LiteTextModel])
def test_merged_reloads_whole_and_bit_for_bit(merged, model_class):
    _, tensors, target = merged
    with quiet_transformers():
        model, info = model_class.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    prefix = "" if model_class is Sam3VideoModel else DETECTOR
    loaded = model.state_dict()
    wanted = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert set(wanted) <= set(loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    assert read_config(target).detector_config.model_type == "sam3_lite_text"


def test_the_student_is_the_merged_models_text_features(merged, batch):
    student, _, target = merged
    model = Sam3LiteTextModel.from_pretrained(target).eval()
    with torch.no_grad():
        wanted_BLC = model.get_text_features(*batch).pooler_output
        torch.testing.assert_close(student(*batch), wanted_BLC, rtol=1e-5, atol=1e-5)
        # What a table of another length than the processor's padding would do, and why there is none.
        squeezed_BLC = model.get_text_features(batch[0][:3, :9], batch[1][:3, :9]).pooler_output
    valid_BL = batch[1][:3, :9]
    assert (squeezed_BLC[valid_BL] - wanted_BLC[:3, :9][valid_BL]).abs().max() > 0.05


@torch.no_grad()
def test_a_text_finds_masks_and_only_the_text_has_changed(merged, folder):
    student, _, target = merged
    chassis, lite = Sam3Model.from_pretrained(folder).eval(), Sam3LiteTextModel.from_pretrained(target).eval()
    text = Sam3Processor.from_pretrained(folder)(text="a striped cat", return_tensors="pt")
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # The original model always adds a geometry token, transformers only with a box: an empty one, labelled -10.
    box = {"input_boxes": torch.zeros(1, 1, 4), "input_boxes_labels": torch.full((1, 1), -10)}
    found = lite(pixel_values=pixels, **text, **box)
    assert found.pred_masks.shape == (1, 10, 64, 64) and found.pred_masks.isfinite().all()
    # The chassis' own detector, handed the student's features, finds the same.
    features = chassis.get_text_features(**text)
    own = chassis(pixel_values=pixels, text_embeds=deepcopy(features), attention_mask=text["attention_mask"], **box)
    features.pooler_output = student(text["input_ids"], text["attention_mask"].bool())
    same = chassis(pixel_values=pixels, text_embeds=features, attention_mask=text["attention_mask"], **box)
    torch.testing.assert_close(found.pred_masks, same.pred_masks, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.pred_masks, own.pred_masks, rtol=1e-2, atol=1e-2)


def test_a_merged_model_is_no_teacher(merged):
    with pytest.raises(ChassisError, match="'sam3_lite_text_text_model', a student already"):
        TextTeacher.from_folder(merged[2])


def test_the_statistics_become_part_of_the_projection(batch):
    student = trained("tiny_text_plain")
    raw = deepcopy(student)
    mean_C, deviation_C = torch.randn(128), torch.rand(128) + 0.5
    raw.set_feature_statistics(torch.zeros(128), torch.ones(128))
    student.set_feature_statistics(mean_C, deviation_C)
    torch.testing.assert_close(student(*batch), raw(*batch) * deviation_C + mean_C)
    tensors = to_lite_text_tensors(student)
    assert {name.split(".")[0] for name in tensors} == {"text_encoder", "text_projection"}
    assert torch.equal(to_lite_text_tensors(raw)["text_projection.weight"], raw.text_projection.weight)
    raw.load_state_dict(raw.state_dict() | tensors)
    torch.testing.assert_close(raw(*batch), student(*batch), rtol=1e-5, atol=1e-5)


# Folding


@torch.no_grad()
def test_folded_repmixer_computes_the_same_with_less(batch):
    student = trained("tiny_text")
    before = student.state_dict()
    folded = fold_repmixer(student)
    torch.testing.assert_close(folded(*batch), student(*batch), rtol=1e-5, atol=1e-5)
    width, mlp = 32, 128
    # Per block, the biases of two kernels take the place of four BatchNorms and two scales.
    assert count(student) - count(folded) == 2 * (4 * 2 + 2 - 2) * width
    assert count(folded.text_encoder.layers[0]) == 2 * 12 * width + 2 * width * mlp + mlp + width
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_folding_works_inside_the_merged_model(merged, batch):
    student, _, target = merged
    model = Sam3LiteTextModel.from_pretrained(target).eval()
    wanted_BLC = model.get_text_features(*batch).pooler_output
    model.text_encoder = fold_repmixer(model.text_encoder)
    torch.testing.assert_close(model.get_text_features(*batch).pooler_output, wanted_BLC, rtol=1e-5, atol=1e-5)


def test_folding_in_training_is_refused():
    with pytest.raises(AssertionError, match="eval"):
        fold_repmixer(text_student("tiny_text", 32, 128))
