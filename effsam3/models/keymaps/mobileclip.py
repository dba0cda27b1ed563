# SPDX-License-Identifier: Apache-2.0
"""MobileCLIP's text towers, in Apple's names and in open_clip's, and transformers' `Sam3LiteTextTextModel`.

The rows have no prefix; who reads a file puts the file's prefix before them.
"""

from __future__ import annotations

from effsam3.models.keymaps import Choices, section

MLP = {"c_fc": "fc1", "c_proj": "fc2"}
HOLES: dict[str, Choices] = {
    "fc": MLP,
    "apple_norm": {"pre_norm_mha.0": "layer_norm1", "pre_norm_ffn.0": "layer_norm2"},
    "apple_fc": {"1": "fc1", "4": "fc2"},
    "apple_skip": {"norm.rbr_skip": "reference_batchnorm", "mixer.rbr_skip": "mixer.batchnorm_skip"},
}
POSITIONS = "embeddings.position_embedding.position_embedding"  # (1, 1, L, D)

# A layer of a transformer as open_clip names it; SAM 3's own text encoder is one of open_clip's.
OPEN_CLIP_LAYER = [
    ("attn.in_proj_{wb}", "self_attn.{q|k|v}_proj.{wb}"),
    ("attn.out_proj.{wb}", "self_attn.out_proj.{wb}"),
    ("ln_{1|2}.{wb}", "layer_norm{1|2}.{wb}"),
    ("mlp.{fc}.{wb}", "mlp.{fc}.{wb}"),
]
OPEN_CLIP = [
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", POSITIONS),  # (L, D)
    ("text_projection", "projection.weight", "transposed"),
    ("ln_final.{wb}", "final_layer_norm.{wb}"),
    *section("transformer.resblocks.{n}.", "layers.{n}.", OPEN_CLIP_LAYER),
]
APPLE = [
    ("embedding_layer.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding.pos_embed.pos_embed", POSITIONS),
    ("projection_layer", "projection.weight", "transposed"),
    ("final_layer_norm.{wb}", "final_layer_norm.{wb}"),
    *section(
        "transformer.{n}.",
        "layers.{n}.",
        [
            ("{apple_norm}.{wb}", "{apple_norm}.{wb}"),
            ("pre_norm_mha.1.qkv_proj.{wb}", "self_attn.{q|k|v}_proj.{wb}"),
            ("pre_norm_mha.1.out_proj.{wb}", "self_attn.out_proj.{wb}"),
            ("pre_norm_ffn.{apple_fc}.{wb}", "mlp.{apple_fc}.{wb}"),
            # The first and the last layer of MobileCLIP-S0: RepMixer blocks.
            ("{layer_scale|token_mixer.layer_scale}", "{layer_scale|token_mixer.layer_scale}"),
            ("token_mixer.{apple_skip}.{norm}", "token_mixer.{apple_skip}.{norm}"),
            ("token_mixer.mixer.rbr_conv.0.conv.weight", "token_mixer.mixer.conv.weight"),
            ("token_mixer.mixer.rbr_conv.0.bn.{norm}", "token_mixer.mixer.batchnorm_conv.{norm}"),
            ("convffn.conv.conv.weight", "conv_feed_forward.depthwise_conv.weight"),
            ("convffn.conv.bn.{norm}", "conv_feed_forward.depthwise_batchnorm.{norm}"),
            ("convffn.fc{1|2}.{wb}", "conv_feed_forward.mlp.fc{1|2}.{wb}"),
        ],
    ),
]
