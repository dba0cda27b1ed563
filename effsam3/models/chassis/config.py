# SPDX-License-Identifier: Apache-2.0
"""A whole model's config, read from JSON that may be damaged: one that can be built, or a sentence why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

import effsam3.models.image.student  # registers its classes: a config names them
import effsam3.models.memory.tracker
import effsam3.models.vision.student  # noqa: F401  # the same
from effsam3.checked_files import mismatch
from effsam3.errors import ChassisError
from effsam3.models.chassis.classes import empty_model, model_class
from effsam3.models.text.padding import ATTENDED_KEY, AttendedLiteTextConfig

# Far above those of any SAM 3: what is larger would be built for hours, or fill the memory.
MOST_LAYERS, LARGEST_SIZE, LONGEST_LIST = 256, 2**17, 1024
FORM = {
    "model_type": str,
    "detector_config": {"model_type": str, "vision_config": {"backbone_config": dict}},
    "tracker_config": {"model_type": str},
}
# What transformers and torch raise at values that are no sizes of a model.
NO_MODEL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def config_from(content: dict[str, Any], where: str, remedy: str) -> PreTrainedConfig:
    """Make a config from a config.json, once a model of it has been built without its numbers.

    Raises:
        ChassisError: it describes no model of this kind; the message calls it `where` and ends with `remedy`.
    """
    if (
        wrong := mismatch(content, FORM)
        or _without_text(content["detector_config"])
        or next(_out_of_range(content, ""), "")
    ):
        raise ChassisError(f"{where} describes no SAM 3: {wrong}; {remedy}")
    try:
        # Built once, as it takes a second; copied, because callers change what they get.
        return deepcopy(_built(json.dumps(content)))
    except NO_MODEL as error:
        told = " ".join(str(error).split())[:200]
        raise ChassisError(f"{where} describes no model ({type(error).__name__}: {told}); {remedy}") from error


def _without_text(detector: dict[str, Any]) -> str:
    """Return what is wrong with the text encoder's sizes in a detector's config; empty if nothing is."""
    key = ATTENDED_KEY if detector["model_type"] == AttendedLiteTextConfig.model_type else "text_config"
    return mismatch(detector, {key: dict}, "detector_config")


def _out_of_range(value: Any, name: str) -> Iterator[str]:
    """Yield what no config of a SAM 3 contains."""
    if isinstance(value, dict):
        heads, width = value.get("num_attention_heads"), value.get("hidden_size")
        if type(heads) is int and type(width) is int and heads > 0 and width % heads:
            yield f"{name}.hidden_size is {width}, not a multiple of its {heads} heads"
        for key, inner in value.items():
            yield from _out_of_range(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        if len(value) > LONGEST_LIST:
            yield f"{name} is a list of {len(value):,}"
        for inner in value:
            yield from _out_of_range(inner, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        most = MOST_LAYERS if name.endswith("_layers") else LARGEST_SIZE
        if not abs(value) <= most:
            yield f"{name} is {value:g}" if isinstance(value, float) else f"{name} is beyond {most:,}"


@lru_cache(maxsize=8)
def _built(text: str) -> PreTrainedConfig:
    content = json.loads(text)
    config_class = model_class(content["model_type"]).config_class
    assert config_class is not None  # every class of a whole model has one
    config = config_class.from_dict(content)
    empty_model(config)
    return config
