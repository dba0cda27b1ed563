# SPDX-License-Identifier: Apache-2.0
"""The benchmark `concepts` of any stage whose recipes ask for it: annotated pairs of an image and a noun phrase.

First all models' answers are recorded, by as many processes as there are; then one process scores the records. So
what a kill leaves is resumed, and scoring again costs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effsam3.benchmarks import journal
from effsam3.benchmarks.concepts import recording, report
from effsam3.benchmarks.concepts.recording import FOUND_FORM, SHOWN_FORM, Place
from effsam3.benchmarks.journal import Journal
from effsam3.benchmarks.pictures.concepts import draw_pairs
from effsam3.benchmarks.results import Results
from effsam3.data.concepts.files import open_concepts
from effsam3.data.concepts.pairs import Limits, Subset
from effsam3.data.unreadable import UnreadableImage
from effsam3.errors import UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import fingerprint, map_tensors, read_config
from effsam3.models.text.tokens import Tokenizer
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.concepts import ConceptEvaluate

KEY = "evaluate.concepts"
TRIED = 3  # images of a subset that are opened before a training


@dataclass
class OneProcess:
    """The only process there is."""

    device: torch.device
    process_index: int = 0
    num_processes: int = 1

    def wait_for_everyone(self) -> None:
        """Return at once."""


def subsets_of(asked: ConceptEvaluate, objects: int | None = None) -> list[Subset]:
    """Read the pairs; `objects` is the most that the model finds of one phrase.

    Raises:
        UserError: a file is missing or is none of the known formats.
    """
    assert asked.concepts is not None  # the recipe's rules see to it
    limits = Limits(refuse=Tokenizer().why_not, objects=objects, pairs=asked.max_pairs, absent=asked.absent)
    return open_concepts(Path(asked.concepts), [Path(folder) for folder in asked.concept_images], limits, KEY)


def annotated_concepts(asked: ConceptEvaluate) -> str:
    """Pairs of images and phrases, and images of every subset that can be read; what is left out is counted.

    Raises:
        UserError: there are none.
    """
    if not asked.measures_concepts:
        return ""
    remarks = []
    for subset in subsets_of(asked):
        reasons = []
        for name, pairs in list(subset.images().items())[:TRIED]:
            try:
                subset.read_image(name, pairs[0].size)
                break
            except UnreadableImage as error:
                reasons.append(str(error))
        else:
            raise UserError(
                f"{KEY}: none of the first {len(reasons)} images of {subset.name} can be read: {reasons[0]}; name "
                "their folder with evaluate.concept_images=[FOLDER]"
            )
        if subset.notes:
            counted = ", ".join(f"{count} {reason}" for reason, count in subset.reasons().items())
            remarks.append(f"{KEY}: {subset.name} has {counted}; such as {subset.notes[0].where}.")
    return " ".join(remarks)


def models_of(recipe: StageRecipe, folder: Path, chassis: Path) -> dict[str, Path]:
    """Return the folders of what is measured: teacher, student (`folder`/merged) and what that started from.

    `chassis` is what the student is merged into: what it started from, where a recipe names another teacher.
    """
    own = recipe.teacher_of_concepts
    teacher = chassis if own is None else chassis_folder(own.checkpoint, own.revision)
    start = {} if teacher == chassis else {"start": chassis}
    return {"teacher": teacher, **start, "student": folder / "merged"}


def record(asked: ConceptEvaluate, folder: Path, models: Mapping[str, Path], place: Place) -> None:
    """Record this process's share of what the models of `models_of` answer, in the run's `folder`. Collective."""
    images, (prompts, most) = recording.images_of(subsets_of(asked)), asked.shown()
    for model, source in models.items():
        found, shown = _journals(folder, model)
        coarse = asked.coarse_masks and model == "student"  # what it is compared with stays as it is
        if place.process_index == 0:
            weights = fingerprint(map_tensors(source))
            settings = {"weights": weights, "absent": asked.absent}
            journal.begin(found.folder, settings | ({"coarse_masks": True} if coarse else {}))
            if prompts:  # a text student asks for none, and must not delete the image student's
                journal.begin(shown.folder, {"weights": weights, "prompts": list(prompts), "masks_per_image": most})
        place.wait_for_everyone()
        recording.record_found(source, images, found, place, f"concepts, {model}", coarse)
        if prompts:
            recording.record_shown(source, images, prompts, most, shown, place, f"prompted masks, {model}")


def measure(
    asked: ConceptEvaluate, folder: Path, models: Mapping[str, Path], device: torch.device, results: Results
) -> None:
    """Record what is missing, score it all, and draw: eval/concepts.json and .csv, pictures/concepts_*.png."""
    record(asked, folder, models, OneProcess(device))
    config: Any = read_config(folder / "merged")
    subsets = subsets_of(asked, config.detector_config.detr_decoder_config.num_queries)
    journals = {model: _journals(folder, model) for model in models}
    found = {model: recording.read_records(own) for model, (own, _) in journals.items()}
    shown = {model: recording.read_records(own) for model, (_, own) in journals.items()}
    result: dict[str, Any] = {"subsets": {}}
    answered = {}
    for subset in subsets:
        both, failed = report.both_found(subset, found)
        answered[subset.name] = both
        own = report.subset_result(subset, both, failed)
        if asked.shown()[0]:
            keys = [recording.image_key(image) for image in recording.images_of([subset])]
            own["shown"] = report.shown_result(
                {model: [records[key] for key in keys] for model, records in shown.items()}, asked.shown()[0]
            )
        result["subsets"][subset.name] = own
        results.pictures += draw_pairs(subset, both, asked.concept_pictures, folder / "pictures")
    if len(subsets) > 1:
        result["average"] = report.average(result["subsets"])
    report.write_pairs(folder / "eval" / f"{results.prefix}concepts.csv", answered)
    results.add("concepts", result)


def _journals(folder: Path, model: str) -> tuple[Journal, Journal]:
    """Return where a model's answers to phrases are, and those to boxes and points."""
    own = folder / "eval" / "concepts" / model
    return Journal(own / "found", "found", FOUND_FORM), Journal(own / "shown", "shown", SHOWN_FORM)
