# SPDX-License-Identifier: Apache-2.0
"""What a SAM 3's row only names: transformers' classes for the whole model, and the table of its authors' names."""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from types import ModuleType

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from effsam3.models.registry import of_type


def model_class(config_type: str) -> type[PreTrainedModel]:
    """Return the class of the whole model whose config has this `model_type`."""
    return getattr(transformers, of_type(config_type).model_class)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the whole model that `config` describes without its numbers, on the device meta; `config` is copied."""
    with torch.device("meta"):
        return model_class(config.model_type)(deepcopy(config))


def empty_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return the tensors of the whole model that `config` describes, without their numbers."""
    return empty_model(config).state_dict()


def key_map(config: PreTrainedConfig) -> ModuleType:
    """Return the module whose `to_transformers` and `to_original` rename the tensors of the model of `config`."""
    return import_module(f"effsam3.models.keymaps.{of_type(config.model_type).key_map}")
