# SPDX-License-Identifier: Apache-2.0
"""Stages: the only place that reads a recipe and builds models and data from it.

A stage is a folder of the files that it needs, each imported only when it is asked for:

- `facts.py`, light: RECIPE, the class of its recipes, which answers what needs no torch (`recipe.common.Recipe`).
- `training.py`: STAGE, the class that `train` builds (`stages.protocol.Stage`).
- `embedding.py`: TeacherPass, what `embed` runs: `datasets`, `fields()`, `description()`, `describe()`,
  `features(batch)`, `record(...)` and `stored(...)`.
- `merging.py`: FEATURES_FORM, what a run must say of the features that it learned, and `part_of_run`, what it has
  learned as a part for its slot.
- `measuring.py`: `benchmarks`, a generator of (name, result), and `tables` of all results.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from effsam3.recipe.common import Recipe

STAGES = ("image", "text", "memory", "release")


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
