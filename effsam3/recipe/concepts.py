# SPDX-License-Identifier: Apache-2.0
"""The keys of the benchmark `concepts`, in the section `evaluate` of the stages that have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from effsam3.recipe.common import Data, Recipe, StageRecipe
from effsam3.recipe.rules import NonNegativeInt, PositiveInt, Section, each_once


@dataclass(frozen=True, kw_only=True)
class ConceptEvaluate(Section):
    """What the merged model is measured on, annotated concepts among it."""

    benchmarks: tuple[str, ...]
    # Benchmark concepts: JSON of SA-Co, COCO or LVIS, or a folder of them; of SA-Co Gold, all annotators' are read
    concepts: str | None = None
    concept_images: Annotated[tuple[str, ...], each_once] = ()  # folders of their images; []: where the JSON is
    max_pairs: PositiveInt | None = 2000  # pairs of a subset, at most, of whole images; null: all
    absent: NonNegativeInt | None = None  # COCO: categories asked of an image that it does not show; null: all
    coarse_masks: bool = False  # compute every second row and column of the student's masks only: cheaper phrases
    concept_pictures: NonNegativeInt = 8  # pairs to draw: the worst ones, and as many around the median

    @property
    def measures_concepts(self) -> bool:
        """Whether the benchmark `concepts` is to be run."""
        return "concepts" in self.benchmarks

    def on(self, data: Data) -> ConceptEvaluate:
        """Return this with what the recipe's section `data` gives where nothing is named; here, nothing does."""
        return self

    def shown(self) -> tuple[tuple[str, ...], int]:
        """Return by which prompts objects are shown to the tracker, too, and how many of an image at most."""
        return (), 0

    def check(self) -> Iterator[str]:
        if self.coarse_masks and not self.measures_concepts:
            yield "coarse_masks: only concepts asks for phrases, and it is not among evaluate.benchmarks; add it there"
        if self.measures_concepts and self.concepts is None:
            yield "concepts: the benchmark concepts needs pairs of images and phrases: evaluate.concepts=FILE.json"
        if self.concepts is not None and not self.measures_concepts:
            yield f"concepts: {self.concepts} is given, but concepts is not among evaluate.benchmarks; add it there"


def measures_concepts(recipe: Recipe) -> bool:
    """Return whether `evaluate` runs the benchmark `concepts` for a recipe, or for a part of a release."""
    return any(asked_concepts(own) is not None for own in recipe.learned().values())


def asked_concepts(recipe: StageRecipe) -> ConceptEvaluate | None:
    """Return what a recipe measures of concepts; None: nothing."""
    asked = recipe.evaluate
    return asked.on(recipe.data) if isinstance(asked, ConceptEvaluate) and asked.measures_concepts else None
