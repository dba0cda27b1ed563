# SPDX-License-Identifier: Apache-2.0
"""Stage 2, memory: what a run has learned, as the part for the tracker's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from effsam3.models.memory.slot import memory_config, memory_tensors, owned_by, tracker_config
from effsam3.models.merging.slots import Part, refuse_other_student
from effsam3.stages.base import TEACHER_FORM, CardEntry
from effsam3.stages.memory.facts import MemoryRecipe
from effsam3.stages.memory.training import untrained

FEATURES_FORM = {"teacher": TEACHER_FORM}  # what a run must record of the features that it learned


def part_of_run(trained: MemoryRecipe, features: dict, weights: dict, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part of a run of stage `memory`, which may have trained more of the tracker than its memory.

    Raises:
        MergeError: the tensors are not those of the recipe's memory and parts.
    """
    own = memory_config(config)
    built = tracker_config(own, trained.memory)
    wanted = untrained(trained, own).state_dict()
    refuse_other_student(wanted, weights, f"a {trained.student} that trained {', '.join(trained.memory.trains)}")
    placed, tensors = memory_tensors(weights, built, own)
    others = tuple(part for part in trained.memory.trains if part != "memory")
    return Part(slot="memory", student=trained.student, config=placed, tensors=tensors, also=owned_by(others), **about)


def untrained_part(recipe: MemoryRecipe, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    return part_of_run(recipe, {}, untrained(recipe, memory_config(config)).state_dict(), config, about)


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Say who fills the slot with this config: its `mode`, and for people `is`."""
    size = f"{config.num_maskmem} frames, {config.memory_attention_num_layers} layers"
    if config.model_type != "effsam3_tracker_video":
        return {"mode": "dense", "is": f"SAM 3's own, {size}"}
    latents = f"{config.memory_global_latents} + {config.memory_window_latents} latents, pool {config.memory_pool}"
    return {"mode": config.memory_mode, "is": f"efficient, {config.memory_mode}, {latents}, {size}"}


def card(filled: dict, config: PreTrainedConfig, model: Path) -> CardEntry:
    """Describe the student for the model card; `filled` is the slot's entry in `model`'s effsam3.json."""
    return CardEntry(called=f"`{filled['student']}`")  # it begins with the chassis' own memory, copied, cut and pooled
