# SPDX-License-Identifier: Apache-2.0
"""Every student and both heads: counts, shapes, gradients, saving, initialisation, and upstream's head."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.utils import ModelEmaV3
from transformers import AutoModel

from effsam3.models.image.student import (
    HEADS,
    StudentError,
    StudentTrunk,
    StudentTrunkConfig,
    load_timm_weights,
    student_config,
)
from effsam3.models.image.teacher import parameter_count
from effsam3.models.registry import IMAGE_STUDENTS, SAM3S, head_params

NINE = [name for name, row in IMAGE_STUDENTS.items() if row.published_millions is not None]


def build(name, head="fused", width=64, image_size=224):
    row = IMAGE_STUDENTS[name]
    config = StudentTrunkConfig(
        timm_name=row.timm_name, out_indices=row.out_indices, head=head, hidden_size=width, image_size=image_size
    )
    return StudentTrunk(config)


def test_there_are_nine():
    assert len(NINE) == 9


@pytest.mark.parametrize("name", IMAGE_STUDENTS)
def test_counts_are_the_registry_rows(name):
    row = IMAGE_STUDENTS[name]
    with torch.device("meta"):
        for head in HEADS:
            student = build(name, head, width=1024)
            assert parameter_count(student.trunk) == row.trunk_params
            assert parameter_count(student.head) == head_params(head, row.channels, 1024)
            assert tuple(student.trunk.feature_info.channels()) == row.channels
    if row.published_millions is not None:
        assert round(row.trunk_params / 1e6, 2) == row.published_millions


@pytest.mark.parametrize("name", IMAGE_STUDENTS)
def test_forward_and_a_finite_gradient_for_every_parameter(name):
    torch.manual_seed(0)
    student = build(name).train()
    for module in student.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # it may drop a block for both images, and with it the block's gradient
    for parameter in student.parameters():
        if not parameter.any():  # RepViT and TinyViT begin with some scales at zero, which would hide what they scale
            torch.nn.init.normal_(parameter, std=0.1)
    feat = student(torch.rand(2, 3, 224, 224) * 2 - 1).last_hidden_state
    assert feat.shape == (2, 256, 64) and feat.dtype == torch.float32
    feat.square().mean().backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("head", ["fused", "stride32"])
@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m", "efficientvit_b0"])
def test_any_input_size(name, head):
    student = build(name, head).eval()
    with torch.no_grad():
        for side in (168, 266):
            assert student(torch.zeros(1, 3, side, side)).last_hidden_state.shape == (1, (side // 14) ** 2, 64)


@pytest.mark.parametrize(("name", "size"), [("tiny_separable_w4", 2_936), ("tiny_separable_w16", 22_688)])
def test_students_of_the_tiny_concept_chassis(name, size):
    """Smaller than 2 and 11 % of its trunk, head included; the map of stride 16 is resized to the grid last."""
    trunk = SAM3S["tiny_concepts"].sizes
    config = student_config(name, "linear", None, hidden_size=64, image_size=160, patch_size=20)
    student = StudentTrunk(config).eval()
    assert parameter_count(student) == size < 0.11 * trunk.trunk_params
    with torch.no_grad():
        assert student(torch.rand(2, 3, 160, 160)).last_hidden_state.shape == (2, 64, 64)
        (feat_BCHW,) = student.trunk(torch.rand(2, 3, 128, 128))
        weight_DC, bias_D = student.head.project.weight[..., 0, 0], student.head.project.bias
        expected_BDGG = torch.einsum("bchw,dc->bdhw", feat_BCHW, weight_DC) + bias_D[:, None, None]
        torch.testing.assert_close(student.head([feat_BCHW], (8, 8)), expected_BDGG, rtol=1e-4, atol=1e-5)
        blocks = [module for module in student.modules() if isinstance(module, DepthwiseSeparableConv)]
        between = [block.bn1(torch.randn(1, block.conv_dw.out_channels, 4, 4)) for block in blocks]
    assert len(between) == 5 and all((feat < 0).any() for feat in between)  # no activation there


def test_positions_are_row_major():
    """A bright spot low on the left must change the features low on the left most."""
    torch.manual_seed(0)
    student = build("tiny_convnext").eval()
    image = torch.zeros(1, 3, 224, 224)
    spot = image.clone()
    spot[..., 168:210, 14:56] = 1
    with torch.no_grad():
        change = (student(spot).last_hidden_state - student(image).last_hidden_state).norm(dim=-1).view(16, 16)
    row, column = divmod(int(change.argmax()), 16)
    assert 11 <= row <= 15 and 0 <= column <= 4


def test_saves_and_loads_bit_for_bit_through_auto_classes(tmp_path):
    torch.manual_seed(0)
    student = build("repvit_m0_9").eval()
    student.set_feature_statistics(torch.randn(64), torch.rand(64) + 0.5)
    student.save_pretrained(tmp_path)
    again, once_more = (AutoModel.from_pretrained(tmp_path).eval() for _ in range(2))
    assert type(again) is StudentTrunk
    weights, read = student.state_dict(), again.state_dict()
    assert weights.keys() == read.keys() and all(torch.equal(weights[name], read[name]) for name in weights)
    pixels = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        feat = again(pixels).last_hidden_state
        assert torch.equal(feat, once_more(pixels).last_hidden_state)
        # Weights read from a file lie unaligned in memory, for which the CPU's kernels round differently.
        torch.testing.assert_close(feat, student(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_averaged_and_loaded_weights_count_from_the_next_eval():
    """TinyViT keeps its attention biases in eval mode; validation must not go on with those of older weights."""
    torch.manual_seed(0)
    student, pixels = build("tiny_vit_5m").eval(), torch.rand(1, 3, 224, 224)

    @torch.no_grad()
    def features(model):
        return model.eval()(pixels).last_hidden_state

    def fresh(weights):
        other = build("tiny_vit_5m")
        other.load_state_dict(weights)
        return features(other)

    ema = ModelEmaV3(student, decay=0.5)
    before = features(ema.module)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("attention_biases"):
                parameter.add_(torch.rand_like(parameter))
    ema.update(student)
    averaged = features(ema.module)
    assert not torch.allclose(averaged, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(averaged, fresh(ema.module.state_dict()))
    ema.module.load_state_dict(student.state_dict())
    torch.testing.assert_close(features(ema.module), fresh(student.state_dict()))


def test_statistics_scale_and_shift_the_output():
    torch.manual_seed(0)
    student = build("tiny_convnext").eval()
    mean, deviation = torch.randn(64), torch.rand(64) + 0.5
    pixels = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        plain = student(pixels).last_hidden_state
        student.set_feature_statistics(mean, deviation)
        torch.testing.assert_close(student(pixels).last_hidden_state, plain * deviation + mean)


def test_upstream_head_interchanges():
    """Names and shapes of `head.*` as in EfficientSAM3's checkpoints (EV-S: 128 channels in, 1024 out)."""
    with torch.device("meta"):
        head = build("efficientvit_b0", "stride32", width=1024).head.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "0.weight": (1024, 128, 1, 1),
        "1.weight": (1024,),
        "1.bias": (1024,),
        "1.running_mean": (1024,),
        "1.running_var": (1024,),
        "1.num_batches_tracked": (),
        "3.weight": (1024, 1024, 3, 3),
        "3.bias": (1024,),
    }


