# SPDX-License-Identifier: Apache-2.0
"""The chassis, the teacher and its guard."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Sam3Model, Sam3VideoModel, Sam3VideoProcessor

from effsam3.models.chassis.claims import check_weights
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import TRUNK, ChassisError, fingerprint, read_tensors
from effsam3.models.image.teacher import Neck, Teacher, check_features, explained_by_pixels


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tiny chassis to spoil, and a function that rewrites its tensors."""
    target = tmp_path / "chassis"
    shutil.copytree(folder, target)

    def rewrite(change):
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return rewrite


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 12, 12, generator=generator) * 2 - 1
    return F.interpolate(coarse, (224, 224), mode="bicubic", align_corners=False).clamp(-1, 1)


def test_the_tap_is_the_trunk_of_transformers_own_model(folder, pixels):
    vision = Sam3Model.from_pretrained(folder).vision_encoder.eval()
    with torch.no_grad():
        reference = vision(pixels)
    trunk = Teacher.from_folder(folder)(pixels)
    assert torch.equal(trunk.flatten(2).transpose(1, 2), reference.last_hidden_state)
    assert torch.equal(Teacher.from_folder(folder, "neck")(pixels), reference.fpn_hidden_states[2])


def test_the_neck_alone_equals_the_tap(folder, pixels):
    assert torch.equal(
        Neck.from_folder(folder)(Teacher.from_folder(folder)(pixels)), Teacher.from_folder(folder, "neck")(pixels)
    )


def test_a_smaller_grid_is_the_resized_map(folder, pixels):
    small, full = Teacher.from_folder(folder, grid=8)(pixels), Teacher.from_folder(folder)(pixels)
    torch.testing.assert_close(
        small, F.interpolate(full, (8, 8), mode="bilinear", align_corners=False, antialias=True)
    )
    with pytest.raises(ChassisError, match="embed.grid is 17"):
        Teacher.from_folder(folder, grid=17)


def test_frozen_and_always_in_eval_mode(folder):
    teacher = Teacher.from_folder(folder).train()
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def test_made_up_chassis_is_made_once_and_the_same(folder, tmp_path, monkeypatch):
    before = fingerprint(read_tensors(folder))
    assert chassis_folder("tiny") == folder
    monkeypatch.setenv("EFFSAM3_CACHE", str(tmp_path))
    again = chassis_folder("tiny")
    assert again != folder and fingerprint(read_tensors(again)) == before
    assert all(tensor.any() for tensor in read_tensors(folder).values())


def test_processor_and_tokenizer_come_with_it(folder):
    processor = Sam3VideoProcessor.from_pretrained(folder)
    assert processor.image_processor.size["height"] == sam3_of("tiny").sizes.image_size
    ids = AutoTokenizer.from_pretrained(folder)("a photo of a cat")["input_ids"]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]  # CLIP's published ids


def test_real_features_pass_the_guard(folder, pixels):
    teacher = Teacher.from_folder(folder)
    check_weights(teacher, "tiny")
    check_weights(teacher, "tiny", teacher.fingerprint)
    check_features(teacher(pixels), pixels)


@pytest.mark.parametrize("antialias", [True, False])
def test_a_resized_image_is_refused(pixels, antialias):
    resized = F.interpolate(pixels, (16, 16), mode="bilinear", align_corners=False, antialias=antialias)
    weights = torch.randn(64, 3)
    passed_off = torch.einsum("cr,brhw->bchw", weights, resized) + torch.randn(64)[:, None, None]
    with pytest.raises(ChassisError, match="resized picture"):
        check_features(passed_off + 0.01 * torch.randn_like(passed_off), pixels)


def test_features_that_ignore_the_image_are_refused(folder, pixels):
    feat = Teacher.from_folder(folder)(pixels)
    with pytest.raises(ChassisError, match="same features"):
        check_features(feat[:1].expand_as(feat).clone(), pixels)


def test_features_that_are_not_finite_are_refused(folder, pixels):
    feat = Teacher.from_folder(folder)(pixels)
    feat[0, 0, 0, 0] = float("nan")
    with pytest.raises(ChassisError, match="not finite"):
        check_features(feat, pixels)


def test_explained_by_pixels_is_r2():
    pixels = torch.randn(2, 3, 16, 16)
    signal, noise = pixels[:, :1], torch.randn(2, 1, 16, 16)
    assert explained_by_pixels(signal, pixels) == pytest.approx(1)
    assert explained_by_pixels(noise, pixels) < 0.1
    assert explained_by_pixels(signal + noise, pixels) == pytest.approx(0.5, abs=0.15)


def test_wrong_size_is_refused(folder):
    with pytest.raises(ChassisError, match="446,236,672"):
        check_weights(Teacher.from_folder(folder), "facebook/sam3")


def test_wrong_fingerprint_is_refused(folder):
    with pytest.raises(ChassisError, match="the recipe asks for 0123"):
        check_weights(Teacher.from_folder(folder), "tiny", "0123")


def test_constant_weights_are_refused(copy):
    name = TRUNK + "layers.0.mlp.fc1.weight"
    spoiled = copy(lambda tensors: tensors.update({name: torch.zeros_like(tensors[name])}))
    with pytest.raises(ChassisError, match="layers.0.mlp.fc1.weight is constant"):
        check_weights(Teacher.from_folder(spoiled), str(spoiled))


def test_a_missing_tensor_is_named(copy):
    spoiled = copy(lambda tensors: tensors.pop(TRUNK + "layers.1.mlp.fc1.weight"))
    with pytest.raises(ChassisError, match="missing: 1 .layers.1.mlp.fc1.weight"):
        Teacher.from_folder(spoiled)


def test_a_tensor_of_another_shape_is_named(copy):
    name = TRUNK + "layer_norm.weight"
    spoiled = copy(lambda tensors: tensors.update({name: torch.ones(7)}))
    with pytest.raises(ChassisError, match="of another shape: 1 .*layer_norm.weight"):
        Teacher.from_folder(spoiled)


def test_another_model_is_refused(copy):
    spoiled = copy(lambda tensors: None)
    config = json.loads((spoiled / "config.json").read_text())
    (spoiled / "config.json").write_text(json.dumps(config | {"model_type": "sam2"}))
    with pytest.raises(ChassisError, match="'sam2'"):
        Teacher.from_folder(spoiled)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "sam3"])
def test_a_checkpoint_that_is_not_there(name):
    with pytest.raises(ChassisError, match="sam3.checkpoint"):
        chassis_folder(name)


def test_a_run_that_is_not_there_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChassisError, match="no run folder runs/first here yet; .* whose name is first first"):
        chassis_folder("runs/first")


def test_the_hub_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ChassisError, match="gated"):
        chassis_folder("facebook/sam3")


def test_sizes_are_those_of_the_config(folder):
    facts = sam3_of("tiny").sizes
    assert facts == sam3_of(str(folder)).sizes
    with torch.device("meta"):
        trunk = Sam3VideoModel.config_class.from_pretrained(folder).detector_config.vision_config.backbone_config
    assert (facts.image_size, facts.hidden_size) == (trunk.image_size, trunk.hidden_size)
    assert facts.trunk_params == sum(parameter.numel() for parameter in Teacher.from_folder(folder).trunk.parameters())
