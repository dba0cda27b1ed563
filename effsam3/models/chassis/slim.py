# SPDX-License-Identifier: Apache-2.0
"""A SAM 3 with fewer layers in its detector's fusion encoder, evenly spaced ones of its own: every second one of six.

The encoder takes most of what a phrase costs. Its layers are alike, so a model of fewer is an ordinary SAM 3 whose
config says how many there are; the layers that stay keep their weights and are counted anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

from effsam3.errors import UserError

ENCODER = "detector_model.detr_encoder.layers."  # the beginning of its layers' names in a whole SAM 3
Value = TypeVar("Value")


def encoder_layers(config: Any) -> int:
    """Return how many layers the fusion encoder of the SAM 3 of a config has."""
    return config.detector_config.detr_encoder_config.num_layers


def kept_layers(own: int, layers: int) -> list[int]:
    """Return which of `own` layers stay where `layers` do, the first among them.

    Raises:
        UserError: there are not so many.
    """
    if layers > own:
        raise UserError(
            f"model.encoder_layers: {layers}, but the fusion encoder of sam3.checkpoint has {own}; set it to fewer, "
            "or to null for all of them"
        )
    return [place * own // layers for place in range(layers)]


def slim_config(config: Any, layers: int | None) -> Any:
    """Return the config of the SAM 3 with so many layers; None: as it is.

    Raises:
        UserError: it has not so many.
    """
    if layers is None:
        return config
    kept_layers(encoder_layers(config), layers)
    config = deepcopy(config)
    config.detector_config.detr_encoder_config.num_layers = layers
    return config


def slim_tensors(config: Any, tensors: Mapping[str, Value], layers: int | None) -> dict[str, Value]:
    """Return what stays of the tensors of a whole SAM 3, under their new names; `config` is that of all its layers.

    Raises:
        UserError: it has not so many.
    """
    if layers is None:
        return dict(tensors)
    kept = kept_layers(encoder_layers(config), layers)
    found = {}
    for name, tensor in tensors.items():
        layer, dot, rest = name.removeprefix(ENCODER).partition(".")
        if not name.startswith(ENCODER):
            found[name] = tensor
        elif int(layer) in kept:
            found[f"{ENCODER}{kept.index(int(layer))}{dot}{rest}"] = tensor
    return found


def slim_model(model: Any, layers: int | None) -> Any:
    """Take layers out of a whole SAM 3, in place; return it.

    Raises:
        UserError: it has not so many.
    """
    if layers is not None:
        encoder = model.detector_model.detr_encoder
        encoder.layers = nn.ModuleList(encoder.layers[place] for place in kept_layers(len(encoder.layers), layers))
    return model
