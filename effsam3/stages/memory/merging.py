# SPDX-License-Identifier: Apache-2.0
"""Stage 2, memory: what a run has learned, as the part for the tracker's memory."""

from __future__ import annotations

from transformers import Sam3VideoConfig

from effsam3.models.memory.slot import memory_config, memory_tensors, owned_by, tracker_config
from effsam3.models.merging.slots import Part, refuse_other_student
from effsam3.stages.base import TEACHER_FORM
from effsam3.stages.memory.facts import MemoryRecipe
from effsam3.stages.memory.training import trained_tensors, untrained_tensors

FEATURES_FORM = {"teacher": TEACHER_FORM}  # what a run must say of the features that it learned


def part_of_run(trained: MemoryRecipe, features: dict, weights: dict, config: Sam3VideoConfig, about: dict) -> Part:
    """The part of a run of stage `memory`, which may have trained more of the tracker than its memory.

    Raises:
        MergeError: the tensors are not those of the recipe's memory and parts.
    """
    own = memory_config(config)
    built = tracker_config(own, trained.memory)
    wanted = trained_tensors(built, trained.memory.trains)
    refuse_other_student(wanted, weights, f"a {trained.student} that trained {', '.join(trained.memory.trains)}")
    placed, tensors = memory_tensors(weights, built, own)
    others = tuple(part for part in trained.memory.trains if part != "memory")
    return Part(slot="memory", student=trained.student, config=placed, tensors=tensors, also=owned_by(others), **about)


def untrained_part(recipe: MemoryRecipe, config: Sam3VideoConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    return part_of_run(recipe, {}, untrained_tensors(recipe), config, about)
