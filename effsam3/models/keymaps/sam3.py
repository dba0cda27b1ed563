# SPDX-License-Identifier: Apache-2.0
"""SAM 3's own names (`sam3.pt`) and those of transformers' `Sam3VideoModel`, both ways.

Students keep the names that they have in transformers' format, below the module of SAM 3 whose place they take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import Sam3ViTConfig

from effsam3.models.keymaps import Choices, KeyMap, KeyMapError, Row, section
from effsam3.models.keymaps.mobileclip import MLP, OPEN_CLIP_LAYER

HOLES: dict[str, Choices] = {
    "student_trunk": r"(?:trunk|head)\..+|feature_(?:mean|scale)",
    "student_text": r"(?:embeddings|layers|final_layer_norm|projection)\..+",
    # MLPs: the detector's number their layers from 1, the tracker's name the first and the last.
    "layer": {"layers.0": "layer1", "layers.1": "layer2", "layers.2": "layer3"},
    "end": {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"},
    "embed": {"token_embedding.weight": "token_embedding.weight", "positional_embedding": "position_embedding.weight"},
    "fc": MLP,
    "geometry_norm": {
        "img_pre_norm": "vision_layer_norm",
        "norm": "prompt_layer_norm",
        "encode_norm": "output_layer_norm",
    },
    "encoder_attn": {"self_attn": "self_attn", "cross_attn_image": "cross_attn"},
    "decoder_attn": {"self_attn": "self_attn", "ca_text": "text_cross_attn", "cross_attn": "vision_cross_attn"},
    "decoder_norm": {
        "norm1": "vision_cross_attn_layer_norm",
        "catext_norm": "text_cross_attn_layer_norm",
        "norm2": "self_attn_layer_norm",
        "norm3": "mlp_layer_norm",
    },
    "decoder_out_norm": {"norm": "output_layer_norm", "presence_token_out_norm": "presence_layer_norm"},
    "decoder_mlp": {
        "bbox_embed": "box_head",
        "presence_token_head": "presence_head",
        "ref_point_head": "ref_point_head",
        "boxRPB_embed_x": "box_rpb_embed_x",
        "boxRPB_embed_y": "box_rpb_embed_y",
    },
    "score": {
        "prompt_mlp.layers.0": "text_mlp.layer1",
        "prompt_mlp.layers.1": "text_mlp.layer2",
        "prompt_mlp.out_norm": "text_mlp_out_norm",
        "prompt_proj": "text_proj",
        "hs_proj": "query_proj",
    },
    "seg_head": {"instance_seg_head": "instance_projection", "semantic_seg_head": "semantic_projection"},
    "downsampler": {
        **{f"{3 * stage}": f"layers.{stage}.conv" for stage in range(4)},
        **{f"{3 * stage + 1}": f"layers.{stage}.layer_norm" for stage in range(4)},
        "12": "final_conv",
    },
    "fuser": {
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
    },
    "downscaling": {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"},
    "upscaling": {"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"},
    "lin": {"lin1": "proj_in", "lin2": "proj_out"},
    "two_way_attn": r"layers\.\d+\.(?:self_attn|cross_attn_token_to_image|cross_attn_image_to_token)"
    r"|final_attn_token_to_image",
    "two_way_mlps": r"iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+",
}

TRUNK, MODEL_TRUNK = "detector.backbone.vision_backbone.trunk.", "detector_model.vision_encoder.backbone."
LANGUAGE, MODEL_TEXT = "detector.backbone.language_backbone.", "detector_model.text_encoder."

_TRUNK = [
    ("pos_embed", "embeddings.position_embeddings"),  # here without the class token's row, see CLASS_ROW
    ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
    ("ln_pre.{wb}", "layer_norm.{wb}"),
    ("blocks.{n}.norm{1|2}.{wb}", "layers.{n}.layer_norm{1|2}.{wb}"),
    ("blocks.{n}.attn.qkv.{wb}", "layers.{n}.attention.{q|k|v}_proj.{wb}"),
    ("blocks.{n}.attn.proj.{wb}", "layers.{n}.attention.o_proj.{wb}"),
    ("blocks.{n}.mlp.fc{1|2}.{wb}", "layers.{n}.mlp.fc{1|2}.{wb}"),
    ("model.{student_trunk}", "{student_trunk}"),
]
_NECK = [
    ("0.dconv_2x2_0.{wb}", "0.scale_layers.0.{wb}"),
    ("0.dconv_2x2_1.{wb}", "0.scale_layers.2.{wb}"),
    ("1.dconv_2x2.{wb}", "1.scale_layers.0.{wb}"),
    ("{n}.conv_1x1.{wb}", "{n}.proj1.{wb}"),
    ("{n}.conv_3x3.{wb}", "{n}.proj2.{wb}"),
]
_TEXT = [
    ("{embed}", "text_model.embeddings.{embed}"),
    ("text_projection", "text_projection.weight", "transposed"),
    ("ln_final.{wb}", "text_model.final_layer_norm.{wb}"),
    *section("transformer.resblocks.{n}.", "text_model.encoder.layers.{n}.", OPEN_CLIP_LAYER),
]
_GEOMETRY = [
    ("{label_embed|cls_embed}.weight", "{label_embed|cls_embed}.weight"),
    *[(f"{name}.{{wb}}",) * 2 for name in ("boxes_{direct|pool|pos_enc}_project", "final_proj")],
    ("{geometry_norm}.{wb}", "{geometry_norm}.{wb}"),
]
_ENCODER_LAYERS = [
    ("{n}.{encoder_attn}.in_proj_{wb}", "{n}.{encoder_attn}.{q|k|v}_proj.{wb}"),
    ("{n}.{encoder_attn}.out_proj.{wb}", "{n}.{encoder_attn}.o_proj.{wb}"),
    ("{n}.linear{1|2}.{wb}", "{n}.mlp.fc{1|2}.{wb}"),
    ("{n}.norm{1|2|3}.{wb}", "{n}.layer_norm{1|2|3}.{wb}"),
]
_DECODER = [
    ("layers.{n}.{decoder_attn}.in_proj_{wb}", "layers.{n}.{decoder_attn}.{q|k|v}_proj.{wb}"),
    ("layers.{n}.{decoder_attn}.out_proj.{wb}", "layers.{n}.{decoder_attn}.o_proj.{wb}"),
    ("layers.{n}.linear{1|2}.{wb}", "layers.{n}.mlp.fc{1|2}.{wb}"),
    ("layers.{n}.{decoder_norm}.{wb}", "layers.{n}.{decoder_norm}.{wb}"),
    ("{query_embed|reference_points|presence_token}.weight", "{query_embed|reference_points|presence_token}.weight"),
    ("{decoder_out_norm}.{wb}", "{decoder_out_norm}.{wb}"),
    ("{decoder_mlp}.{layer}.{wb}", "{decoder_mlp}.{layer}.{wb}"),
]
_SEGMENTATION = [
    ("pixel_decoder.{conv_layers|norms}.{n}.{wb}", "pixel_decoder.{conv_layers|norms}.{n}.{wb}"),
    ("mask_predictor.mask_embed.layers.{n}.{wb}", "mask_embedder.layers.{n}.{wb}"),
    ("{seg_head}.{wb}", "{seg_head}.{wb}"),
    ("cross_attend_prompt.in_proj_{wb}", "prompt_cross_attn.{q|k|v}_proj.{wb}"),
    ("cross_attend_prompt.out_proj.{wb}", "prompt_cross_attn.o_proj.{wb}"),
    ("cross_attn_norm.{wb}", "prompt_cross_attn_norm.{wb}"),
]
_MEMORY = [
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("mask_downsample.{wb}", "mask_downsample.{wb}"),
    ("obj_ptr_tpos_proj.{wb}", "temporal_positional_encoding_projection_layer.{wb}"),
    ("obj_ptr_proj.{end}.{wb}", "object_pointer_proj.{end}.{wb}"),
    ("memory_resampler.{rest}", "memory_resampler.{rest}"),
    *section(
        "transformer.encoder.",
        "memory_attention.",
        [
            (
                "layers.{n}.{self_attn|cross_attn_image}.{q|k|v}_proj.{wb}",
                "layers.{n}.{self_attn|cross_attn_image}.{q|k|v}_proj.{wb}",
            ),
            (
                "layers.{n}.{self_attn|cross_attn_image}.out_proj.{wb}",
                "layers.{n}.{self_attn|cross_attn_image}.o_proj.{wb}",
            ),
            ("layers.{n}.linear{1|2}.{wb}", "layers.{n}.linear{1|2}.{wb}"),
            ("layers.{n}.norm{1|2|3}.{wb}", "layers.{n}.layer_norm{1|2|3}.{wb}"),
            ("norm.{wb}", "layer_norm.{wb}"),
        ],
    ),
    *section(
        "maskmem_backbone.",
        "memory_encoder.",
        [
            ("mask_downsampler.encoder.{downsampler}.{wb}", "mask_downsampler.{downsampler}.{wb}"),
            ("pix_feat_proj.{wb}", "feature_projection.{wb}"),
            ("out_proj.{wb}", "projection.{wb}"),
            ("fuser.layers.{n}.gamma", "memory_fuser.layers.{n}.scale"),
            ("fuser.layers.{n}.{fuser}.{wb}", "memory_fuser.layers.{n}.{fuser}.{wb}"),
        ],
    ),
]
_PROMPT_ENCODER = [
    (
        "pe_layer.positional_encoding_gaussian_matrix",
        "{prompt_encoder.shared_embedding|shared_image_embedding}.positional_embedding",
        "same",
    ),
    ("point_embeddings.{0|1|2|3}.weight", "prompt_encoder.point_embed.weight"),
    ("{not_a_point_embed|no_mask_embed}.weight", "prompt_encoder.{not_a_point_embed|no_mask_embed}.weight"),
    ("mask_downscaling.{downscaling}.{wb}", "prompt_encoder.mask_embed.{downscaling}.{wb}"),
]
_MASK_DECODER = [
    ("{iou_token|mask_tokens|obj_score_token}.weight", "{iou_token|mask_tokens|obj_score_token}.weight"),
    ("{two_way_mlps}.{end}.{wb}", "{two_way_mlps}.{end}.{wb}"),
    ("conv_s{0|1}.{wb}", "conv_s{0|1}.{wb}"),
    ("output_upscaling.{upscaling}.{wb}", "{upscaling}.{wb}"),
    ("transformer.{two_way_attn}.{q|k|v}_proj.{wb}", "transformer.{two_way_attn}.{q|k|v}_proj.{wb}"),
    ("transformer.{two_way_attn}.out_proj.{wb}", "transformer.{two_way_attn}.o_proj.{wb}"),
    ("transformer.layers.{n}.norm{1|2|3|4}.{wb}", "transformer.layers.{n}.layer_norm{1|2|3|4}.{wb}"),
    ("transformer.layers.{n}.mlp.{lin}.{wb}", "transformer.layers.{n}.mlp.{lin}.{wb}"),
    ("transformer.norm_final_attn.{wb}", "transformer.layer_norm_final_attn.{wb}"),
]
_SHARED: list[Row] = [
    *section(TRUNK, MODEL_TRUNK, _TRUNK),
    *section("detector.backbone.vision_backbone.convs.", "detector_model.vision_encoder.neck.fpn_layers.", _NECK),
    *section("detector.backbone.vision_backbone.sam2_convs.", "tracker_neck.fpn_layers.", _NECK),
    *section("detector.geometry_encoder.", "detector_model.geometry_encoder.", _GEOMETRY),
    *section("detector.geometry_encoder.encode.", "detector_model.geometry_encoder.layers.", _ENCODER_LAYERS),
    *section("detector.transformer.encoder.layers.", "detector_model.detr_encoder.layers.", _ENCODER_LAYERS),
    *section("detector.transformer.decoder.", "detector_model.detr_decoder.", _DECODER),
    *section("detector.dot_prod_scoring.", "detector_model.dot_product_scoring.", [("{score}.{wb}", "{score}.{wb}")]),
    *section("detector.segmentation_head.", "detector_model.mask_decoder.", _SEGMENTATION),
    *section("tracker.", "tracker_model.", _MEMORY),
    *section("tracker.sam_prompt_encoder.", "tracker_model.", _PROMPT_ENCODER),
    *section("tracker.sam_mask_decoder.", "tracker_model.mask_decoder.", _MASK_DECODER),
]
# transformers calls both encoders' projection `text_projection`, so which of them a model has decides what it becomes.
_SAM3_TEXT: list[Row] = [
    *section(LANGUAGE + "encoder.", MODEL_TEXT, _TEXT),
    (LANGUAGE + "resizer.{wb}", "detector_model.text_projection.{wb}"),
]
_STUDENT_TEXT: list[Row] = [
    (LANGUAGE + "text_encoder.{student_text}", MODEL_TEXT + "{student_text}"),
    (LANGUAGE + "text_projection.{wb}", "detector_model.text_projection.{wb}"),
]
_WHOSE = {"first": "SAM 3's own", "second": "transformers' Sam3VideoModel's"}
SAM3 = KeyMap(_SHARED + _SAM3_TEXT, HOLES, **_WHOSE)
SAM3_STUDENT_TEXT = KeyMap(_SHARED + _STUDENT_TEXT, HOLES, **_WHOSE)

# What transformers has no place for.
CLASS_ROW = TRUNK + "pos_embed.class_row"  # position of a class token that SAM 3 does not have: the first of the table
POINTS = tuple(  # point prompts of the detector's geometry encoder, which SAM 3 does not use
    f"detector.geometry_encoder.points_{what}_project.{kind}"
    for what in ("direct", "pool", "pos_enc")
    for kind in ("weight", "bias")
)
FREQUENCIES = "attn.freqs_cis"  # end of the names of the trunk's rotary tables, which its config gives again


def to_transformers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename a `sam3.pt`, with or without students in it, to a `Sam3VideoModel`'s names; all tensors are views.

    Returns:
        The model's tensors, and those that transformers has no place for (`CLASS_ROW` and `POINTS`).

    Raises:
        KeyMapError: a name that SAM 3 does not have, or a shape that cannot be its.
    """
    extra = {name: tensors[name] for name in POINTS if name in tensors}
    # Rotary tables follow from the config, so they are left out here and made again on the way back.
    rest = {name: tensor for name, tensor in tensors.items() if name not in extra and not _is_rotary_table(name)}
    table = TRUNK + "pos_embed"
    if table in rest:
        extra[CLASS_ROW], rest[table] = _class_row(rest[table])
    return _key_map(rest, LANGUAGE + "text_encoder.").forward(rest), extra


