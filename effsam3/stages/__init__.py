# SPDX-License-Identifier: Apache-2.0
"""Stages: the only place that reads a recipe and builds models and data from it.

A stage is a folder. Adding one takes its folder, its name in STAGES, and recipes. Of these files it has those that it
needs; each is imported only when it is asked for:

- `facts.py`, light: RECIPE, the class of its recipes, which answers what needs no torch (`recipe.common.Recipe`).
- `training.py`: STAGE, the class that `train` builds (`protocol.Stage`); `untrained`, its student as it starts; NEEDS,
  what must be there before a training begins (`needs`).
- `embedding.py`: TeacherPass, what `embed` runs (`protocol.TeacherPass`).
- `merging.py`: `part_of_run`, what a run has learned as a part for its slot; FEATURES_FORM, what the run must record
  of the features for that; and `untrained_part`; `describe` and `card`, who fills the slot for `inspect` and for the
  model card. A stage whose recipes are `recipe.common.AdaptingRecipe` has FEATURES_FORM and `adapted_of_run`, the
  tensors that a run has changed in place (`models.merging.adapt.Adapted`), instead.
- `measuring.py`: `measure`, which adds to `benchmarks.results.Results`; `tables` of what it has found, and NEEDS.

A stage that fills a slot has its name (`models.merging.slots`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from effsam3.recipe.common import Recipe

STAGES = ("image", "vision", "text", "memory", "video", "adapt", "prompted", "concepts", "release")


def recipe_class(stage: str) -> type[Recipe]:
    """Return the class of a stage's recipes."""
    return import_module(f"effsam3.stages.{stage}.facts").RECIPE


def training(stage: str) -> ModuleType:
    """Return a stage's training.py."""
    return import_module(f"effsam3.stages.{stage}.training")


def embedding(stage: str) -> ModuleType:
    """Return a stage's embedding.py."""
    return import_module(f"effsam3.stages.{stage}.embedding")


def merging(stage: str) -> ModuleType:
    """Return a stage's merging.py."""
    return import_module(f"effsam3.stages.{stage}.merging")


def measuring(stage: str) -> ModuleType:
    """Return a stage's measuring.py."""
    return import_module(f"effsam3.stages.{stage}.measuring")
