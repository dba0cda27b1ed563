# SPDX-License-Identifier: Apache-2.0
"""SAM 3's names and transformers', both ways: all names of the published file, and values on the tiny chassis."""

import cmath
import itertools
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_sam3 import same, small_sam3, trunk_config
from torch import nn
from transformers import Sam3VideoConfig, Sam3VideoModel

from effsam3.models.image.student import StudentTrunkConfig
from effsam3.models.keymaps.sam3 import (
    CLASS_ROW,
    POINTS,
    SAM3,
    SAM3_STUDENT_TEXT,
    TRUNK,
    absent_from_transformers,
    rotary_table,
    to_original,
    to_transformers,
)
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.merging.slots import SLOTS
from effsam3.models.text.student import lite_text_config

BLOCK = TRUNK + "blocks.0."
TEXT = "detector.backbone.language_backbone."


def published():
    """{name: meta tensor} of the published sam3.pt."""
    tensors = {}
    for line in (Path(__file__).parent / "sam3_names.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        template, shape = line.split()
        pieces = re.split(r"\[(.*?)\]", template)
        for choice in itertools.product(*(numbers(listed) for listed in pieces[1::2])):
            name = pieces[0] + "".join(f"{n}{text}" for n, text in zip(choice, pieces[2::2], strict=True))
            kind = torch.complex64 if name.endswith("freqs_cis") else torch.float32
            tensors[name] = torch.empty(*map(int, shape.split("x")), dtype=kind, device="meta")
    return tensors


def numbers(listed):
    """[0, 1, 2, 5] for "0-2,5"."""
    ranges = [list(map(int, part.split("-"))) for part in listed.split(",")]
    return [number for first, *last in ranges for number in range(first, (last or [first])[0] + 1)]


def shapes(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def on_meta(config):
    with torch.device("meta"):
        return Sam3VideoModel(config).state_dict()


@pytest.fixture(scope="module")
def tiny():
    return small_sam3()


@pytest.fixture
def original(tiny):
    config, tensors, extra = tiny
    return to_original(tensors, extra, trunk_config(config))


# ---- all names


def test_the_published_file_is_a_sam3_video_model():
    names, config = published(), Sam3VideoConfig()
    model = on_meta(config)
    assert (len(names), len(model)) == (1465, 1797)
    tensors, extra = to_transformers(names)
    assert shapes(tensors) == shapes(model)
    assert set(extra) == {CLASS_ROW, *POINTS}
    for given in (extra, {}):
        assert shapes(to_original(model, given, trunk_config(config))) == shapes(names)


def test_every_name_has_one_rule_or_a_reason_to_have_none():
    without = {name for name in published() if not SAM3.forward.matches(name)}
    assert without == {name for name in published() if name.endswith("freqs_cis")} | set(POINTS)
    assert all(len(SAM3.forward.matches(name)) == 1 for name in published() if name not in without)
    assert all(len(SAM3.backward.matches(name)) == 1 for name in on_meta(Sam3VideoConfig()))


# Tensors of one shape, so that only their names tell them apart.
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.vision_backbone.convs.1.dconv_2x2", "vision_encoder.neck.fpn_layers.1.scale_layers.0"),
        ("backbone.language_backbone.resizer", "text_projection"),
        ("geometry_encoder.img_pre_norm", "geometry_encoder.vision_layer_norm"),
        ("geometry_encoder.norm", "geometry_encoder.prompt_layer_norm"),
        ("geometry_encoder.encode_norm", "geometry_encoder.output_layer_norm"),
        (
            "geometry_encoder.encode.2.cross_attn_image.out_proj",
            "geometry_encoder.layers.2.cross_attn.o_proj",
        ),
        ("transformer.encoder.layers.5.linear2", "detr_encoder.layers.5.mlp.fc2"),
        ("transformer.decoder.layers.1.norm1", "detr_decoder.layers.1.vision_cross_attn_layer_norm"),
        ("transformer.decoder.layers.1.norm2", "detr_decoder.layers.1.self_attn_layer_norm"),
        ("transformer.decoder.layers.1.norm3", "detr_decoder.layers.1.mlp_layer_norm"),
        ("transformer.decoder.layers.1.catext_norm", "detr_decoder.layers.1.text_cross_attn_layer_norm"),
        ("transformer.decoder.layers.1.ca_text.out_proj", "detr_decoder.layers.1.text_cross_attn.o_proj"),
        (
            "transformer.decoder.layers.1.cross_attn.out_proj",
            "detr_decoder.layers.1.vision_cross_attn.o_proj",
        ),
        ("transformer.decoder.norm", "detr_decoder.output_layer_norm"),
        ("transformer.decoder.bbox_embed.layers.1", "detr_decoder.box_head.layer2"),
        ("transformer.decoder.boxRPB_embed_y.layers.0", "detr_decoder.box_rpb_embed_y.layer1"),
        ("dot_prod_scoring.hs_proj", "dot_product_scoring.query_proj"),
        ("dot_prod_scoring.prompt_proj", "dot_product_scoring.text_proj"),
        ("segmentation_head.instance_seg_head", "mask_decoder.instance_projection"),
    ],
)
def test_names_of_the_detector(theirs, ours):
    assert SAM3.forward.targets(f"detector.{theirs}.bias") == [f"detector_model.{ours}.bias"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("obj_ptr_proj.layers.0", "object_pointer_proj.proj_in"),
        ("obj_ptr_proj.layers.1", "object_pointer_proj.layers.0"),
        ("obj_ptr_proj.layers.2", "object_pointer_proj.proj_out"),
        ("transformer.encoder.layers.3.norm2", "memory_attention.layers.3.layer_norm2"),
        (
            "maskmem_backbone.mask_downsampler.encoder.7",
            "memory_encoder.mask_downsampler.layers.2.layer_norm",
        ),
        ("maskmem_backbone.mask_downsampler.encoder.9", "memory_encoder.mask_downsampler.layers.3.conv"),
        ("maskmem_backbone.fuser.layers.1.pwconv1", "memory_encoder.memory_fuser.layers.1.pointwise_conv1"),
        ("sam_prompt_encoder.mask_downscaling.4", "prompt_encoder.mask_embed.layer_norm2"),
        ("sam_mask_decoder.transformer.layers.1.mlp.lin2", "mask_decoder.transformer.layers.1.mlp.proj_out"),
        (
            "sam_mask_decoder.output_hypernetworks_mlps.3.layers.1",
            "mask_decoder.output_hypernetworks_mlps.3.layers.0",
        ),
    ],
)
def test_names_of_the_tracker(theirs, ours):
    assert SAM3.forward.targets(f"tracker.{theirs}.bias") == [f"tracker_model.{ours}.bias"]


