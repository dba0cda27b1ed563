# SPDX-License-Identifier: Apache-2.0
"""Tables of names: how a table is read, and what is said of tensors that do not belong to SAM 3."""

import pytest
import torch
from small_sam3 import same, small_original, small_sam3, trunk_config

from effsam3.models.keymaps import KeyMap, KeyMapError
from effsam3.models.keymaps.sam3 import TRUNK, to_original, to_transformers

BLOCK = TRUNK + "blocks.0."
TEXT = "detector.backbone.language_backbone."


@pytest.fixture(scope="module")
def tiny():
    return small_sam3()


@pytest.fixture
def original():
    return small_original()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.update({BLOCK + "attn.qkw.weight": torch.ones(2)}),
            r"1 of \d+ tensors are not among SAM 3's own names \(first: .*blocks.0.attn.qkw.weight; the nearest "
            r"that is known is .*trunk.blocks.\{n\}.attn.qkv.\{wb\}\)",
        ),
        (lambda t: t.update({"tracker.frobnicate": torch.ones(2)}), r"first: tracker.frobnicate\)$"),
        (
            lambda t: t.update({BLOCK + "attn.qkv.weight": torch.ones(191, 64)}),
            r"blocks.0.attn.qkv.weight has the shape \(191, 64\); it holds 3 parts.*a multiple of 3",
        ),
        (
            lambda t: t.update({TRUNK + "pos_embed": torch.ones(1, 64, 64)}),
            r"pos_embed has the shape \(1, 64, 64\); expected \(1, 1 \+ rows x columns, channels\)",
        ),
        (
            lambda t: t.update({TEXT + "encoder.text_projection": torch.ones(3)}),
            r"text_projection has the shape \(3,\); expected a matrix",
        ),
        (
            lambda t: t.pop("tracker.sam_prompt_encoder.point_embeddings.2.weight"),
            "point_embed.weight is made of 4 tensors .* of which there are 3",
        ),
        (
            lambda t: t.update({"tracker.sam_prompt_encoder.point_embeddings.2.weight": torch.ones(2, 128)}),
            r"tensors of one shape, these differ: .*2.weight \(2, 128\)",
        ),
        (lambda t: t.update({TEXT + "text_encoder.embeddings.x": torch.ones(3)}), r"31 of \d+ .*backbone.encoder"),
    ],
)
def test_a_file_that_is_not_sam3s(original, change, complaint):
    change(original)
    with pytest.raises(KeyMapError, match=complaint):
        to_transformers(original)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.pop("detector_model.vision_encoder.backbone.layers.1.attention.k_proj.bias"),
            "blocks.1.attn.qkv.bias is made of 3 tensors .* of which there are 2: .*q_proj.bias, .*v_proj.bias",
        ),
        (
            lambda t: t.update({"tracker_model.shared_image_embedding.positional_embedding": torch.ones(2, 64)}),
            "prompt_encoder.shared_embedding.positional_embedding and .*shared_image_embedding.* differ",
        ),
        (lambda t: t.update({"detector_model.frobnicate": torch.ones(1)}), "not among transformers' Sam3VideoModel"),
    ],
)
def test_a_model_that_is_not_sam3s(tiny, change, complaint):
    config, tensors, extra = tiny
    tensors = dict(tensors)
    change(tensors)
    with pytest.raises(KeyMapError, match=complaint):
        to_original(tensors, extra, trunk_config(config))


def test_formats_are_not_mixed_up(tiny, original):
    config, tensors, extra = tiny
    with pytest.raises(KeyMapError, match=f"{len(tensors)} of {len(tensors)} tensors are not among SAM 3's own names"):
        to_transformers(tensors)
    with pytest.raises(KeyMapError, match=f"{len(original)} of {len(original)} .* Sam3VideoModel's names"):
        to_original(original, extra, trunk_config(config))
    with pytest.raises(KeyMapError, match="the trunk is SAM 3's own: its config is needed"):
        to_original(tensors, extra, None)


def test_a_table_says_what_it_does():
    rows = [("a.{n}.{wb}", "b.{n}.{wb}"), ("{x}.qk", "{x}.{q|k}")]
    rows += [("swap", "swapped", "transposed"), ("s", "{t|u}", "same")]
    table = KeyMap(rows, {"x": {"one": "eins", "two": "zwei"}}, first="their", second="our")
    given = {
        "a.12.bias": torch.ones(1),
        "two.qk": torch.arange(6.0),
        "swap": torch.ones(2, 3),
        "s": torch.zeros(1),
    }
    found = table.forward(given)
    assert list(found) == ["b.12.bias", "zwei.q", "zwei.k", "swapped", "t", "u"]
    assert found["zwei.k"].tolist() == [3, 4, 5] and found["swapped"].shape == (3, 2)
    assert same(table.backward(found), given)
    for name in ("a.x.bias", "a.1.gamma", "xa.1.bias", "a.1.bias.x", "three.qk"):
        with pytest.raises(KeyMapError, match=f"1 of 1 tensors are not among their names \\(first: {name}"):
            table.forward({name: torch.ones(2)})
