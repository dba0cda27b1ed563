# SPDX-License-Identifier: Apache-2.0
"""Stage 1, vision: what a run has learned, as the part for SAM 3's trunk and necks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.image.backbones import student_name
from effsam3.models.merging.slots import Part
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.models.vision.slot import vision_part
from effsam3.models.vision.student import VisionTrunkConfig
from effsam3.stages.base import TEACHER_FORM, CardEntry
from effsam3.stages.image.merging import card_of_student, for_student
from effsam3.stages.vision.facts import VisionRecipe
from effsam3.stages.vision.training import untrained

# What a run must record of the features that it learned.
FEATURES_FORM = {"teacher": TEACHER_FORM, "image_size": int}


def part_of_run(trained: VisionRecipe, features: dict, weights: dict, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part of a run of stage `vision`."""
    config = for_student(trained, features, config, about)
    return vision_part(trained.student, trained.widths, trained.student_image_size, weights, config, **about)


def untrained_part(recipe: VisionRecipe, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    features = {"image_size": sam3_of(recipe.sam3.checkpoint).sizes.image_size}
    return part_of_run(recipe, features, untrained(recipe).state_dict(), config, about)


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Say who fills the slot with this config: `student`, None for SAM 3's own necks, and for people `is`."""
    if config.model_type != VisionTrunkConfig.model_type:
        return {"student": None, "is": "SAM 3's own necks"}
    name = student_name(config.timm_name)
    called = f"{IMAGE_STUDENTS[name].label} ({name})" if name in IMAGE_STUDENTS else name
    seen = "" if config.student_image_size is None else f", sees {config.student_image_size} px"
    return {
        "student": name,
        "is": f"{called}, {config.hidden_size} channels, {', '.join(map(str, config.widths))} in its necks{seen}",
    }


def card(filled: dict, config: PreTrainedConfig, model: Path) -> CardEntry:
    """Describe the student for the model card; `filled` is the slot's entry in `model`'s effsam3.json."""
    return card_of_student("vision", filled, config)
