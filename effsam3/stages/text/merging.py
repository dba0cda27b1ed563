# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: what a run has learned, as the part for SAM 3's text encoder."""

from __future__ import annotations

from effsam3.models.merging.slots import Part, text_part
from effsam3.stages.base import TEACHER_FORM
from effsam3.stages.text.facts import TextRecipe

FEATURES_FORM = {"teacher": TEACHER_FORM}  # what a run must say of the features that it learned


def part_of_run(trained: TextRecipe, features: dict, weights: dict, config, about: dict) -> Part:
    """The part of a run of stage `text`."""
    return text_part(trained.student, trained.student_padding, weights, config, **about)
