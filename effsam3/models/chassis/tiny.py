# SPDX-License-Identifier: Apache-2.0
"""Configurations of the made-up chassis: `tiny` (a few layers, trains on a CPU) and `random` (SAM 3's full size).

Both have random weights and exist only when a recipe asks for them by name. They keep SAM 3's geometry: square images,
patch 14, a windowed ViT with global layers, a four-level neck, detector and tracker.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 224  # pixels; 16 patches of 14 a side, where SAM 3 has 72
TRUNK_WIDTH = 64  # SAM 3: 1024
WIDTH = 128  # neck, detector and tracker, SAM 3: 256; transformers' video memory needs a multiple of 64 above 64
TEXT_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a small SAM 3; the defaults are the tiny chassis'."""

    image_size: int = IMAGE_SIZE
    patch_size: int = 14
    window_size: int = 8  # patches
    positions: int = IMAGE_SIZE // 2  # pixels that the position table covers; larger images repeat it
    trunk_width: int = TRUNK_WIDTH
    width: int = WIDTH
    mlp_ratio: int = 2  # of the MLPs of detector and tracker
    decoder_layers: int = 2
    queries: int = 10

    @property
    def grid(self) -> int:
        """Rows (and columns) of the trunk's output."""
        return self.image_size // self.patch_size


TINY = Shape()


def vision_config(shape: Shape = TINY) -> dict:
    """Return a small chassis' vision encoder as it is in config.json."""
    return dict(
        model_type="sam3_vision_model",
        backbone_config=dict(
            model_type="sam3_vit_model",
            hidden_size=shape.trunk_width,
            intermediate_size=2 * shape.trunk_width,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            window_size=shape.window_size,
            global_attn_indexes=[1, 3],
            pretrain_image_size=shape.positions,
            # Wide enough that attention and MLPs bend the features: with 0.02 the trunk is nearly linear in its
            # patches.
            initializer_range=0.1,
        ),
        fpn_hidden_size=shape.width,
        backbone_feature_sizes=[[4 * shape.grid] * 2, [2 * shape.grid] * 2, [shape.grid] * 2],
        scale_factors=[4.0, 2.0, 1.0, 0.5],
    )


def tiny_config(shape: Shape = TINY):
    """`Sam3VideoConfig` of the tiny chassis: 224 px, 16x16 grid, about 6.6 M parameters (4.7 M are the vocabulary
    and the tracker); of others like it with other sizes."""
    from transformers import Sam3VideoConfig

    # One description for detector and tracker: they share the trunk.
    vision, width = vision_config(shape), shape.width
    attention = dict(num_attention_heads=4, dropout=0.0)
    layers = dict(hidden_size=width, intermediate_size=shape.mlp_ratio * width, **attention)
    detector = dict(
        model_type="sam3",
        vision_config=vision,
        text_config=dict(
            model_type="clip_text_model",
            vocab_size=49408,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            hidden_act="gelu",
        ),
        geometry_encoder_config=dict(num_layers=1, roi_size=3, **layers),
        detr_encoder_config=dict(num_layers=2, **layers),
        detr_decoder_config=dict(num_layers=shape.decoder_layers, num_queries=shape.queries, **layers),
        mask_decoder_config=dict(hidden_size=width, num_upsampling_stages=3, num_attention_heads=4),
    )
    tracker = dict(
        model_type="sam3_tracker_video",
        image_size=shape.image_size,  # must be given: the config class otherwise resets every size to 1008 px
        vision_config=vision,
        prompt_encoder_config=dict(hidden_size=width, image_size=shape.image_size, patch_size=shape.patch_size),
        mask_decoder_config=dict(
            hidden_size=width,
            mlp_dim=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            iou_head_hidden_dim=width,
        ),
        memory_attention_hidden_size=width,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=2 * width,
        memory_attention_rope_feat_sizes=[shape.grid] * 2,
        memory_attention_dropout=0.0,
        memory_attention_rope_dropout=0.0,
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=64,  # transformers' memory attention hard-codes 64
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=2 * width,
    )
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=4 * shape.grid)


def full_config():
    """`Sam3VideoConfig` with SAM 3's own sizes: 860 M parameters, 1008 px, 72x72 grid, 1024 channels."""
    from transformers import Sam3VideoConfig

    return Sam3VideoConfig()
