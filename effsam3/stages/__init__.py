# SPDX-License-Identifier: Apache-2.0
"""Stages: the only place that reads a recipe and builds models and data from it.

A stage is a module with a training side (`stages.base.Stage`) and a teacher pass for `embed`: `datasets`, `fields()`,
`description()`, `describe()`, `features(batch)`, `record(...)` and `stored(...)`.
"""

from __future__ import annotations

from importlib import import_module

# stage -> classes of effsam3/stages/<stage>.py: the training side and, where features can be stored, the teacher pass
CLASSES = {
    "image": ("ImageStage", "ImageTeacherPass"),
    "text": ("TextStage", "TextTeacherPass"),
    "memory": ("MemoryStage",),
}


def make_stage(recipe, report, accelerator):
    """Build the training side of the recipe's stage, on the accelerator's device."""
    return _class_of(recipe.stage, 0)(recipe, report, accelerator)


def make_teacher_pass(recipe, accelerator):
    """Build what `embed` runs for the recipe's stage."""
    return _class_of(recipe.stage, 1)(recipe, accelerator)


def _class_of(stage: str, side: int):
    # Imported when asked for: one stage's needs are not another's.
    return getattr(import_module(f"effsam3.stages.{stage}.training"), CLASSES[stage][side])
