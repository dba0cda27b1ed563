# SPDX-License-Identifier: Apache-2.0
"""The vision student: its counts, how its necks begin, its place in transformers' own models, its own start."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_folders import image_run, merged_run, vision_run
from timm.layers import DropPath
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam3Model, Sam3TrackerVideoModel, Sam3VideoModel

from effsam3 import merge
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.flops import vision_gflop
from effsam3.models.image.backbones import feature_maps
from effsam3.models.image.teacher import parameter_count
from effsam3.models.merging.slots import SLOTS, MergeError
from effsam3.models.registry import IMAGE_STUDENTS, SAM3, SAM3S, vision_params
from effsam3.models.vision.slot import build_vision_student, encoder_config, start_vision_from
from effsam3.models.vision.start import begin_as, principal_components
from effsam3.models.vision.student import SlimNeck
from effsam3.models.vision.training import Necks, in_whole_model
from effsam3.recipe.reader import load_recipe

WIDTHS = (16, 4, 8, 12)
NECK = 128  # channels of the tiny chassis' necks
FAMILIES = {row.family: name for name, row in IMAGE_STUDENTS.items()}


def encoder(checkpoint="tiny"):
    return SAM3S[checkpoint].config().detector_config.vision_config


def build(name="tiny_convnext", widths=WIDTHS, seen=None):
    torch.manual_seed(0)
    return build_vision_student(encoder(), name, widths, seen)


def pixels(count=2):
    return torch.rand(count, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", IMAGE_STUDENTS)
def test_counts_are_what_the_registry_says(name):
    row = IMAGE_STUDENTS[name]
    with torch.device("meta"):
        student = build_vision_student(encoder("random"), name, (128, 32, 64, 96), None)
    head, necks = vision_params(row.channels, (128, 32, 64, 96), 256)
    assert parameter_count(student.trunk.trunk) == row.trunk_params
    assert (parameter_count(student.trunk.head), parameter_count(student.necks)) == (head, necks)


@pytest.mark.parametrize("name", [name for name in FAMILIES.values() if IMAGE_STUDENTS[name].published_millions])
def test_operations_are_counted_as_they_run(name):
    sam3, sizes = SAM3S["random"], SAM3.sizes
    with torch.device("meta"), torch.no_grad():
        student = build_vision_student(encoder("random"), name, WIDTHS, None).eval()
        pixels = torch.empty(1, 3, sizes.image_size, sizes.image_size)
        maps = feature_maps(student.trunk.trunk, pixels)
        with FlopCounterMode(display=False) as head:
            feat = student.trunk.head(maps, (sizes.grid, sizes.grid))
        with FlopCounterMode(display=False) as necks:
            student.necks(feat)
    row = replace(IMAGE_STUDENTS[name], trunk_gflop=0.0)
    found = vision_gflop(row, WIDTHS, sizes.image_size, sam3)
    assert found["trunk"] == pytest.approx(head.get_total_flops() / 1e9)
    # The mask decoder's convolutions of the tracker's maps are what the counts of SAM 3's necks differ by.
    decoder = SAM3.gflop["tracker_neck"] - SAM3.gflop["detector_neck"]
    assert found["detector_neck"] + found["tracker_neck"] - decoder == pytest.approx(
        necks.get_total_flops() / 1e9, abs=0.011
    )


def test_the_necks_that_they_replace_are_counted_right():
    assert SAM3.sizes.neck_params == SAM3.counts.neck
    with torch.device("meta"):
        assert parameter_count(Necks(encoder()).detector) == SAM3S["tiny"].sizes.neck_params


@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_parameter_gets_a_finite_gradient(name):
    student = build(name).train()
    for module in student.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # it may drop a block for both images, and with it the block's gradient
    for parameter in student.parameters():
        if not parameter.any():  # RepViT and TinyViT begin with some scales at zero, which would hide what they scale
            torch.nn.init.normal_(parameter, std=0.1)
    _, maps = student(pixels())
    assert [tuple(feat.shape) for feat in maps] == [(2, NECK, side, side) for side in (64, 32, 16)] * 2
    sum(feat.square().mean() for feat in maps).backward()
    idle = [key for key, value in student.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == [] and all(value.grad.isfinite().all() for value in student.parameters())


@torch.no_grad()
def test_necks_begin_as_sam3s_own():
    """With room for everything they make the same maps, borders included; with less, better ones than by chance."""
    torch.manual_seed(2)
    necks = Necks(encoder()).eval()
    for parameter in necks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases too
    scale, mean = torch.rand(2, 64, 1, 1) * torch.tensor([3, 1])[:, None, None, None]
    feat, valid = torch.randn(3, 64, 16, 16) * scale + mean, torch.ones(3, 1, 16, 16)
    valid[0, :, :, 9:] = 0  # what is there counts nowhere
    feat[0, :, :, 9:] = 1e3
    used = valid[:, 0] > 0
    wanted, seen = necks(feat), feat[1:]
    statistics = [(one.mean((0, 2, 3)), one.std((0, 2, 3))) for one in wanted]
    close = []  # of every map, by the widths
    for widths in ((64, 128, 128, 128), (80, 140, 140, 140), (64, 16, 32, 64), (32, 16, 32, 64)):
        student = build(widths=widths)
        student.set_feature_statistics(*(torch.cat(each) for each in zip(*statistics, strict=True)))
        components = principal_components(feat.permute(0, 2, 3, 1)[used], widths[0])
        by_chance = cosines(student.necks(components(seen)), wanted)
        begin_as(student, necks, components, feat, valid)
        found = student.necks(components(seen))
        close.append(cosines(found, wanted))
        assert all(close[-1] > by_chance)
        if len(close) <= 2:
            for one, own in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, own[1:], rtol=1e-3, atol=1e-3 * float(own[1:].std()))
    assert all(close[1] > close[2]) and all(close[2] > close[3])


def cosines(found, wanted):
    """Mean cosine of each map of all but the first image."""
    pairs = zip(found, wanted, strict=True)
    return torch.stack([F.cosine_similarity(one, own[1:], dim=1).mean() for one, own in pairs])


@torch.no_grad()
def test_components_are_those_of_numpy():
    """By singular values of standardised channels; numbers of deviation 1 that lead back to the map."""
    torch.manual_seed(0)
    values = torch.randn(500, 5) @ torch.randn(5, 12) * torch.logspace(-1, 1, 12) + torch.arange(12)
    found = principal_components(values, 5)
    standard = (values.double() - values.double().mean(0)) / values.double().std(0, correction=0)
    _, sizes, _ = np.linalg.svd(standard.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.shares_K, (sizes**2 / (sizes**2).sum())[:5], rtol=1e-3)
    numbers = found(values[None, :, None].permute(0, 3, 1, 2))[0, :, :, 0].T
    torch.testing.assert_close(numbers.std(0, correction=0), torch.ones(5), rtol=1e-3, atol=0)
    torch.testing.assert_close(numbers @ found.columns_CK.T + found.mean_C, values, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_transformers_models_have_its_necks_and_sam3s_positions():
    """Built by the config alone; the maps that detector and tracker read are the student's."""
    student = build().eval()
    config = read_config(chassis_folder("tiny"))
    whole = SLOTS["vision"].install(config, student.trunk.config)
    assert whole.detector_config.vision_config == encoder_config(
        config.detector_config.vision_config, student.trunk.config
    )
    tensors = read_tensors(chassis_folder("tiny"))
    model = Sam3VideoModel(deepcopy(whole)).eval()
    own = {name: value for name, value in tensors.items() if not name.startswith(SLOTS["vision"].owns)}
    model.load_state_dict(own | in_whole_model(student.state_dict()))
    _, wanted = student(pixels())
    assert isinstance(model.tracker_neck, SlimNeck)
    seen = model.detector_model.get_vision_features(pixels())
    for found, expected in zip(seen.fpn_hidden_states[:-1], wanted[:3], strict=True):
        assert torch.equal(found, expected)
    teacher = Sam3VideoModel(config).eval()
    for found, expected in zip(
        seen.fpn_position_encoding,
        teacher.detector_model.get_vision_features(pixels()).fpn_position_encoding,
        strict=True,
    ):
        assert torch.equal(found, expected)
    decoder = model.tracker_model.mask_decoder
    read = [decoder.conv_s0(wanted[3]), decoder.conv_s1(wanted[4]), wanted[5]]
    for found, expected in zip(model.get_vision_features_for_tracker(seen)[0], read, strict=True):
        torch.testing.assert_close(found, expected.flatten(2).permute(2, 0, 1))