def test_names_of_the_trackers_embeddings():
    names = {"no_mem_embed": "no_memory_embedding", "no_mem_pos_enc": "no_memory_positional_encoding"}
    for theirs, ours in names.items():
        assert SAM3.forward.targets(f"tracker.{theirs}") == [f"tracker_model.{ours}"]


# ---- values


def test_the_round_trip_is_bit_for_bit(tiny, original):
    _, tensors, extra = tiny
    found, found_extra = to_transformers(original)
    assert same(found, tensors) and same(found_extra, extra)
    again = to_original(found, found_extra, trunk_config(tiny[0]))
    assert same(again, original)


def test_parts_stand_in_their_order(tiny, original):
    _, tensors, extra = tiny
    q, k, v = original[BLOCK + "attn.qkv.weight"].split(64)
    model = "detector_model.vision_encoder.backbone."
    for part, letter in ((q, "q"), (k, "k"), (v, "v")):
        assert torch.equal(part, tensors[f"{model}layers.0.attention.{letter}_proj.weight"])
    table = original[TRUNK + "pos_embed"]
    assert torch.equal(table[:, 0], extra[CLASS_ROW][:, 0])
    assert torch.equal(table[:, 1:], tensors[model + "embeddings.position_embeddings"])
    points = tensors["tracker_model.prompt_encoder.point_embed.weight"]
    for index in range(4):
        assert torch.equal(original[f"tracker.sam_prompt_encoder.point_embeddings.{index}.weight"][0], points[index])
    projection = tensors["detector_model.text_encoder.text_projection.weight"]
    assert torch.equal(original[TEXT + "encoder.text_projection"].T, projection)
    matrix = original["tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    for owner in ("prompt_encoder.shared_embedding", "shared_image_embedding"):
        assert torch.equal(matrix, tensors[f"tracker_model.{owner}.positional_embedding"])


def test_every_packed_matrix_has_queries_keys_and_values_in_this_order():
    packed = [name for name in published() if "in_proj_" in name or ".qkv." in name]
    assert len(packed) == 186
    for name in packed:
        kinds = [target.split(".")[-2] for target in SAM3.forward.targets(name)]
        assert kinds == ["q_proj", "k_proj", "v_proj"], name


@torch.no_grad()
def test_packed_attention_is_torchs(tiny, original):
    """SAM 3's `in_proj_weight` is `nn.MultiheadAttention`'s; transformers' attention with its parts is the same."""
    config, tensors, _ = tiny
    with torch.device("meta"):
        model = Sam3VideoModel(config)
    model.load_state_dict(tensors, assign=True)
    attention = model.detector_model.detr_decoder.layers[1].text_cross_attn
    theirs = nn.MultiheadAttention(128, 4, batch_first=True)
    prefix = "detector.transformer.decoder.layers.1.ca_text."
    own = {name.removeprefix(prefix): tensor for name, tensor in original.items() if name.startswith(prefix)}
    theirs.load_state_dict(own)
    query, key, value = torch.randn(3, 2, 5, 128)
    torch.testing.assert_close(attention(query, key, value)[0], theirs(query, key, value)[0], rtol=1e-5, atol=1e-5)


def test_rotary_tables_are_their_formula(tiny, original):
    config = trunk_config(tiny[0])
    for block, side in ((0, 8), (1, 16)):  # in windows of 8x8; over the grid of 16x16, squeezed into 8x8
        table = original[f"{TRUNK}blocks.{block}.attn.freqs_cis"]
        assert table.shape == (side * side, 8) and table.dtype == torch.complex64
        for position, channel in itertools.product(range(0, side * side, 7), range(8)):
            place = (position % side, position // side)[channel // 4] * 8 / side
            turn = cmath.exp(1j * place * 10000 ** (-4 * (channel % 4) / 16))
            assert abs(table[position, channel].item() - turn) < 1e-6, (position, channel)
    assert torch.equal(rotary_table(config, 3), rotary_table(config, 1))


@torch.no_grad()
def test_rotary_tables_are_transformers(tiny):
    config = trunk_config(tiny[0])
    with torch.random.fork_rng():
        layers = Sam3VideoModel(tiny[0]).detector_model.vision_encoder.backbone.layers
    for block, layer in enumerate(layers):
        cos, sin = layer.rotary_emb(torch.zeros(1), layer.position_ids)
        table = rotary_table(config, block).repeat_interleave(2, dim=1)
        torch.testing.assert_close(torch.complex(cos, sin)[0], table, rtol=0, atol=1e-6)


def test_nothing_is_copied(tmp_path, original):
    own = {name: tensor.contiguous().clone() for name, tensor in original.items()}
    save_file({name: tensor for name, tensor in own.items() if "freqs_cis" not in name}, tmp_path / "sam3.safetensors")
    with safe_open(tmp_path / "sam3.safetensors", "pt") as file:
        mapped = {name: file.get_tensor(name) for name in file.keys()}
    tensors, extra = to_transformers(mapped)
    storages = {tensor.untyped_storage().data_ptr() for tensor in mapped.values()}
    copied = [
        name for name, tensor in (tensors | extra).items() if tensor.untyped_storage().data_ptr() not in storages
    ]
    assert copied == ["tracker_model.prompt_encoder.point_embed.weight"]  # four tensors become one


def test_what_transformers_cannot_hold_is_zero_and_named(tiny):
    config, tensors, extra = tiny
    original = to_original(tensors, {}, trunk_config(config))
    assert absent_from_transformers({}) == [CLASS_ROW, *POINTS] and absent_from_transformers(extra) == []
    assert all(original[name].shape == extra[name].shape and not original[name].any() for name in POINTS)
    assert not original[TRUNK + "pos_embed"][:, 0].any()
    some = {CLASS_ROW: extra[CLASS_ROW]}
    assert absent_from_transformers(some) == list(POINTS)
    table = to_original(tensors, some, trunk_config(config))[TRUNK + "pos_embed"]
    assert torch.equal(table[:, :1], extra[CLASS_ROW])


def test_parts_of_a_model_stay_parts(tiny):
    config, tensors, extra = tiny
    tracker = {name: tensor for name, tensor in tensors.items() if name.startswith("tracker_model.")}
    assert all(name.startswith("tracker.") for name in to_original(tracker, extra, trunk_config(config)))
    assert same(to_transformers(to_original(tracker, extra, None))[0], tracker)


def test_half_precision_stays(tiny):
    config, tensors, extra = tiny
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    original = to_original(halves, {}, trunk_config(config))
    kinds = {tensor.dtype for name, tensor in original.items() if "freqs_cis" not in name}
    assert kinds == {torch.float16}
    assert same(to_transformers(original)[0], halves)


# ---- students


@pytest.mark.parametrize("slots", [("image",), ("text",), ("image", "text")])
def test_students_keep_their_names(tiny, slots):
    config = tiny[0]
    students = {
        "image": StudentTrunkConfig(timm_name="test_convnext", hidden_size=64, image_size=224),
        "text": lite_text_config("tiny_text", 32),
    }
    for slot in slots:
        config = SLOTS[slot].install(config, students[slot])
    model = on_meta(config)
    original = to_original(model, {}, None if "image" in slots else trunk_config(config))
    tensors, extra = to_transformers(original)
    assert shapes(tensors) == shapes(model)
    table = SAM3_STUDENT_TEXT if "text" in slots else SAM3
    assert all(len(table.backward.matches(name)) == 1 for name in model)
    unmatched = {name for name in original if len(table.forward.matches(name)) != 1}
    assert unmatched == set(POINTS) | {name for name in original if "freqs_cis" in name}
    assert ("image" in slots) == (TRUNK + "model.feature_mean" in original) == (CLASS_ROW not in extra)
    assert ("image" in slots) == (TRUNK + "model.head.project.weight" in original)
    assert ("image" in slots) == (TRUNK + "pos_embed" not in original)
    text = {TEXT + name for name in ("text_projection.bias", "text_encoder.layers.2.layer_scale")}
    own = {TEXT + name for name in ("resizer.bias", "encoder.ln_final.bias")}
    assert (text if "text" in slots else own) <= original.keys()
    assert not (own if "text" in slots else text) & original.keys()


def test_the_efficient_memory_has_its_names(tiny):
    config = EfficientTrackerConfig.from_dict(tiny[0].tracker_config.to_dict())
    with torch.device("meta"):
        names = EfficientTracker(config, remove_vision_encoder=True).state_dict()
    tracker = {f"tracker_model.{name}": tensor for name, tensor in names.items()}
    original = to_original(tracker, {}, None)
    resampler = [name for name in names if name.startswith("memory_resampler.")]
    assert resampler and {f"tracker.{name}" for name in resampler} <= original.keys()
    assert shapes(to_transformers(original)[0]) == shapes(tracker)
