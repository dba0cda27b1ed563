# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: what a run has learned, as the part for SAM 3's text encoder."""

from __future__ import annotations

from transformers import Sam3VideoConfig

from effsam3.models.merging.slots import Part, text_part
from effsam3.stages.base import TEACHER_FORM
from effsam3.stages.text.facts import TextRecipe
from effsam3.stages.text.training import untrained_tensors

FEATURES_FORM = {"teacher": TEACHER_FORM}  # what a run must say of the features that it learned


def part_of_run(trained: TextRecipe, features: dict, weights: dict, config: Sam3VideoConfig, about: dict) -> Part:
    """The part of a run of stage `text`."""
    return text_part(trained.student, trained.student_padding, weights, config, **about)


def untrained_part(recipe: TextRecipe, config: Sam3VideoConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    return part_of_run(recipe, {}, untrained_tensors(recipe), config, about)
