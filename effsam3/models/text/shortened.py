# SPDX-License-Identifier: Apache-2.0
"""A text tower on short texts: it computes only as much padding as the features of tokens depend on.

Attention masks padding, but a RepMixer's convolutions read it, a few positions to each side, and what stands there has
come through all layers before. From the last layer back, every RepMixer needs that many positions more.

Letters: B texts, L tokens, D channels of the tower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextRepMixerBlock

from effsam3.models.text.tokens import PAD_ID


class RepMixerBlock(Sam3LiteTextRepMixerBlock):
    """`Sam3LiteTextRepMixerBlock`, which can be asked for the first positions only."""

    @property
    def reach(self) -> int:
        """How many positions to each side an output depends on: half a kernel, twice."""
        return 2 * (self.conv_feed_forward.depthwise_conv.kernel_size[1] // 2)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, positions: int | None = None, **kwargs
    ) -> Tensor:
        """Take (B, L, D) and return the first `positions` of what the block makes of it; None: all."""
        mixed_BD1L = self.token_mixer(hidden_states.transpose(1, 2).unsqueeze(2))
        convolved = self.conv_feed_forward
        update_BD1L = convolved.depthwise_batchnorm(convolved.depthwise_conv(mixed_BD1L))[..., :positions]
        found_BD1L = self.layer_scale_residual(mixed_BD1L[..., :positions], convolved.mlp(update_BD1L))
        return found_BD1L.squeeze(2).transpose(1, 2)


def shorten(tower: Any) -> Any:
    """Give a `Sam3LiteTextTextModel` RepMixer blocks that can be asked for a part; weights and their names stay."""
    for place, layer in enumerate(tower.layers):
        if isinstance(layer, Sam3LiteTextRepMixerBlock):
            with torch.device("meta"):
                block = RepMixerBlock(tower.config)
            block.load_state_dict(layer.state_dict(), assign=True)
            tower.layers[place] = block.train(layer.training)
    return tower


def first_positions(tower: Any, ids_BL: Tensor, mask_BL: Tensor, most: int) -> Tensor:
    """Return the states of tokens (B, L, D) as `tower` computes them of the same texts padded to `most` positions.

    Its BatchNorms must not learn statistics, which would be those of other positions.
    """
    needed = [ids_BL.shape[1]]
    for layer in reversed(tower.layers):
        needed.insert(0, min(needed[0] + getattr(layer, "reach", 0), most))
    missing = needed[0] - ids_BL.shape[1]
    ids_BL, mask_BL = F.pad(ids_BL, (0, missing), value=PAD_ID), F.pad(mask_BL, (0, missing))
    hidden_BLD = tower.embeddings(ids_BL)
    for layer, positions in zip(tower.layers, needed[1:], strict=True):
        if hasattr(layer, "reach"):
            hidden_BLD = layer(hidden_BLD, positions=positions)
        else:
            attended = create_bidirectional_mask(tower.config, hidden_BLD, mask_BL[:, :positions])
            hidden_BLD = layer(hidden_BLD, attention_mask=attended)
    return tower.final_layer_norm(hidden_BLD)
