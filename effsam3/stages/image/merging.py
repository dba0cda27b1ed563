# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image: what a run has learned, as the part for SAM 3's vision trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from effsam3.models.chassis.sizes import at_image_size, sam3_of
from effsam3.models.image.backbones import image_student, student_name
from effsam3.models.image.student import StudentTrunkConfig
from effsam3.models.merging.slots import SLOTS, MergeError, Part, image_part
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.models.vision.student import VisionTrunkConfig
from effsam3.stages.base import TEACHER_FORM, CardEntry, began_with
from effsam3.stages.image.facts import ImageRecipe, ImagesRecipe
from effsam3.stages.image.training import untrained

# What a run must record of the features that it learned.
FEATURES_FORM = {"teacher": TEACHER_FORM, "tap": str, "channels": int, "image_size": int}


def part_of_run(trained: ImageRecipe, features: dict, weights: dict, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part of a run of stage `image`."""
    refuse_neck(features)
    config = for_student(trained, features, config, about)
    return image_part(trained.student, trained.head, trained.student_image_size, weights, config, **about)


def untrained_part(recipe: ImageRecipe, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    side = sam3_of(recipe.sam3.checkpoint).sizes.image_size
    features = {"tap": recipe.embed.tap, "image_size": side, "channels": recipe.channels}
    return part_of_run(recipe, features, untrained(recipe).state_dict(), config, about)


def for_student(trained: ImagesRecipe, features: dict, config: PreTrainedConfig, about: dict) -> PreTrainedConfig:
    """Return the chassis' config for images of the size that the student takes; `about` records another than its own.

    Raises:
        MergeError: it learned from a teacher of other images than this SAM 3 takes.
    """
    if (side := SLOTS["image"].config_of(config).image_size) != features["image_size"]:
        raise MergeError(
            f"{about['origin']} learned from images of {features['image_size']} px, this SAM 3 takes {side} px: their "
            "grids differ; put together what was trained against the same SAM 3"
        )
    if trained.side != side:
        about["facts"]["image_size"] = trained.side
    return at_image_size(config, trained.side)


def refuse_neck(features: dict) -> None:
    """Only trunk features can fill the trunk's slot.

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


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Say who fills the slot with this config: `student`, None for SAM 3's own, and for people `is`."""
    if config.model_type == VisionTrunkConfig.model_type:
        return {"student": None, "is": "part of the student in the slot vision"}
    if config.model_type != StudentTrunkConfig.model_type:
        return {
            "student": None,
            "is": f"SAM 3's own, {config.num_hidden_layers} layers, {config.hidden_size} channels",
        }
    name = student_name(config.timm_name)
    called = f"{IMAGE_STUDENTS[name].label} ({name})" if name in IMAGE_STUDENTS else name
    seen = "" if config.student_image_size is None else f", sees {config.student_image_size} px"
    return {"student": name, "is": f"{called} with head {config.head}, {config.hidden_size} channels{seen}"}


def card(filled: dict, config: PreTrainedConfig, model: Path) -> CardEntry:
    """Describe the student for the model card; `filled` is the slot's entry in `model`'s effsam3.json."""
    return card_of_student("image", filled, config)


def card_of_student(slot: str, filled: dict, config: PreTrainedConfig) -> CardEntry:
    """Describe a timm trunk in the slot `image` or `vision`."""
    row = image_student(filled["student"], config.seen_size)
    called = f"{row.label} (`{filled['student']}`; {row.source})"
    if "image_size" in filled:
        called += f", for images of {filled['image_size']} px"
    if config.student_image_size is not None:
        called += f", which sees {config.student_image_size} px of the {config.image_size}"
    origin = began_with(slot, filled)
    if filled.get("student_init") == "imagenet":
        origin = f"The {slot} student started from timm's pretrained weights of `{row.timm_name}` ({row.source})."
    limit = f"Detector and tracker both read the {slot} student's features: where those fail, all prompts do."
    return CardEntry(called=called, origin=origin, limits=(limit,))
