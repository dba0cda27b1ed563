# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM3's names for its students, and ours, both ways.

Names are those of a student's own checkpoint: `backbone.model.*` and `head.*` of an image student, `encoder.*` and
`projector.*` of a text student. Ours are those of `StudentTrunk`, and of `StudentText` without its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import Tensor

from effsam3.models.keymaps import NORM, Choices, KeyMap, KeyMapError, Row, section
from effsam3.models.keymaps.mobileclip import APPLE, POSITIONS
from effsam3.models.keymaps.mobileclip import HOLES as TEXT_HOLES
from effsam3.models.registry import IMAGE_STUDENTS, TEXT_STUDENTS, TINY_TEXT_STUDENTS

TRUNK, OUR_TRUNK = "backbone.model.", "trunk."
FIRST_LAYER = {"EfficientViT": "input_stem.", "TinyViT": "patch_embed.", "RepViT": "features."}  # tells the family
REPVIT_DEPTHS = {"repvit_m0_9": (2, 2, 14, 2), "repvit_m1_1": (2, 2, 12, 2), "repvit_m2_3": (6, 6, 34, 2)}  # blocks

HOLES: dict[str, Choices] = {
    "stage": r"\d+",
    # EfficientViT
    "stem": {"0": "stem_in_conv", "1": "stem_res0"},
    # TinyViT
    "patch": {"0": "conv1", "2": "conv2"},
    "next": {"0": "1", "1": "2", "2": "3"},  # timm counts the downsampling to the stage that it leads to
    "conv": "conv[123]|local_conv",
    "conv_norm": {
        "c.weight": "conv.weight",
        **{f"bn.{name}": f"bn.{name}" for name in NORM},
    },
    "attn_mlp": r"(?:attn|mlp)\..+",
    # RepViT
    "conv12": {"0": "conv1", "2": "conv2"},
    "down_mixer": {"0": "spatial_downsample", "2": "channel_downsample"},
}
_HEAD = [
    ("head.0.weight", "head.0.weight"),
    ("head.1.{norm}", "head.1.{norm}"),
    ("head.3.{wb}", "head.3.{wb}"),
]
_TRUNKS: dict[str, list[Row]] = {
    "EfficientViT": [
        ("input_stem.op_list.{stem}.{rest}", "{stem}.{rest}"),
        ("stages.{stage}.op_list.{n}.{rest}", "stages_{stage}.blocks.{n}.{rest}"),
    ],
    "TinyViT": [
        ("patch_embed.seq.{patch}.{conv_norm}", "patch_embed.{patch}.{conv_norm}"),
        ("layers.{stage}.blocks.{n}.{conv}.{conv_norm}", "stages_{stage}.blocks.{n}.{conv}.{conv_norm}"),
        ("layers.{stage}.blocks.{n}.{attn_mlp}", "stages_{stage}.blocks.{n}.{attn_mlp}"),
        ("layers.{next}.downsample.{conv}.{conv_norm}", "stages_{next}.downsample.{conv}.{conv_norm}"),
    ],
    "RepViT": [
        ("features.0.{conv12}.{rest}", "stem.{conv12}.{rest}"),
        ("features.{block}.token_mixer.0.{rest}", "{block}.token_mixer.{rest}"),
        ("features.{block}.token_mixer.1.{rest}", "{block}.se.{rest}"),
        ("features.{block}.channel_mixer.m.{conv12}.{rest}", "{block}.channel_mixer.{conv12}.{rest}"),
        ("features.{down}.token_mixer.{down_mixer}.{rest}", "{down}.{down_mixer}.{rest}"),
        ("features.{down}.channel_mixer.m.{conv12}.{rest}", "{down}.ffn.{conv12}.{rest}"),
    ],
}
_TEXT = KeyMap(
    [*section("encoder.", "text_encoder.", APPLE), ("projector.{wb}", "text_projection.{wb}")],
    TEXT_HOLES,
    first="EfficientSAM3's",
    second="Sam3LiteText's",
)


