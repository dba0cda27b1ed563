# SPDX-License-Identifier: Apache-2.0
"""What a run has learned, as a part for its slot of SAM 3: what `merge` does, and what is tried before a training."""

from __future__ import annotations

from copy import deepcopy

import torch

from effsam3.models.memory.slot import memory_config, memory_tensors, owned_by, tracker_config
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import PARTS
from effsam3.models.merging.slots import SLOTS, MergeError, Part, image_part, refuse_other_student, text_part


def image_of_run(trained, features: dict, weights: dict, config, about: dict) -> Part:
    """The part of a run of stage `image`."""
    refuse_neck(features)
    if (side := SLOTS["image"].config_of(config).image_size) != features["image_size"]:
        raise MergeError(
            f"{about['origin']} learned from images of {features['image_size']} px, this SAM 3 takes {side} px: their "
            "grids differ; put together what was trained against the same SAM 3"
        )
    return image_part(trained.student, trained.head, trained.student_image_size, weights, config, **about)


def text_of_run(trained, features: dict, weights: dict, config, about: dict) -> Part:
    """The part of a run of stage `text`."""
    return text_part(trained.student, trained.student_padding, weights, config, **about)


def memory_of_run(trained, features: dict, weights: dict, config, about: dict) -> Part:
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


# slot -> what makes a part of a run folder
PARTS_OF_RUNS = {"image": image_of_run, "text": text_of_run, "memory": memory_of_run}


def refuse_neck(features: dict) -> None:
    """Only trunk features can stand in the trunk's slot.

    Raises:
        MergeError: the student learned the neck's output.
    """
    if features["tap"] != "trunk":
        raise MergeError(
            f"this student learned tap={features['tap']}: {features['channels']} channels, what SAM 3's detector neck "
            "makes of the trunk's features. The slot `image` is the trunk, whose features also feed the second neck, "
            "the tracker's; neck features cannot be turned back into them. Embed and train with embed.tap=trunk to "
            "merge"
        )
