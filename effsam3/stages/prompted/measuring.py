# SPDX-License-Identifier: Apache-2.0
"""Stage prompted: features and prompted masks of the merged model and of the one that it started from, next to the
teacher's."""

from __future__ import annotations

from pathlib import Path

import torch

from effsam3.benchmarks.concepts.report import concept_tables
from effsam3.benchmarks.fidelity import feature_fidelity
from effsam3.benchmarks.masks import prompted_mask_quality
from effsam3.benchmarks.models import load_pair
from effsam3.benchmarks.pictures.images import draw
from effsam3.benchmarks.results import Results
from effsam3.benchmarks.tables import result_table
from effsam3.data.images.features import ImageFeatures
from effsam3.data.images.sa1b import load_index
from effsam3.data.loader import loader
from effsam3.data.sampler import sequential_batches
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.registry import is_made_up
from effsam3.stages import concept_pairs
from effsam3.stages.image.measuring import (
    FIDELITY,
    MASKS,
    annotated_concepts,
    measurable,
    photographs,
    something_to_measure,
)
from effsam3.stages.prompted.facts import PromptedRecipe

START, PROMPTED = "start", "prompted"
NEEDS = (something_to_measure, photographs, annotated_concepts)


def measure(
    recipe: PromptedRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Measure `folder`/merged and what it was made of, `chassis`, a folder called `teacher_name`."""
    index_path, asked = Path(recipe.data.index), recipe.evaluate
    index = load_index(index_path, "val", recipe.data.limit)
    measured, results.left_out = measurable(recipe)
    teacher = chassis_folder(recipe.teacher.checkpoint, recipe.teacher.revision)
    rows = index.select(range(min(asked.max_images, len(index))))
    fidelity, masks = {}, {}
    for title, model in ((START, chassis), (PROMPTED, folder / "merged")):
        pair = load_pair(teacher, model, device)
        images = ImageFeatures(rows, index_path.parent, pair.image_size, recipe.data.resize)
        batches = sequential_batches(len(images), asked.batch_size, 0, 1)
        held_out = loader(images, batches, recipe.data.workers, pin=False)
        if not pair.mean_C.any():  # an imported student brings no statistics of the teacher's features
            pair = pair.with_statistics(held_out)
        if "fidelity" in measured:
            fidelity[title] = feature_fidelity(pair, held_out)
        if "masks" in measured:
            limits = asked.prompts, asked.max_images, asked.masks_per_image
            masks[title] = prompted_mask_quality(pair, index, index_path.parent, *limits)
    for name, found in (("fidelity", fidelity), ("masks", masks)):
        if found:
            results.add(name, found)
    if "concepts" in measured:
        concept_pairs.measure(asked, folder, concept_pairs.models_of(recipe, folder, chassis), device, results)
    # Masks of random weights are noise: they are measured, for how far both agree, but not worth a look.
    with_masks = "masks" in measured and not is_made_up(recipe.teacher.checkpoint)
    results.pictures += draw(pair, index, index_path.parent, asked.pictures, folder / "pictures", with_masks)


def tables(results: dict[str, dict]) -> list[str]:
    """Return the results as Markdown."""
    parts = []
    if (fidelity := results.get("fidelity")) is not None:
        parts.append(result_table(f"features, {fidelity[START]['images']} held-out images", fidelity, FIDELITY))
    if (masks := results.get("masks")) is not None:
        rows = {
            f"{prompt}{size and f', {size}'}, {title}": found[prompt]["by_size"][size] if size else found[prompt]
            for prompt in ("box", "point")
            if prompt in masks[START]
            for size in ("", *masks[START][prompt]["by_size"])
            for title, found in masks.items()
        }
        parts.append(result_table(f"masks, {masks[START]['images']} images, mIoU in %", rows, MASKS))
    return parts + (concept_tables(results["concepts"]) if "concepts" in results else [])
