# SPDX-License-Identifier: Apache-2.0
"""How far a text student's features are from its own under the other padding rule, on a fixed list of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam3LiteTextTextConfig

from effsam3.models.text.padding import RULES, padding_of, with_padding
from effsam3.models.text.student import StudentText
from effsam3.models.text.tokens import PROCESSOR_LENGTH, Tokenizer, pad

# From one word to the longest that SAM 3 reads. They are there to be compared, not to find anything.
PROMPTS = (
    "cat",
    "red car",
    "yellow school bus",
    "a striped umbrella",
    "the man in blue",
    "two dogs on the grass",
    "a wooden chair next to the table",
    "the person on the left with a red hat",
    "a white bowl of green apples on the kitchen counter",
    "the small boat with a brown sail that is nearest to the harbour wall",
    "an old woman in a long dark coat who carries a black bag and two paper cups of hot coffee across the wet road at "
    "night in the cold rain",
)


class Disagreement(NamedTuple):
    """What the other rule changes, over the valid tokens of `PROMPTS`."""

    relative_error: float  # length of the difference by length of the features
    cosine: float  # mean over tokens
    worst_prompt: str
    worst_error: float  # its relative error

    def __str__(self) -> str:
        return (
            f"over {len(PROMPTS)} prompts of 3 to {PROCESSOR_LENGTH} tokens its features are off by "
            f"{self.relative_error:.1%} (cosine {self.cosine:.3f}), most for {self.worst_prompt!r} "
            f"({self.worst_error:.1%})"
        )


@torch.no_grad()
def disagreement(config: Sam3LiteTextTextConfig, tensors: Mapping[str, Tensor]) -> Disagreement:
    """Compare a student with itself under the other rule.

    Args:
        config: the student's own.
        tensors: `text_encoder.*` and `text_projection.*`, the teacher's statistics multiplied in.
    """
    ids_BL, mask_BL = pad(Tokenizer().tokenize_whole(list(PROMPTS)))
    channels = len(tensors["text_projection.bias"])
    statistics = {"feature_mean": torch.zeros(channels), "feature_scale": torch.ones(channels)}
    features = {}
    for rule in RULES:
        student = StudentText(with_padding(config, rule), channels).eval()
        student.load_state_dict(statistics | dict(tensors))
        features[rule] = student(ids_BL, mask_BL)
    own_BLC = features.pop(padding_of(config))
    (other_BLC,) = features.values()
    rows = zip(other_BLC, own_BLC, mask_BL, strict=True)
    pairs = [(other_LC[mask_L], own_LC[mask_L]) for other_LC, own_LC, mask_L in rows]
    errors = [float((other_NC - own_NC).norm() / own_NC.norm()) for other_NC, own_NC in pairs]
    other_NC, own_NC = (torch.cat(features) for features in zip(*pairs, strict=True))
    return Disagreement(
        relative_error=float((other_NC - own_NC).norm() / own_NC.norm()),
        cosine=float(F.cosine_similarity(other_NC, own_NC).mean()),
        worst_prompt=PROMPTS[errors.index(max(errors))],
        worst_error=max(errors),
    )
