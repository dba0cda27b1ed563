# SPDX-License-Identifier: Apache-2.0
"""Students by name: timm's own entry points whoever overrides them, any backbone of timm, and what cannot be one."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from effsam3.compare import compare, numbers
from effsam3.errors import RecipeError, UserError
from effsam3.models.image.backbones import (
    build,
    build_trunk,
    feature_maps,
    image_student,
    pretrained_cfg,
    student_name,
)
from effsam3.models.image.student import HEADS, StudentTrunk, load_timm_weights, student_config
from effsam3.models.registry import IMAGE_STUDENTS, head_params
from effsam3.recipe.reader import load_recipe
from effsam3.show import show

SMOKE = Path(__file__).parents[2] / "recipes/smoke/image.yaml"
OF_TIMM = [name for name, row in IMAGE_STUDENTS.items() if row.family != "separable"]
# Of every kind: strides 2 to 32, timm's own feature class, channels last, one stride everywhere, buffers in no file
KINDS = {
    "timm/test_resnet": ((8, 16, 32), (48, 192, 96)),
    "timm/mobilenetv3_small_050": ((8, 16, 32), (16, 24, 288)),
    "timm/test_mambaout": ((8, 16, 32), (32, 48, 64)),
    "timm/test_vit": ((16,), (64,)),
    "timm/levit_128": ((16, 32), (128, 256)),
}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def student(name, seen=None, head="fused"):
    return StudentTrunk(student_config(name, head, seen, hidden_size=64, image_size=224, patch_size=14))


# ---- names


def test_a_name_that_others_register_stays_timms():
    """As importing EfficientSAM3's package does with `repvit_m1_1`: in a process that has nothing else imported."""
    code = textwrap.dedent("""
        import sys, types, warnings
        warnings.simplefilter("ignore")
        from timm.models import create_model, register_model
        from torch import nn

        def repvit_m1_1(pretrained=False, **options):
            return nn.Linear(1, 1)

        sys.modules["elsewhere.repvit"] = types.ModuleType("elsewhere.repvit")
        repvit_m1_1.__module__ = "elsewhere.repvit"
        register_model(repvit_m1_1)
        assert isinstance(create_model("repvit_m1_1"), nn.Linear)

        import torch
        from effsam3.models.image.backbones import pretrained_cfg
        from effsam3.models.image.student import StudentTrunk, StudentTrunkConfig
        with torch.device("meta"):
            student = StudentTrunk(StudentTrunkConfig(timm_name="repvit_m1_1"))
        print(sum(parameter.numel() for parameter in student.trunk.parameters()))
        print(pretrained_cfg("repvit_m1_1").hf_hub_id)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parameters, weights = done.stdout.split()
    assert parameters == "7774864" and weights.startswith("timm/repvit_m1_1.")


@pytest.mark.parametrize("name", OF_TIMM)
def test_trunks_are_named_as_timm_names_them(name):
    """So that checkpoints of any version load, and timm's own weights too."""
    row = IMAGE_STUDENTS[name]
    with torch.device("meta"):
        own = build_trunk(row.timm_name, 1008, row.out_indices)
        assert shapes(own) == shapes(timm.create_model(row.timm_name, features_only=True, out_indices=(0, 1, 2, 3)))
    assert pretrained_cfg(row.timm_name) == timm.models.get_pretrained_cfg(row.timm_name)
    assert (row.strides, row.out_indices) == ((4, 8, 16, 32), (0, 1, 2, 3)) and student_name(row.timm_name) == name


def test_weights_are_found_under_timms_tags():
    for name in ("resnet10t", "resnet10t.c3_in1k", "vit_small_patch14_dinov2", "convnextv2_atto.fcmae"):
        assert pretrained_cfg(name) == timm.models.get_pretrained_cfg(name)
    assert (
        image_student("timm/resnet10t.c3_in1k").source == "https://huggingface.co/timm/resnet10t.c3_in1k; apache-2.0"
    )
    assert "cc-by-nc-4.0" in image_student("timm/convnextv2_atto").source


# ---- any backbone


@pytest.mark.parametrize("name", KINDS)
def test_maps_and_counts_are_the_backbones_own(name):
    row = image_student(name, 224)
    assert (row.strides, row.channels) == KINDS[name] and row.published_millions is None
    torch.manual_seed(0)
    built = student(name).eval()
    assert sum(parameter.numel() for parameter in built.trunk.parameters()) == row.trunk_params
    assert sum(parameter.numel() for parameter in built.head.parameters()) == head_params("fused", row.channels, 64)
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        maps = feature_maps(built.trunk, pixels)
        assert built(pixels).last_hidden_state.shape == (1, 256, 64)
    assert [(feat.shape[1], 224 // feat.shape[2]) for feat in maps] == list(
        zip(row.channels, row.strides, strict=True)
    )


@pytest.mark.parametrize("name", [*KINDS, "timm/edgenext_xx_small"])
def test_weights_of_a_classifier_fill_the_whole_trunk(name, tmp_path):
    """Against `forward_intermediates` of the classifier that they come from."""
    torch.manual_seed(1)
    row = image_student(name, 224)
    classifier = build(row.timm_name, 224).eval()
    for parameter in classifier.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02  # some scales begin at zero and hide what they scale
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    built = student(name)
    load_timm_weights(built, str(tmp_path / "weights.safetensors"))
    pixels = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = classifier.forward_intermediates(
            pixels, indices=list(row.out_indices), norm=False, intermediates_only=True
        )
        found = feature_maps(built.trunk.eval(), pixels)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("maps", [1, 2, 3, 4])
def test_the_fused_head_takes_the_maps_that_there_are(maps):
    channels, widths = (8, 12, 16, 20)[-maps:], [40, 20, 10, 5][-maps:]
    head = HEADS["fused"](channels, 64)
    assert sum(parameter.numel() for parameter in head.parameters()) == head_params("fused", channels, 64)
    feats = [torch.randn(2, c, side, side, requires_grad=True) for c, side in zip(channels, widths, strict=True)]
    out = head(feats, (16, 16))
    assert out.shape == (2, 64, 16, 16)
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in head.parameters())
    assert [feat.grad is not None for feat in feats] == [False, True, True, True][-maps:]


def test_the_tables_have_it_without_a_published_number():
    name = "timm/mobilenetv3_small_050"
    row = next(row for row in numbers([name])["image"] if row["student"] == name)
    trunk = image_student(name).trunk_params
    assert (row["trunk"], row["published_millions"], row["published_saved_percent"]) == (trunk, None, None)
    assert row["fused"]["trunk_and_head"] == trunk + head_params("fused", (16, 24, 288), 1024)
    line = next(line for line in compare([name]).splitlines() if name in line)
    assert [cell.strip() for cell in line.split("|")[1:6]] == ["-", name, "-", "-", f"{trunk:,}"]
    assert name not in compare()


def test_show_counts_it():
    text = show(load_recipe(SMOKE, ["student=timm/test_resnet", "student_image_size=128"]))
    trunk, head = image_student("timm/test_resnet", 128).trunk_params, head_params("fused", (48, 192, 96), 64)
    assert f"{trunk:,} trunk + {head:,} fused head = {trunk + head:,} parameters" in text
    assert "; sees 128 px instead of 224" in text
    assert "sees" not in show(load_recipe(SMOKE)).partition("# student")[2].partition("\n")[0]


# ---- what is refused, when the recipe is read


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student=timm/resnet10"], r"student: timm has no backbone called 'resnet10'; did you mean timm/resnet\w+"),
        (["student=timm/resnet10t.a1_in1k"], "no weights 'a1_in1k' of resnet10t; did you mean c3_in1k"),
        (["student=timm/create_model"], "timm has no backbone called 'create_model'"),
        (["student=resnet10t"], r"no image student is called 'resnet10t' \(backbones of timm are called timm/NAME\)"),
        (["student=timm/test_vit", "student_image_size=100"], r"100 px \(.+\); set another student_image_size"),
        (["student=timm/pit_ti_224"], "tensors of timm/pit_ti_224 lead to none of the maps .+body.norm.weight"),
        (["student=timm/coat_tiny", "student_image_size=224"], r"\d+ tensors of timm/coat_tiny are shared by several"),
        (
            ["student=timm/test_vit", "head=stride32"],
            "stride32 reads a map of stride 32, the coarsest .+ has 16",
        ),
        (
            ["student=tiny_separable_w4", "head=stride32"],
            "stride32 reads a map of stride 32, the coarsest .+ has 16; set head=fused",
        ),
        (["student=timm/deit_tiny_patch16_224", "head=stride32"], "has 16; set head=fused"),
        (["student=timm/vgg11", "student_init=imagenet", "student_image_size=32"], "must be 64 px or more, got 32"),
        (
            ["student=timm/test_nfnet", "student_image_size=1009"],
            "1009 px is more than the 224 px that the",
        ),
        (["student=timm/regnetx_002.none"], "timm has no weights 'none' of regnetx_002"),
        (["student=timm/resnest14d", "student_init=imagenet", "student_image_size=64"], None),
        (["student=timm/cs3darknet_s", "student_init=imagenet"], "student_init: timm has no weights of cs3darknet_s"),
        (["train.image_size=512"], "unknown key train.image_size; did you mean image_size"),
        (["student.image_size=512"], r"student: expected text, got .+; did you mean (student_)?image_size\?"),
        (["image_size=512"], "image_size: 512 px is more than SAM 3's own 224"),
    ],
)
def test_what_cannot_be_a_student_is_refused_with_a_sentence(overrides, message):
    if message is None:
        assert load_recipe(SMOKE, overrides).student_image_size == 64
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(SMOKE, overrides)


def test_a_backbone_without_maps_that_a_head_reads(monkeypatch):
    monkeypatch.setattr("effsam3.models.image.backbones.FINEST", 33)
    with pytest.raises(UserError, match="have strides 2, 4, 8, 16, 32, a head needs one of 33 to 32"):
        image_student("timm/resnet14t", 64)