def to_original(
    tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor], vit_config: Sam3ViTConfig | None
) -> dict[str, Tensor]:
    """Rename a `Sam3VideoModel`'s tensors, or whole parts of them, to SAM 3's own names: the inverse, bit for bit.

    Args:
        extra: the second result of `to_transformers`; zeros replace what is not in it.
        vit_config: of SAM 3's own trunk, whose rotary tables are made from it; None if a student replaces it.

    Raises:
        KeyMapError: a name that `Sam3VideoModel` does not have, a part of a tensor that is missing, or no
            `vit_config` with SAM 3's own trunk.
    """
    original = _key_map(tensors, MODEL_TEXT + "embeddings.").backward(tensors)
    table = TRUNK + "pos_embed"
    if table in original:
        if vit_config is None:
            raise KeyMapError("the trunk is SAM 3's own: its config is needed, from which its rotary tables are made")
        positions = original[table]
        # Nobody reads the class token's position: zeros do where it was not kept.
        class_row = extra[CLASS_ROW] if CLASS_ROW in extra else torch.zeros_like(positions[:, :1])
        original[table] = torch.cat([class_row, positions], dim=1)
        for block in range(vit_config.num_hidden_layers):
            original[f"{TRUNK}blocks.{block}.{FREQUENCIES}"] = rotary_table(vit_config, block)
    label = "detector.geometry_encoder.cls_embed.weight"
    if label in original:
        zeros = _zero_points(original[label])
        original |= {name: extra[name] if name in extra else zeros[name] for name in POINTS}
    return original


