# SPDX-License-Identifier: Apache-2.0
"""What a text student sees behind a short text: its padding rule, which its config keeps. `RULES` has both.

masked    nothing: no token attends to padding, so features do not depend on it. transformers' own Sam3LiteText.
attended  a filling: texts are filled up to the whole table of positions with id 0, and every token attends to it, as
          EfficientSAM3's students do. transformers has no class for that; these are ours.

Behind the encoder both rules are one: SAM 3's detector reads the tokens of a text and never its padding.

Letters: B texts, L tokens, D channels inside a student.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    Sam3LiteTextConfig,
    Sam3LiteTextModel,
    Sam3LiteTextTextConfig,
    Sam3LiteTextTextModel,
)

FILLING_ID = 0  # what EfficientSAM3 pads with
ATTENDED_KEY = "attended_text_config"  # in config.json, where a masked student has `text_config`


class AttendedTextConfig(Sam3LiteTextTextConfig):
    """`Sam3LiteTextTextConfig` of a student that attends to its padding."""

    model_type = "effsam3_attended_text"


class AttendedTextModel(Sam3LiteTextTextModel):
    """`Sam3LiteTextTextModel` whose tokens attend to the padding of their text, which becomes `FILLING_ID`."""

    config_class = AttendedTextConfig

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """Return what the parent does; `attention_mask` (B, L) is 1 on tokens, 0 on padding."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, FILLING_ID)
        return super().forward(input_ids=input_ids, **kwargs)


class AttendedLiteTextConfig(Sam3LiteTextConfig):
    """`Sam3LiteTextConfig` with an `AttendedTextConfig`.

    In config.json its key has another name: a class that masks padding must not find the sizes of an encoder that
    cannot do without. `Sam3LiteTextModel` then stops at the table of positions instead of computing other features.
    """

    model_type = "effsam3_attended_lite_text"
    base_config_key = "detector_config"  # so that the folder of a Sam3VideoModel is read too
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        **Sam3LiteTextConfig.sub_configs_defaults,
        "text_config": AttendedTextConfig,
    }

    def __post_init__(self, **unknown):
        self.text_config = unknown.pop(ATTENDED_KEY, self.text_config)
        super().__post_init__(**unknown)

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        return content | {ATTENDED_KEY: content.pop("text_config")}


class AttendedLiteTextModel(Sam3LiteTextModel):
    """`Sam3LiteTextModel`, SAM 3's detector with a text student, whose texts attend to their padding."""

    config_class = AttendedLiteTextConfig

    def __init__(self, config: AttendedLiteTextConfig):
        super().__init__(config)
        text: Any = config.text_config
        self.text_encoder = AttendedTextModel(text)
        self.post_init()


AutoConfig.register(AttendedTextConfig.model_type, AttendedTextConfig)
AutoConfig.register(AttendedLiteTextConfig.model_type, AttendedLiteTextConfig)
AutoModel.register(AttendedTextConfig, AttendedTextModel)
AutoModel.register(AttendedLiteTextConfig, AttendedLiteTextModel)


class Classes(NamedTuple):
    """What a rule is made of: only the text encoder, and SAM 3's detector with it."""

    text_config: type[Sam3LiteTextTextConfig]
    text_model: type[Sam3LiteTextTextModel]
    detector_config: type[Sam3LiteTextConfig]
    detector: type[Sam3LiteTextModel]


RULES = {
    "masked": Classes(Sam3LiteTextTextConfig, Sam3LiteTextTextModel, Sam3LiteTextConfig, Sam3LiteTextModel),
    "attended": Classes(AttendedTextConfig, AttendedTextModel, AttendedLiteTextConfig, AttendedLiteTextModel),
}


def padding_of(config: PreTrainedConfig) -> str:
    """Return the rule in a text encoder's or a detector's config; SAM 3's own is `masked`."""
    return "attended" if isinstance(config, AttendedTextConfig | AttendedLiteTextConfig) else "masked"
