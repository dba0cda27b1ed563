# SPDX-License-Identifier: Apache-2.0
"""Stage concepts: what a run has learned, as tensors changed in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from effsam3.models.chassis.slim import slim_tensors
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.heads.concept_student import DETECTOR
from effsam3.models.lora.adapter import PREFIX, fold, kept_line
from effsam3.models.merging.adapt import Adapted, adapted_modules
from effsam3.stages.concepts.facts import ConceptsRecipe
from effsam3.stages.concepts.training import untrained

# What a run must record of what it started from.
FEATURES_FORM = {"teacher": {"checkpoint": str, "fingerprint": str}}


def adapted_of_run(
    trained: ConceptsRecipe, features: dict, weights: dict[str, Tensor], chassis: Path, about: dict
) -> Adapted:
    """Return the tensors of a run of stage `concepts`, by their names in the whole model, adapters folded in.

    Raises:
        MergeError: they are not those of the recipe's modules and adapters.
    """
    config, layers = read_config(chassis), trained.encoder_layers
    wanted = untrained(trained, config).state_dict().keys()
    found = adapted_modules(wanted, weights, trained, features, about, DETECTOR.__add__)
    found = replace(found, encoder_layers=layers)
    if not trained.adapters.parts:
        return found
    plain = {DETECTOR + name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
    low_rank = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    own = slim_tensors(config, read_tensors(chassis), layers)
    folded, kept = fold(own, low_rank, trained.adapters.alpha, trained.adapters.rank)
    facts = found.facts | {"bf16_keeps": round(kept, 3)}
    return replace(found, tensors=plain | folded, facts=facts, notes=(*found.notes, kept_line(kept)))
