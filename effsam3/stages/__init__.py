# SPDX-License-Identifier: Apache-2.0
"""Stages: the only place that reads a recipe and builds models and data from it.

A stage is a module with a training side (`stages.base.Stage`) and a teacher pass for `export`: `datasets`, `fields()`,
`description()`, `describe()`, `features(batch)`, `record(...)` and `stored(...)`.
"""

from __future__ import annotations


def make_stage(recipe, report, accelerator):
    """Build the training side of the recipe's stage, on the accelerator's device."""
    if recipe.stage == "text":
        from effsam3.stages.text import TextStage

        return TextStage(recipe, report, accelerator)
    from effsam3.stages.image import ImageStage

    return ImageStage(recipe, report, accelerator)


def make_teacher_pass(recipe, accelerator):
    """Build what `export` runs for the recipe's stage."""
    if recipe.stage == "text":
        from effsam3.stages.text import TextTeacherPass

        return TextTeacherPass(recipe, accelerator)
    from effsam3.stages.image import ImageTeacherPass

    return ImageTeacherPass(recipe, accelerator)
