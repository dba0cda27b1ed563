# SPDX-License-Identifier: Apache-2.0
"""The slot `memory` of SAM 3: a trained tracker's tensors and config as the merged model has them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor
from transformers import PreTrainedConfig

from effsam3.models.memory import NAME
from effsam3.models.memory.config import EfficientTrackerConfig, MemoryConfigError
from effsam3.models.memory.training import PARTS, PLACES

TRACKER = "tracker_model."
MEMORY = tuple(TRACKER + prefix for prefix in PARTS[NAME])
RESAMPLER = "memory_resampler."
# The tracker config's numbers of layers -> a recipe's key of section `memory`.
LAYERS = {"memory_attention_num_layers": "attention_layers", "memory_fuser_num_layers": "fuser_layers"}


def memory_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the tracker, which holds the memory's."""
    assert isinstance(config.tracker_config, PreTrainedConfig)  # transformers builds it whatever it was given
    return config.tracker_config


def with_memory(config: PreTrainedConfig, student: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with another memory; the tracker keeps the vision that it has."""
    config, student = deepcopy(config), deepcopy(student)
    # An image student may already be in the chassis; its trunk must stay the tracker's as well.
    student.vision_config = deepcopy(memory_config(config).vision_config)
    config.tracker_config = student
    return config


def tracker_config(chassis: PreTrainedConfig, asked) -> EfficientTrackerConfig:
    """Return the chassis' tracker config with the memory that `asked` describes: `mode`, `pool`, `global_latents`,
    `window_latents`, `depth`, `hot_frames`, and `attention_layers` and `fuser_layers`, None for the chassis' own.

    Raises:
        MemoryConfigError: more layers than the chassis has.
    """
    # Everything that is not about memory must be as in the chassis, or its weights would not fit.
    inherited = {name: value for name, value in chassis.to_dict().items() if name != "model_type"}
    layers = {}
    for name, key in LAYERS.items():
        layers[name] = inherited[name] if (count := getattr(asked, key)) is None else count
        if layers[name] > inherited[name]:
            raise MemoryConfigError(
                f"memory.{key}: {layers[name]} layers asked for, the chassis' tracker has {inherited[name]}, which "
                "they start from; ask for no more"
            )
    return EfficientTrackerConfig(
        **inherited | layers,
        memory_mode=asked.mode,
        memory_pool=asked.pool,
        memory_global_latents=asked.global_latents,
        memory_window_latents=asked.window_latents,
        memory_resampler_depth=asked.depth,
        memory_hot_frames=asked.hot_frames,
    )


def in_whole_model(name: str) -> str:
    """A tracker's tensor by its name in a `Sam3VideoModel`."""
    # The longest prefix wins: the neck and the trunk lie inside the tracker's own names.
    there, here = max(
        ((there, here) for there, here in PLACES.items() if name.startswith(here)), key=lambda place: len(place[1])
    )
    return there + name.removeprefix(here)


def owned_by(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Beginnings of the names, in a `Sam3VideoModel`, of what these `PARTS` of a tracker own."""
    return tuple(in_whole_model(prefix) for part in parts for prefix in PARTS[part])


def memory_tensors(
    weights: Mapping[str, Tensor], built: EfficientTrackerConfig, own: PreTrainedConfig
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Return the merged tracker's config and the trained tensors by their names in the merged model.

    A dense memory with as many layers as the chassis' (`own`) is SAM 3's own kind: it needs neither resampler nor
    another config.
    """
    # Then transformers can load it without this package, so nothing of ours should be in the file.
    stock = built.memory_mode == "dense" and all(built.to_dict()[name] == own.to_dict()[name] for name in LAYERS)
    tensors = {
        in_whole_model(name): tensor for name, tensor in weights.items() if not (stock and name.startswith(RESAMPLER))
    }
    return (own if stock else built), tensors
