# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM3's names: every student there and back, references written out, folded statistics, what is refused."""

import pytest
import torch
import xxhash
from apple_tower import AppleTower, randomise
from torch import nn

from effsam3.models.image.student import StudentTrunk, StudentTrunkConfig
from effsam3.models.keymaps import KeyMapError
from effsam3.models.keymaps.upstream import (
    REPVIT_DEPTHS,
    image_from_upstream,
    image_key_map,
    image_to_upstream,
    text_from_upstream,
    text_to_upstream,
)
from effsam3.models.registry import IMAGE_STUDENTS, TEXT_STUDENTS
from effsam3.models.text.student import StudentText, lite_text_config, text_student, to_lite_text_tensors

NINE = [row.timm_name for row in IMAGE_STUDENTS.values() if row.published_millions is not None]
# Of the state dicts of EfficientSAM3's students: number of tensors, and hash of the sorted names where it is known.
EFFICIENTSAM3 = {
    "repvit_m0_9": (707, None),
    "repvit_m1_1": (653, None),
    "repvit_m2_3": (1463, None),
    "tiny_vit_5m_224": (300, "3663ddfdc3266c6e"),
    "tiny_vit_11m_224": (300, "3663ddfdc3266c6e"),
    "tiny_vit_21m_224": (300, "3663ddfdc3266c6e"),
    "efficientvit_b0": (194, "40b0ed64cf6c5d51"),
    "efficientvit_b1": (269, None),
    "efficientvit_b2": (362, None),
    "mobileclip_s0": (111, "f1e144f40307d1d0"),
    "mobileclip_s1": (151, None),
    "mobileclip2_l": (151, None),
}


def check_names(student, names):
    count, known = EFFICIENTSAM3[student]
    assert len(names) == count
    assert known in (None, xxhash.xxh3_64_hexdigest("\n".join(sorted(names)).encode()))


@torch.no_grad()
def trunk(timm_name, head="stride32", width=16, seed=0):
    """An image student of random weights, whose BatchNorms and statistics change what they see."""
    torch.manual_seed(seed)
    student = StudentTrunk(StudentTrunkConfig(timm_name=timm_name, head=head, hidden_size=width, image_size=112))
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    student.set_feature_statistics(torch.randn(width), torch.rand(width) * 3 + 0.5)
    return student.eval()


# ---- images


@pytest.mark.parametrize("timm_name", NINE)
def test_image_students_there_and_back(timm_name):
    student = trunk(timm_name)
    tensors = student.state_dict()
    theirs = image_to_upstream(tensors, timm_name)
    check_names(timm_name, theirs)
    assert all(name.startswith(("backbone.model.", "head.")) for name in theirs)
    names = image_key_map(timm_name)
    assert all(len(names.forward.matches(name)) == 1 for name in theirs)
    assert all(len(names.backward.matches(name)) == 1 for name in tensors if not name.startswith("feature_"))
    found, ours = image_from_upstream(theirs)
    assert found == timm_name
    assert ours["feature_mean"].eq(0).all() and ours["feature_scale"].eq(1).all()
    folded = {"feature_mean", "feature_scale", "head.3.weight", "head.3.bias"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items() if name not in folded)
    again = trunk(timm_name, seed=1)
    again.load_state_dict(ours)
    pixels = torch.rand(1, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        expected, found = student(pixels).last_hidden_state, again(pixels).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("timm_name", "theirs", "ours"),
    [
        ("efficientvit_b1", "input_stem.op_list.0.norm.bias", "stem_in_conv.norm.bias"),
        (
            "efficientvit_b1",
            "input_stem.op_list.1.main.depth_conv.conv.weight",
            "stem_res0.main.depth_conv.conv.weight",
        ),
        (
            "efficientvit_b2",
            "stages.3.op_list.2.context_module.main.aggreg.0.0.weight",
            "stages_3.blocks.2.context_module.main.aggreg.0.0.weight",
        ),
        ("tiny_vit_11m_224", "patch_embed.seq.2.c.weight", "patch_embed.conv2.conv.weight"),
        ("tiny_vit_11m_224", "layers.0.blocks.1.conv3.c.weight", "stages_0.blocks.1.conv3.conv.weight"),
        ("tiny_vit_11m_224", "layers.2.downsample.conv1.bn.bias", "stages_3.downsample.conv1.bn.bias"),
        ("tiny_vit_11m_224", "layers.2.blocks.5.attn.attention_biases", "stages_2.blocks.5.attn.attention_biases"),
        ("tiny_vit_11m_224", "layers.1.blocks.0.local_conv.c.weight", "stages_1.blocks.0.local_conv.conv.weight"),
        ("repvit_m1_1", "features.1.token_mixer.1.fc1.weight", "stages_0.blocks.0.se.fc1.weight"),
    ],
)
def test_names_of_image_students(timm_name, theirs, ours):
    assert image_key_map(timm_name).forward.targets(f"backbone.model.{theirs}") == [f"trunk.{ours}"]