def test_sam3s_own_models_keep_their_necks():
    necks = Necks(encoder())
    assert sum(parameter.numel() for parameter in necks.parameters()) == 2 * SAM3S["tiny"].sizes.neck_params
    model = Sam3Model(SAM3S["tiny"].config().detector_config)
    assert "vision_encoder.neck.fpn_layers.0.proj2.weight" in model.state_dict()
    assert not isinstance(model.vision_encoder.neck, SlimNeck)


@torch.no_grad()
def test_it_sees_smaller_images_by_itself():
    student = build(seen=112).eval()
    assert [feat.shape[-1] for feat in student(pixels(1))[1]] == [64, 32, 16] * 2


# ---- merged, and back


@torch.no_grad()
def test_a_merged_run_is_one_model_and_starts_the_next(tmp_path):
    folder = vision_run(tmp_path)
    merge.run(load_recipe(folder / "recipe.yaml"))
    merged = read_tensors(folder / "merged")
    assert not [name for name in merged if "proj2" in name or "scale_layers" in name]
    detector, tracker = (
        Sam3Model.from_pretrained(folder / "merged"),
        Sam3TrackerVideoModel.from_pretrained(folder / "merged"),
    )
    student = build()
    start_vision_from(student, folder)
    _, wanted = student.eval()(pixels())
    for found, expected in zip(
        detector.eval().get_vision_features(pixels()).fpn_hidden_states, [*wanted[:3], None], strict=True
    ):
        assert expected is None or torch.equal(found, expected)
    embeddings = tracker.eval().get_image_embeddings(pixels())
    lost = tracker.no_memory_embedding.reshape(1, -1, 1, 1)
    torch.testing.assert_close(embeddings[-1], wanted[5] + lost)
    with pytest.raises(
        MergeError, match=r"tensors are not those of the recipe's student \(student_init: it is tiny_c"
    ):
        start_vision_from(build(widths=(16, 8, 8, 12)), folder)


