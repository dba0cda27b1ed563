# SPDX-License-Identifier: Apache-2.0
"""Efficient memory: what is kept of a tracked frame, how a new frame attends to it, and to how many tokens.

SAM 3 keeps every cell of a frame's memory map as a token. Here a map may be pooled (EfficientTAM, arXiv 2411.18933)
and a frame may be resampled to a few latents. The attention keeps the names and shapes of transformers'
`Sam3TrackerVideoMemoryAttention`, so SAM 3's weights load into it whatever the memory is made of.

Letters: O objects, G side of the tracker's grid, C channels of the tracker, M channels of the memory, N tokens,
L latents, H heads, D channels of a head, X column and row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoMemoryAttention,
    Sam3TrackerVideoMemoryAttentionLayer,
    Sam3TrackerVideoPositionEmbeddingSine,
    Sam3TrackerVideoRoPEAttention,
    rotate_pairwise,
)

from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.token_counts import count_tokens

QUERY_ENCODING_SCALE = 0.1  # SAM 3 adds a tenth of the sine encoding to the features that ask


@dataclass(frozen=True)
class FrameMemory:
    """What is kept of one frame for O objects: tokens of the map (O, N, M), latents (O, L, M), or both."""

    map_ONM: Tensor | None = None
    latents_OLM: Tensor | None = None


@dataclass(frozen=True)
class MemoryTokens:
    """What a frame attends to: N tokens for each of O objects, tokens of maps first.

    Positions are columns and rows in cells of the grid; a token at (0, 0) is not rotated. `bias_N` is added to the
    attention's logits; None means zeros.
    """

    values_ONM: Tensor
    encoding_NM: Tensor
    position_NX: Tensor
    bias_N: Tensor | None


def rotate(tokens_OHND: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary position encoding, in float32 whatever the tokens' type."""
    cos_1ND, sin_1ND = rope
    # As in transformers: bf16 would round the rotation, and with it the position.
    full = tokens_OHND.float()
    return (full * cos_1ND + rotate_pairwise(full) * sin_1ND).to(tokens_OHND.dtype)


class MemoryCrossAttention(Sam3TrackerVideoRoPEAttention):
    """Cross-attention to `MemoryTokens`: every token has its own rotary position and its own bias."""

    def forward(  # type: ignore[override]  # the caller is ours as well
        self,
        query_ONC: Tensor,
        query_rope: tuple[Tensor, Tensor],
        memory: MemoryTokens,
        memory_rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        def heads(projected_ONC: Tensor) -> Tensor:
            return projected_ONC.unflatten(2, (self.num_attention_heads, self.head_dim)).transpose(1, 2)

        # As in SAM 3, only keys carry the encoding: it decides what is read, but not what is passed on.
        keys_ONM = memory.values_ONM + memory.encoding_NM.to(memory.values_ONM.dtype)
        query = rotate(heads(self.q_proj(query_ONC)), query_rope)
        key = rotate(heads(self.k_proj(keys_ONM)), memory_rope)
        value = heads(self.v_proj(memory.values_ONM))
        # Without a bias, PyTorch can choose its flash kernel, which takes no mask. (An export would fix len(query).)
        bias = None if memory.bias_N is None else memory.bias_N.to(query.dtype).expand(query.shape[0], 1, 1, -1)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=self.dropout_p if self.training else 0.0, scale=self.scaling
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class EfficientMemoryAttentionLayer(Sam3TrackerVideoMemoryAttentionLayer):
    """A pre-norm layer: self-attention of the frame, cross-attention to its memory, MLP."""

    def __init__(self, config: EfficientTrackerConfig):
        super().__init__(config)
        self.cross_attn_image = MemoryCrossAttention(config, kv_in_dim=config.memory_encoder_output_channels)

    def forward(  # type: ignore[override]  # the caller is ours as well
        self,
        query_ONC: Tensor,
        query_rope: tuple[Tensor, Tensor],
        memory: MemoryTokens,
        memory_rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        # Frames first attend to themselves: a cell must know its neighbours before it asks memory about an object.
        normed = self.layer_norm1(query_ONC)[:, None]  # transformers' attention wants a second batch dimension
        read, _ = self.self_attn(query=normed, key=normed, value=normed, position_embeddings=query_rope)
        query_ONC = query_ONC + self.dropout1(read[:, 0])
        read = self.cross_attn_image(self.layer_norm2(query_ONC), query_rope, memory, memory_rope)
        query_ONC = query_ONC + self.dropout2(read)
        hidden = self.dropout(self.activation(self.linear1(self.layer_norm3(query_ONC))))
        return query_ONC + self.dropout3(self.linear2(hidden))


class EfficientMemoryAttention(Sam3TrackerVideoMemoryAttention):
    """SAM 3's memory attention over any number of tokens; parameters are named and shaped as in transformers."""

    def __init__(self, config: EfficientTrackerConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            EfficientMemoryAttentionLayer(config) for _ in range(config.memory_attention_num_layers)
        )
        self.query_encoding = Sam3TrackerVideoPositionEmbeddingSine(
            num_position_features=config.memory_attention_hidden_size // 2, normalize=True
        )

    def forward(  # type: ignore[override]  # the caller is ours as well
        self, top_OCGG: Tensor, memory: MemoryTokens
    ) -> Tensor:
        """Condition features (O, C, G, G) on memory; returns (O, C, G, G)."""
        # Of one image: all objects see the same grid, so the encoding broadcasts.
        encoding_1CGG = self.query_encoding((1, *top_OCGG.shape[1:]), top_OCGG.device, torch.float32)
        # Added here and not in the attention, as SAM 3's weights expect.
        query_OCGG = top_OCGG + (QUERY_ENCODING_SCALE * encoding_1CGG).to(top_OCGG.dtype)
        query_ONC = query_OCGG.flatten(2).transpose(1, 2)
        query_rope = self.rotary_emb(query_ONC, self.position_ids)
        # Pooled tokens lie between cells, so they are rotated by their own position, not by a cell's number.
        memory_rope = self.rotary_emb(query_ONC, memory.position_NX)
        for layer in self.layers:
            query_ONC = layer(query_ONC, query_rope, memory, memory_rope)
        return self.layer_norm(query_ONC).transpose(1, 2).unflatten(2, top_OCGG.shape[2:])


def memory_tokens(config: EfficientTrackerConfig, frames: int | None = None, pointers: int | None = None) -> int:
    """Tokens that a frame attends to, for one object: see `count_tokens`; None: as many as the tracker remembers."""
    return count_tokens(
        config.memory_mode,
        grid=config.grid,
        pool=config.memory_pool,
        latents=config.memory_global_latents + config.memory_window_latents,
        hot_frames=config.memory_hot_frames,
        pointer_tokens=config.memory_attention_hidden_size // config.memory_encoder_output_channels,
        frames=config.num_maskmem if frames is None else frames,
        pointers=config.max_object_pointers_in_encoder if pointers is None else pointers,
    )