def absent_from_transformers(extra: Mapping[str, Tensor]) -> list[str]:
    """Return the names of what `to_original` must fill with zeros when it is only given this."""
    return [name for name in (CLASS_ROW, *POINTS) if name not in extra]


def rotary_table(config: Sam3ViTConfig, block: int) -> Tensor:
    """Return `freqs_cis` (positions, channels of a head / 2) complex64 of one of the trunk's blocks.

    e^(i x f) for every column x, then e^(i y f) for every row y, with f = theta^(-4k / channels of a head); the
    positions of blocks that attend globally are squeezed into a window's (Su et al., arXiv:2104.09864, in two
    dimensions).
    """
    is_global = block in (config.global_attn_indexes or [])
    image_size: Any = config.image_size  # transformers' declarations allow lists, its SAM 3 does not
    patch_size: Any = config.patch_size
    side = image_size // patch_size if is_global else config.window_size
    channels = config.hidden_size // config.num_attention_heads
    rope: Any = config.rope_parameters
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, channels, 4).float() / channels)
    angles = torch.outer(torch.arange(side).float() * (config.window_size / side), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turns.repeat(side, 1), turns.repeat_interleave(side, 0)], dim=1)


def _key_map(names: Iterable[str], student: str) -> KeyMap:
    """Return the table for a model; a name that starts with `student` means that it has a text student."""
    return SAM3_STUDENT_TEXT if any(name.startswith(student) for name in names) else SAM3


def _is_rotary_table(name: str) -> bool:
    return name.startswith(TRUNK + "blocks.") and name.endswith(FREQUENCIES)


def _class_row(table: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the table of positions into the class token's row and those of a square."""
    places = table.shape[1] - 1 if table.ndim == 3 else 0
    if places < 1 or isqrt(places) ** 2 != places:
        raise KeyMapError(
            f"{TRUNK}pos_embed has the shape {tuple(table.shape)}; expected (1, 1 + rows x columns, channels)"
        )
    return table[:, :1], table[:, 1:]


def _zero_points(label: Tensor) -> dict[str, Tensor]:
    """Zeros in the shapes of `POINTS`, in the type of the geometry encoder's own tensors (1, channels)."""
    channels = label.shape[1]
    weights = {name: 2 if "_direct_" in name else channels for name in POINTS if name.endswith("weight")}  # x and y
    return {name: label.new_zeros((channels, weights[name]) if name in weights else channels) for name in POINTS}