def test_it_starts_from_an_image_students_trunk(tmp_path):
    folder = merged_run(tmp_path, "image")
    student = build()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    start_vision_from(student, folder)
    prefix = "detector_model.vision_encoder.backbone."
    trunk = {
        name.removeprefix(prefix): value for name, value in read_tensors(folder / "merged").items() if prefix in name
    }
    for name, value in student.state_dict().items():
        own = name.removeprefix("trunk.")
        assert torch.equal(value, trunk[own] if own.startswith("trunk.") else before[name]), name
    with pytest.raises(
        MergeError, match="whose trunk is timm's test_convnext; that of the recipe's student is repvit_m0_9"
    ):
        start_vision_from(build("repvit_m0_9"), folder)


@pytest.mark.parametrize("name", ["sam3", "efficientsam3"])
def test_other_formats_say_that_they_cannot_hold_it(tmp_path, name):
    folder = vision_run(tmp_path)
    with pytest.raises(
        MergeError, match=rf"{name}.pt has the layers of SAM 3's own necks.*merge.formats=\[transformers\]"
    ):
        merge.run(load_recipe(folder / "recipe.yaml", [f"merge.formats=[transformers,{name}]"]))
    assert not (folder / "merged").exists()


def test_two_students_cannot_share_the_trunk(tmp_path):
    parts = [f"parts.image={image_run(tmp_path)}", f"parts.vision={vision_run(tmp_path)}"]
    more = ["parts.text=null", "name=both", f"runs={tmp_path}", "sam3.checkpoint=tiny", "merge.formats=[transformers]"]
    recipe = load_recipe("release/es_rv_m_mc_s", [*parts, *more])
    with pytest.raises(
        MergeError, match="both tiny_convnext in the slot image .* and tiny_convnext in the slot vision"
    ):
        merge.run(recipe)
