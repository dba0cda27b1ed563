# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image: the benchmarks of a merged vision trunk, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from effsam3.benchmarks.concepts.report import concept_tables
from effsam3.benchmarks.fidelity import feature_fidelity
from effsam3.benchmarks.masks import prompted_mask_quality
from effsam3.benchmarks.models import Pair, load_pair
from effsam3.benchmarks.pictures.images import draw
from effsam3.benchmarks.results import Results
from effsam3.benchmarks.speed import speed
from effsam3.benchmarks.tables import Column, millions, percent, result_table, speed_table
from effsam3.data.images.features import ImageFeatures
from effsam3.data.images.sa1b import load_index, read_image, with_masks
from effsam3.data.loader import loader
from effsam3.data.sampler import sequential_batches
from effsam3.data.unreadable import UnreadableImage
from effsam3.errors import UserError
from effsam3.models.chassis.tensors import elements
from effsam3.models.registry import is_made_up
from effsam3.recipe.common import StageRecipe
from effsam3.stages import concept_pairs
from effsam3.stages.image.facts import ImageRecipe, ImagesRecipe

TRIED = 3  # held-out images that are opened before a training


def measurable(recipe: StageRecipe) -> tuple[tuple[str, ...], list[str]]:
    """Return those of `evaluate.benchmarks` that the data allow, and a sentence for every other one.

    Raises:
        UserError: they allow none.
    """
    data: Any = recipe.data
    evaluate: Any = recipe.evaluate
    asked, index = evaluate.benchmarks, data.index
    if "masks" not in asked or with_masks(load_index(index, "val", data.limit)):
        return asked, []
    sentence = (
        f"The benchmark `masks` is left out: no held-out image of {index} has annotations to prompt with and to "
        "compare with; index images with their JSON to measure it."
    )
    left = tuple(name for name in asked if name != "masks")
    if not left:
        raise UserError(f"evaluate.benchmarks: nothing is left to measure. {sentence}")
    return left, [sentence]


def something_to_measure(recipe: StageRecipe) -> str:
    """Something that can be measured; what cannot is named."""
    data: Any = recipe.data
    return " ".join(measurable(recipe)[1]) if Path(data.index).is_file() else ""


def photographs(recipe: StageRecipe) -> None:
    """Held-out photographs that can be read, although the store may have their pixels."""
    data: Any = recipe.data
    index = Path(data.index)
    if not index.is_file():
        return
    rows, reasons = load_index(index, "val", data.limit), []
    for row in rows.select(range(min(TRIED, len(rows)))):
        try:
            read_image(row, index.parent)
            return
        except UnreadableImage as error:
            reasons.append(str(error))
    raise UserError(f"none of the first {len(reasons)} held-out images of {index} can be read: {reasons[0]}")


def annotated_concepts(recipe: StageRecipe) -> str:
    """Annotated pairs of images and noun phrases, where they are to be measured on."""
    asked: Any = recipe.evaluate
    return concept_pairs.annotated_concepts(asked)


NEEDS = (something_to_measure, photographs, annotated_concepts)


def measure(
    recipe: ImageRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Run the recipe's benchmarks on `folder`/merged and on its teacher, a folder that is called `teacher_name`."""
    pair = load_pair(chassis, folder / "merged", device)
    held_out, _ = held_out_images(recipe, pair)
    if not pair.mean_C.any():  # an imported student brings no statistics of the teacher's features
        pair = pair.with_statistics(held_out)
    measure_pair(recipe, pair, partial(feature_fidelity, pair), folder, chassis, teacher_name, results)


def held_out_images(recipe: ImagesRecipe, pair: Pair) -> tuple[DataLoader, Any]:
    """Return the held-out images to measure on, in batches, and the whole held-out index."""
    index_path = Path(recipe.data.index)
    index = load_index(index_path, "val", recipe.data.limit)
    rows = index.select(range(min(recipe.evaluate.max_images, len(index))))
    images = ImageFeatures(rows, index_path.parent, pair.image_size, recipe.data.resize)
    batches = sequential_batches(len(images), recipe.embed.batch_size, 0, 1)
    return loader(images, batches, recipe.data.workers, pin=False), index


def measure_pair(
    recipe: ImagesRecipe,
    pair: Pair,
    fidelity: Callable[[DataLoader], dict[str, Any]],
    folder: Path,
    chassis: Path,
    teacher_name: str,
    results: Results,
) -> None:
    """Run the benchmarks of stage image and vision, which differ in `fidelity`."""
    asked, images = recipe.evaluate, Path(recipe.data.index).parent
    measured, results.left_out = measurable(recipe)
    held_out, index = held_out_images(recipe, pair)
    if "fidelity" in measured:
        results.add("fidelity", fidelity(held_out))
    if "masks" in measured:
        limits = asked.prompts, asked.max_images, asked.masks_per_image
        results.add("masks", prompted_mask_quality(pair, index, images, *limits))
    if "concepts" in measured:
        concept_pairs.measure(asked, folder, concept_pairs.models_of(recipe, folder, chassis), pair.device, results)
    if "speed" in measured:
        results.add("speed", speed(pair, {"teacher": elements(chassis), "student": elements(folder / "merged")}))
    # Masks of random weights are noise: they are measured, for how far both agree, but not worth a look.
    with_masks = "masks" in measured and not is_made_up(teacher_name)
    results.pictures += draw(pair, index, images, asked.pictures, folder / "pictures", with_masks)


FIDELITY: list[Column] = [
    ("cosine", "cosine", "{:.4f}".format),
    ("centred cosine", "cosine_centred", "{:.4f}".format),
    ("mse", "mse", "{:.4f}".format),
    ("neck error", "neck", "{:.4f}".format),
]
MASKS: list[Column] = [
    ("masks", "masks", str),
    ("student", "student", percent),
    ("teacher", "teacher", percent),
    ("student vs teacher", "agreement", percent),
]


def tables(results: dict[str, dict]) -> list[str]:
    """Return the image benchmarks' results as Markdown."""
    parts = []
    if (fidelity := results.get("fidelity")) is not None:
        mean = {"cosine": fidelity["cosine_of_mean"], "cosine_centred": 0.0, "mse": 1.0}
        rows = {"student": fidelity, "mean of the features": mean}
        parts.append(result_table(f"features, {fidelity['images']} held-out images", rows, FIDELITY))
    return parts + shared_tables(results)


def shared_tables(results: dict[str, dict]) -> list[str]:
    """Return what the stages image and vision measure alike."""
    parts = []
    if (masks := results.get("masks")) is not None:
        rows = {}
        for prompt in ("box", "point"):
            if prompt in masks:
                rows[prompt] = masks[prompt]
                rows |= {f"{prompt}, {size}": group for size, group in masks[prompt]["by_size"].items()}
        parts.append(result_table(f"masks, {masks['images']} images, mIoU in %", rows, MASKS))
    if (timing := results.get("speed")) is not None:
        columns: list[Column] = [
            ("trunk", "trunk_parameters", millions),
            ("ms", "trunk_ms", "{:.1f}".format),
            (f"images/s (x{timing['batch']})", "trunk_images_per_s", "{:.1f}".format),
            ("whole model", "model_parameters", millions),
            ("ms", "model_ms", "{:.1f}".format),
            ("images/s", "model_images_per_s", "{:.1f}".format),
        ]
        labels = {name: f"{name}, {timing['image_size'][name]} px" for name in ("teacher", "student")}
        parts.append(speed_table(f"speed on {timing['device']}", timing, labels, columns))
    if (concepts := results.get("concepts")) is not None:
        parts += concept_tables(concepts)
    return parts
