# SPDX-License-Identifier: Apache-2.0
"""Stage concepts: what a run has learned, as tensors changed in place."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from effsam3.models.chassis.tensors import read_config
from effsam3.models.merging.adapt import Adapted
from effsam3.models.merging.slots import MergeError
from effsam3.stages.concepts.facts import ConceptsRecipe
from effsam3.stages.concepts.training import DETECTOR, untrained

# What a run must record of what it started from.
FEATURES_FORM = {"teacher": {"checkpoint": str, "fingerprint": str}}


def adapted_of_run(
    trained: ConceptsRecipe, features: dict, weights: dict[str, Tensor], chassis: Path, about: dict
) -> Adapted:
    """Return the tensors of a run of stage `concepts`, by their names in the whole model.

    Raises:
        MergeError: they are not those of the recipe's modules.
    """
    wanted = untrained(trained, read_config(chassis)).state_dict()
    if wanted.keys() != weights.keys():
        other = sorted(wanted.keys() ^ weights.keys())
        raise MergeError(
            f"{about['origin']}: its tensors are not those of {', '.join(trained.model.trainable)} in "
            f"{trained.sam3.checkpoint}, such as {other[0]}; merge it with the SAM 3 and model.trainable that it had"
        )
    tensors = {DETECTOR + name: tensor for name, tensor in weights.items()}
    return Adapted(tensors=tensors, made_on=features["teacher"]["fingerprint"], **about)