def conv_norm(inside, outside, size=1, stride=1, groups=1):
    conv = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
    return Named(c=conv, bn=nn.BatchNorm2d(outside))


class Named(nn.Module):
    """Its modules one after the other."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        inner = max(8, int(width / 4 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Mixer(nn.Module):
    """RepViT's token mixer: a depthwise 3x3, a depthwise 1x1 and the input itself, then BatchNorm."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv_norm(width, width, 3, groups=width)
        self.conv1, self.bn = nn.Conv2d(width, width, 1, groups=width), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn(self.conv(x) + self.conv1(x) + x)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.m = nn.Sequential(conv_norm(width, 2 * width), nn.GELU(), conv_norm(2 * width, width))

    def forward(self, x):
        return x + self.m(x)


def repvit(depths, widths):
    """RepViT as one list of layers (Wang et al., arXiv:2307.09283): blocks, of which every other one squeezes; before
    the second stage and those after it a block that does not, and one that halves the map."""

    def block(width, squeeze):
        mixers = [Mixer(width), Squeeze(width) if squeeze else nn.Identity()]
        return Named(token_mixer=nn.Sequential(*mixers), channel_mixer=Residual(width))

    first = widths[0]
    layers = [nn.Sequential(conv_norm(3, first // 2, 3, 2), nn.GELU(), conv_norm(first // 2, first, 3, 2))]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            before = widths[stage - 1]
            down = [conv_norm(before, before, 3, 2, groups=before), nn.Identity(), conv_norm(before, width)]
            layers += [block(before, False), Named(token_mixer=nn.Sequential(*down), channel_mixer=Residual(width))]
        layers += [block(width, number % 2 == 0) for number in range(depth)]
    return Named(features=nn.Sequential(*layers))


@torch.no_grad()
@pytest.mark.parametrize(
    ("timm_name", "widths"), [("repvit_m0_9", (48, 96, 192, 384)), ("repvit_m2_3", (80, 160, 320, 640))]
)
def test_repvit_is_one_list_of_layers(timm_name, widths):
    student = trunk(timm_name)
    theirs = image_to_upstream(student.state_dict(), timm_name)
    reference = repvit(REPVIT_DEPTHS[timm_name], widths).eval()
    prefix = "backbone.model."
    own = {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
    reference.load_state_dict(own)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = student.trunk(pixels)[3]
    torch.testing.assert_close(reference(pixels), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_statistics_are_folded_into_the_heads_last_layer():
    student = trunk("efficientvit_b0")
    theirs = image_to_upstream(student.state_dict(), "efficientvit_b0")
    maps = torch.rand(1, 128, 4, 4)
    features = student.head[2](student.head[1](student.head[0](maps)))
    expected = student.head[3](features) * student.feature_scale[:, None, None] + student.feature_mean[:, None, None]
    found = nn.functional.conv2d(features, theirs["head.3.weight"], theirs["head.3.bias"], padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(theirs["head.0.weight"], student.head[0].weight)


def test_image_students_that_efficientsam3_does_not_have():
    with pytest.raises(KeyMapError, match="only knows the published head.*train with head=stride32"):
        image_to_upstream(trunk("repvit_m0_9", head="fused").state_dict(), "repvit_m0_9")
    with pytest.raises(KeyMapError, match="no student with the trunk test_convnext; it has repvit_m0_9"):
        image_to_upstream(trunk("test_convnext").state_dict(), "test_convnext")
    tensors = trunk("efficientvit_b0").state_dict()
    with pytest.raises(KeyMapError, match="not among our repvit_m1_1 names .first: trunk.stem_in_conv"):
        image_to_upstream(tensors, "repvit_m1_1")
    del tensors["feature_scale"]
    with pytest.raises(KeyMapError, match="lacks feature_scale"):
        image_to_upstream(tensors, "efficientvit_b0")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.clear(), "no image student of EfficientSAM3 has these 0 tensors"),
        (lambda t: t.pop("head.0.weight"), "no image student of EfficientSAM3 has these 193 tensors"),
        (lambda t: t.update({"backbone.model.features.0.0.c.weight": torch.ones(1)}), "no image student of"),
        (
            lambda t: t.update({"head.0.weight": torch.ones(16, 100, 1, 1)}),
            "takes 100 channels; those of EfficientSAM3's EfficientViTs take 128, 256, 384",
        ),
        (
            lambda t: t.update({"backbone.model.input_stem.op_list.7.x": torch.ones(1)}),
            "1 of 195 tensors are not among EfficientSAM3's efficientvit_b0 names .*op_list.7",
        ),
        (lambda t: t.update({"head.2.weight": torch.ones(1)}), "not among .* names .first: head.2.weight"),
    ],
)
def test_image_files_that_hold_something_else(change, complaint):
    theirs = image_to_upstream(trunk("efficientvit_b0").state_dict(), "efficientvit_b0")
    change(theirs)
    with pytest.raises(KeyMapError, match=complaint):
        image_from_upstream(theirs)


# ---- texts


@pytest.mark.parametrize("positions", [16, 32, 77])
@pytest.mark.parametrize("name", TEXT_STUDENTS)
def test_text_students_there_and_back(name, positions):
    with torch.device("meta"):
        ours = to_lite_text_tensors(text_student(name, positions, 256))
    theirs = text_to_upstream(ours)
    check_names(name, theirs)
    width = TEXT_STUDENTS[name].hidden_size
    assert theirs["encoder.positional_embedding.pos_embed.pos_embed"].shape == (1, 1, positions, width)
    assert theirs["encoder.transformer.1.pre_norm_mha.1.qkv_proj.weight"].shape == (3 * width, width)
    found, length, again = text_from_upstream(theirs)
    assert (found, length) == (name, positions)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in ours.items()}


@torch.no_grad()
@pytest.mark.parametrize("positions", [16, 77])
@pytest.mark.parametrize("name", ["tiny_text", "tiny_text_plain"])
def test_text_students_compute_what_efficientsam3s_compute(name, positions):
    """Its student is Apple's tower with a projector on every token, and no mask."""
    torch.manual_seed(0)
    tower, projector = AppleTower(positions=positions, repmixer=name == "tiny_text"), nn.Linear(32, 24)
    randomise(tower)
    theirs = {f"encoder.{key}": tensor.clone() for key, tensor in tower.state_dict().items()}
    theirs |= {f"projector.{key}": tensor.clone() for key, tensor in projector.state_dict().items()}
    found, length, ours = text_from_upstream(theirs)
    assert (found, length) == (name, positions)
    student = StudentText(lite_text_config(name, positions), 24).eval()
    statistics = {"feature_mean": torch.zeros(24), "feature_scale": torch.ones(24)}
    student.load_state_dict(ours | statistics)
    ids_BL = torch.randint(0, 49408, (2, positions))
    _, hidden_BLD = tower.eval()(ids_BL)
    features_BLC = student(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
    torch.testing.assert_close(features_BLC, projector(hidden_BLD), rtol=1e-4, atol=1e-4)
    back = text_to_upstream(ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.update({"encoder.extra": torch.ones(1)}), "1 of .* EfficientSAM3's names .first: encoder.extra"),
        (
            lambda t: t.pop("encoder.positional_embedding.pos_embed.pos_embed"),
            r"has no encoder.positional_embedding.pos_embed.pos_embed of shape \(1, 1, positions, channels\)",
        ),
        (
            lambda t: t.update({"encoder.transformer.5.layer_scale": torch.ones(32, 1, 1)}),
            "no text student has 4 layers of 32 channels with RepMixer blocks; known are MobileCLIP-S0 .6 of 512.",
        ),
        (
            lambda t: t.update({"encoder.transformer.1.pre_norm_mha.1.qkv_proj.weight": torch.ones(95, 32)}),
            r"qkv_proj.weight has the shape \(95, 32\)",
        ),
    ],
)
def test_text_files_that_hold_something_else(change, complaint):
    theirs = text_to_upstream(to_lite_text_tensors(text_student("tiny_text", 32, 24)))
    change(theirs)
    with pytest.raises(KeyMapError, match=complaint):
        text_from_upstream(theirs)


def test_a_text_student_still_with_its_statistics_is_refused():
    student = text_student("tiny_text_plain", 32, 24)
    with pytest.raises(KeyMapError, match="2 of .* not among Sam3LiteText's names .first: feature_mean"):
        text_to_upstream(student.state_dict())
