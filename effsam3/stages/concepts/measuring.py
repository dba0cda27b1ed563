# SPDX-License-Identifier: Apache-2.0
"""Stage concepts: the benchmark concepts of the trained model, next to its teacher or to what it started from."""

from __future__ import annotations

from pathlib import Path

import torch

from effsam3.benchmarks.concepts.report import concept_tables
from effsam3.benchmarks.results import Results
from effsam3.errors import UserError
from effsam3.recipe.concepts import ConceptEvaluate, asked_concepts
from effsam3.stages import concept_pairs
from effsam3.stages.concepts.facts import ConceptsRecipe


def held_out_pairs(recipe: ConceptsRecipe) -> str:
    """Annotated pairs to measure on, and images of them that can be read."""
    asked = _asked(recipe)
    if recipe.data.source == "synthetic" and not Path(recipe.data.path).is_dir():
        return ""  # `train` will draw them
    return concept_pairs.annotated_concepts(asked)


NEEDS = (held_out_pairs,)


def _asked(recipe: ConceptsRecipe) -> ConceptEvaluate:
    """Return what is measured.

    Raises:
        UserError: no held-out pairs are named.
    """
    asked = asked_concepts(recipe)
    if asked is None or asked.concepts is None:
        raise UserError(
            "evaluate.concepts: it takes annotated pairs that were held out; name them here, or as data.val_path"
        )
    return asked


def measure(
    recipe: ConceptsRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Run the benchmark on `folder`/merged, on its teacher, and on `chassis`, what it started from."""
    models = concept_pairs.models_of(recipe, folder, chassis)
    concept_pairs.measure(_asked(recipe), folder, models, device, results)


def tables(results: dict[str, dict]) -> list[str]:
    """Return the results as Markdown."""
    return concept_tables(results["concepts"])