def _repvit_features(depths: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """RepViT's layers as EfficientSAM3 counts them, in one list, and as timm does, by stage: blocks and downsamplers.

    Before every stage but the first there are two: a block, which timm counts to the downsampler, and the downsampler.
    """
    # timm names blocks by stage, upstream counts all layers in one row: this walks both at once.
    blocks: list[str] = []
    downs: dict[str, str] = {}
    for stage, depth in enumerate(depths):
        if stage:
            blocks.append(f"stages_{stage}.downsample.pre_block")
            downs[str(len(blocks) + len(downs) + 1)] = f"stages_{stage}.downsample"
        blocks += [f"stages_{stage}.blocks.{block}" for block in range(depth)]
    numbers = (str(number) for number in range(1, len(blocks) + len(downs) + 1))
    free = [number for number in numbers if number not in downs]
    return {"block": dict(zip(free, blocks, strict=True)), "down": downs}


@cache
def image_key_map(timm_name: str) -> KeyMap:
    """Return the table for an image student, by its trunk's name in timm.

    Raises:
        KeyMapError: EfficientSAM3 does not have this student.
    """
    families = {row.timm_name: row.family for row in IMAGE_STUDENTS.values() if row.family in _TRUNKS}
    if timm_name not in families:
        raise KeyMapError(f"EfficientSAM3 has no student with the trunk {timm_name}; it has {', '.join(families)}")
    holes = HOLES | (_repvit_features(REPVIT_DEPTHS[timm_name]) if timm_name in REPVIT_DEPTHS else {})
    rows = section(TRUNK, OUR_TRUNK, _TRUNKS[families[timm_name]]) + _HEAD
    return KeyMap(rows, holes, first=f"EfficientSAM3's {timm_name}", second=f"our {timm_name}")


def image_to_upstream(tensors: Mapping[str, Tensor], timm_name: str) -> dict[str, Tensor]:
    """Return a `StudentTrunk`'s tensors under EfficientSAM3's names.

    EfficientSAM3's student has no statistics; the last layer of the head outputs features in the teacher's units:
    weight x scale, bias x scale + mean. (What comes after it, a bilinear resize, commutes with that.)

    Raises:
        KeyMapError: EfficientSAM3 has no such student, or a tensor is not the student's.
    """
    names = image_key_map(timm_name)
    if "head.project.weight" in tensors:
        raise KeyMapError(
            "EfficientSAM3's model builder only knows the published head, this student has our fused one; train with "
            "head=stride32 for a student that it can load"
        )
    statistics = {"feature_mean", "feature_scale"}
    if missing := sorted((statistics | {"head.3.weight", "head.3.bias"}) - tensors.keys()):
        raise KeyMapError(f"the image student lacks {', '.join(missing)}")
    scale_D, mean_D = tensors["feature_scale"], tensors["feature_mean"]
    folded = {name: tensor for name, tensor in tensors.items() if name not in statistics}
    # A convolution is linear: its output scaled is its weights scaled.
    folded["head.3.weight"] = folded["head.3.weight"] * scale_D[:, None, None, None]
    folded["head.3.bias"] = folded["head.3.bias"] * scale_D + mean_D
    return names.backward(folded)


def image_from_upstream(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Find which of the nine image students this is; returns its trunk's name in timm and a `StudentTrunk`'s tensors.

    Whether they are all there and of the right shapes shows when a `StudentTrunk` loads them.

    Raises:
        KeyMapError: it is none of them, or has a tensor that they do not have.
    """
    families = [
        family for family, first in FIRST_LAYER.items() if any(name.startswith(TRUNK + first) for name in tensors)
    ]
    head = tensors.get("head.0.weight")
    if len(families) != 1 or head is None or head.ndim != 4:
        markers = ", ".join(f"{TRUNK}{first}*" for first in FIRST_LAYER.values())
        raise KeyMapError(
            f"no image student of EfficientSAM3 has these {len(tensors)} tensors (first: "
            f"{', '.join(list(tensors)[:3])}); expected one of {markers}, and head.0.weight"
        )
    # Students of a family have the same names; the width of their last map tells them apart.
    rows = {row.channels[3]: row for row in IMAGE_STUDENTS.values() if row.family == families[0]}
    channels = head.shape[1]
    if channels not in rows:
        raise KeyMapError(
            f"head.0.weight takes {channels} channels; those of EfficientSAM3's {families[0]}s take "
            f"{', '.join(map(str, rows))}"
        )
    timm_name = rows[channels].timm_name
    ours = image_key_map(timm_name).forward(tensors)
    width = head.shape[0]
    return timm_name, ours | {"feature_mean": head.new_zeros(width), "feature_scale": head.new_ones(width)}


def text_to_upstream(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a text student's tensors (`text_encoder.*`, `text_projection.*`) under EfficientSAM3's names.

    Raises:
        KeyMapError: a tensor is not of transformers' Sam3LiteText.
    """
    return _TEXT.backward(tensors)


def text_from_upstream(tensors: Mapping[str, Tensor]) -> tuple[str, int, dict[str, Tensor]]:
    """Find which text student this is.

    Returns:
        Its name in the registry, the rows of its table of positions, and its tensors (`text_encoder.*`,
        `text_projection.*`).

    Raises:
        KeyMapError: it is none of them, or has a tensor that they do not have.
    """
    ours = _TEXT.forward(tensors)
    positions = "text_encoder." + POSITIONS
    if positions not in ours or ours[positions].ndim != 4:
        raise KeyMapError(
            "the text student has no encoder.positional_embedding.pos_embed.pos_embed of shape (1, 1, positions, "
            "channels)"
        )
    _, _, length, width = ours[positions].shape
    layers = len({name.split(".")[2] for name in ours if name.startswith("text_encoder.layers.")})
    # By depth, width and kind of layer: no tensor tells the tower's name.
    repmixer = any(".token_mixer." in name for name in ours)
    rows = TEXT_STUDENTS | TINY_TEXT_STUDENTS
    for name, row in rows.items():
        if (row.hidden_size, row.num_hidden_layers, row.use_repmixer_blocks) == (width, layers, repmixer):
            return name, length, ours
    raise KeyMapError(
        f"no text student has {layers} layers of {width} channels {'with' if repmixer else 'without'} RepMixer "
        "blocks; known are "
        + ", ".join(f"{row.tower} ({row.num_hidden_layers} of {row.hidden_size})" for row in rows.values())
    )