def test_upstream_head_computes_what_upstream_computes():
    """1x1, BatchNorm, GELU, 3x3 at stride 32, then bilinear to the grid, from the published description."""
    torch.manual_seed(0)
    student = build("tiny_convnext", "stride32").eval()
    pixels = torch.rand(1, 3, 224, 224)
    conv1, norm, _, conv2 = student.head
    with torch.no_grad():
        feat = torch.nn.functional.conv2d(student.trunk(pixels)[3], conv1.weight)
        feat = (feat - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        feat = torch.nn.functional.gelu(feat * norm.weight[:, None, None] + norm.bias[:, None, None])
        feat = torch.nn.functional.conv2d(feat, conv2.weight, conv2.bias, padding=1)
        feat = torch.nn.functional.interpolate(feat, (16, 16), mode="bilinear", align_corners=False)
        torch.testing.assert_close(student(pixels).last_hidden_state, feat.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m", "efficientvit_b0"])
def test_pretrained_weights_fill_the_whole_trunk(name, tmp_path):
    torch.manual_seed(1)
    classifier = timm.create_model(IMAGE_STUDENTS[name].timm_name)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    student = build(name)
    load_timm_weights(student, str(tmp_path / "weights.safetensors"))
    expected = classifier.eval().forward_intermediates(torch.ones(1, 3, 224, 224), intermediates_only=True)[-1]
    with torch.no_grad():
        torch.testing.assert_close(student.eval().trunk(torch.ones(1, 3, 224, 224))[3], expected, rtol=1e-4, atol=1e-4)


def test_pretrained_weights_that_do_not_fit_stop(tmp_path):
    save_file(timm.create_model("repvit_m1_1").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(StudentError, match="student_init: .*repvit_m0_9"):
        load_timm_weights(build("repvit_m0_9"), str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("kind", ["missing", "empty.pth", "cut.pth", "cut.safetensors", "nan.pth", "nan.safetensors"])
def test_pretrained_weights_that_are_damaged_stop(tmp_path, kind):
    path, tensors = tmp_path / kind, timm.create_model("repvit_m0_9").state_dict()
    if kind.startswith("nan"):
        next(iter(tensors.values())).view(-1)[0] = torch.nan
    if kind.endswith(".safetensors"):
        save_file(tensors, path)
    elif kind != "missing":
        torch.save({"model": tensors}, path)
    if kind.startswith(("cut", "empty")):
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2 if kind.startswith("cut") else 0])
    told = {
        "missing": "cannot be read",
        "empty": "is empty",
        "cut": "cut short|cannot be read",
        "nan": "has NaN in 1 of",
    }
    with pytest.raises(StudentError, match=f"^student_init: {path}.*({told[kind.partition('.')[0]]})"):
        load_timm_weights(build("repvit_m0_9"), str(path))


def test_pretrained_weights_out_of_reach_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(StudentError, match="student_init=random"):
        load_timm_weights(build("repvit_m0_9"), "imagenet")
