# SPDX-License-Identifier: Apache-2.0
"""Stages: the only place that reads a recipe and builds models and data from it."""

from __future__ import annotations


def make_stage(recipe, report, accelerator):
    """Build the stage that the recipe names, on the accelerator's device.

    A stage has `student`, `train_data`, `val_data`, `metric` (the validation number to maximise), `prepare()`,
    `loss(student, batch)`, `validate(student, batch)`, `summarise(sums)` and `describe()`.
    """
    from effsam3.stages.image import ImageStage

    return {"image": ImageStage}[recipe.stage](recipe, report, accelerator)
