# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image: what a run has learned, as the part for SAM 3's vision trunk."""

from __future__ import annotations

from transformers import Sam3VideoConfig

from effsam3.models.merging.slots import SLOTS, MergeError, Part, image_part
from effsam3.models.registry import chassis_facts
from effsam3.stages.base import TEACHER_FORM
from effsam3.stages.image.facts import ImageRecipe
from effsam3.stages.image.training import untrained_tensors

# What a run must say of the features that it learned.
FEATURES_FORM = {"teacher": TEACHER_FORM, "tap": str, "channels": int, "image_size": int}


def part_of_run(trained: ImageRecipe, features: dict, weights: dict, config: Sam3VideoConfig, about: dict) -> Part:
    """The part of a run of stage `image`."""
    refuse_neck(features)
    if (side := SLOTS["image"].config_of(config).image_size) != features["image_size"]:
        raise MergeError(
            f"{about['origin']} learned from images of {features['image_size']} px, this SAM 3 takes {side} px: their "
            "grids differ; put together what was trained against the same SAM 3"
        )
    return image_part(trained.student, trained.head, trained.student_image_size, weights, config, **about)


def untrained_part(recipe: ImageRecipe, config: Sam3VideoConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    side = chassis_facts(recipe.sam3.checkpoint).image_size
    features = {"tap": recipe.embed.tap, "image_size": side, "channels": recipe.channels}
    return part_of_run(recipe, features, untrained_tensors(recipe), config, about)


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
