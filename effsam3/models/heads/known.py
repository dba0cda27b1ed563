# SPDX-License-Identifier: Apache-2.0
"""A SAM 3 reduced to its heads, for phrases that are known beforehand.

Trunk and text encoder, nine tenths of its weights, are left out: others' features are answered to, and what the text
encoder makes of the phrases is kept.

Letters: P phrases, T tokens, C channels of the text encoder, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from effsam3.models.text.tokens import PromptTokenizer


class KnownTexts(nn.Module):
    """What a text encoder made of some phrases, in its place."""

    ids_PT: Tensor
    states_PTC: Tensor

    def __init__(self, ids_PT: Tensor, states_PTC: Tensor):
        super().__init__()
        self.register_buffer("ids_PT", ids_PT)
        self.register_buffer("states_PTC", states_PTC)

    def forward(self, input_ids: Tensor, **options) -> BaseModelOutputWithPooling:
        """Look up phrases by their tokens (R, T).

        Raises:
            LookupError: one is not known.
        """
        same_RP = (input_ids[:, None] == self.ids_PT).all(2)
        if not same_RP.any(1).all():
            raise LookupError("a phrase is asked for that is none of those known beforehand")
        return BaseModelOutputWithPooling(last_hidden_state=self.states_PTC[same_RP.int().argmax(1)])


@torch.no_grad()
def only_heads(model: Any, phrases: Sequence[str], tokenizer: PromptTokenizer) -> Any:
    """Take trunk and text encoder out of a whole SAM 3, in place, once the encoder has read the phrases; return it.

    A model on the device meta stays there.

    Raises:
        TextTooLong: a phrase has more tokens than SAM 3 reads.
    """
    model.eval().requires_grad_(False)
    detector = model.detector_model
    tokens = tokenizer(list(phrases), return_tensors="pt")
    device = detector.text_projection.weight.device
    ids_PT, mask_PT = (tokens[name].to(device) for name in ("input_ids", "attention_mask"))
    if device.type == "meta":
        states_PTC = torch.empty(*ids_PT.shape, detector.text_projection.in_features, device=device)
    else:
        states_PTC = detector.text_encoder(ids_PT, attention_mask=mask_PT).last_hidden_state
    detector.vision_encoder.backbone = nn.Identity()
    detector.text_encoder = KnownTexts(ids_PT, states_PTC)
    return model
