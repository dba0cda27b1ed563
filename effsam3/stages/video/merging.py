# SPDX-License-Identifier: Apache-2.0
"""One's own videos: what a run has learned, as tensors changed in place."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from effsam3.models.chassis.tensors import read_config
from effsam3.models.memory.slot import in_whole_model
from effsam3.models.merging.adapt import Adapted, adapted_modules
from effsam3.stages.video.facts import VideoRecipe
from effsam3.stages.video.training import untrained

# What a run must record of what it started from.
FEATURES_FORM = {"teacher": {"checkpoint": str, "fingerprint": str}}


def adapted_of_run(
    trained: VideoRecipe, features: dict, weights: dict[str, Tensor], chassis: Path, about: dict
) -> Adapted:
    """Return the tensors of a run of stage `video`, by their names in the whole model.

    Raises:
        MergeError: they are not those of the recipe's modules.
    """
    wanted = untrained(trained, read_config(chassis).tracker_config).state_dict().keys()
    return adapted_modules(wanted, weights, trained, features, about, in_whole_model)
