# SPDX-License-Identifier: Apache-2.0
"""Stage prompted: what a run has learned, as tensors changed in place."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from effsam3.models.chassis.tensors import read_config
from effsam3.models.merging.adapt import Adapted, adapted_modules
from effsam3.stages.prompted.facts import PromptedRecipe
from effsam3.stages.prompted.training import untrained

# What a run must record of what it started from.
FEATURES_FORM = {"teacher": {"checkpoint": str, "fingerprint": str}}


def adapted_of_run(
    trained: PromptedRecipe, features: dict, weights: dict[str, Tensor], chassis: Path, about: dict
) -> Adapted:
    """Return the tensors of a run of stage `prompted`, by their names in the whole model.

    Raises:
        MergeError: they are not those of the recipe's modules.
    """
    wanted = untrained(trained, read_config(chassis)).state_dict().keys()
    return adapted_modules(wanted, weights, trained, features, about)
