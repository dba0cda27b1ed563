# SPDX-License-Identifier: Apache-2.0
"""Stage 2, memory: what a run has learned, as the part for the tracker's memory."""

from __future__ import annotations

from copy import deepcopy

import torch

from effsam3.models.memory.slot import memory_config, memory_tensors, owned_by, tracker_config
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import PARTS
from effsam3.models.merging.slots import Part, refuse_other_student
from effsam3.stages.base import TEACHER_FORM
from effsam3.stages.memory.facts import MemoryRecipe

FEATURES_FORM = {"teacher": TEACHER_FORM}  # what a run must say of the features that it learned


def part_of_run(trained: MemoryRecipe, features: dict, weights: dict, config, about: dict) -> Part:
    """The part of a run of stage `memory`, which may have trained more of the tracker than its memory.

    Raises:
        MergeError: the tensors are not those of the recipe's memory and parts.
    """
    own = memory_config(config)
    built = tracker_config(own, trained.memory)
    with torch.device("meta"):
        whole = EfficientTracker(deepcopy(built)).state_dict()
    prefixes = tuple(prefix for part in trained.memory.trains for prefix in PARTS[part])
    wanted = {name: tensor for name, tensor in whole.items() if name.startswith(prefixes)}
    refuse_other_student(wanted, weights, f"a {trained.student} that trained {', '.join(trained.memory.trains)}")
    placed, tensors = memory_tensors(weights, built, own)
    others = tuple(part for part in trained.memory.trains if part != "memory")
    return Part(slot="memory", student=trained.student, config=placed, tensors=tensors, also=owned_by(others), **about)
