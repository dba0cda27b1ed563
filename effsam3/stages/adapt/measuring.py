# SPDX-License-Identifier: Apache-2.0
"""Stage adapt: Dice and IoU of held-out images before and after, by each kind of prompt.

Both are whole models, measured as `effsam3 predict` uses them, at the size of the original image.

Letters: O objects of an image, H W rows and columns of it, S side of the model's image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from effsam3.benchmarks.pictures.drawing import Comparison, paint, save_png
from effsam3.benchmarks.results import Results
from effsam3.benchmarks.tables import Column, percent, result_table
from effsam3.data.images.pair_batches import resize_mask, solid
from effsam3.data.images.pairs import Pair
from effsam3.data.splits import split_code
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.unreadable import Unreadable
from effsam3.errors import UserError
from effsam3.models.inference.concepts import ConceptModel
from effsam3.models.inference.prompted import at_full_size, load_tracker, prompted_masks
from effsam3.models.lora.student import overlaps
from effsam3.models.memory.prompts import draw_prompt
from effsam3.models.merging.slots import read_card
from effsam3.stages.adapt.facts import AdaptRecipe
from effsam3.stages.adapt.images import own_images

START, ADAPTED = "start", "adapted"
LINE = 18  # pixels of a line of text on a picture


def held_out_images(recipe: AdaptRecipe) -> None:
    """Held-out images of the view that the merged model is for."""
    if recipe.data.source == "own" or Path(recipe.data.path).is_dir():  # synthetic ones may still have to be drawn
        measured(recipe, recipe.merge.view)


NEEDS = (held_out_images,)


def measured(recipe: AdaptRecipe, view: str | None) -> tuple[list[Pair], list[str]]:
    """Return the held-out images to measure a model for this view on, and the kinds of prompts.

    Raises:
        UserError: no held-out image has masks, or none of them the view.
    """
    images = own_images(recipe)
    pairs = [pair for pair in images.val if pair.sources and (not images.views or pair.view == view)]
    if not pairs:
        raise UserError(
            f"merge.view: {view!r} is the view of no held-out image with masks; choose from {', '.join(images.views)}"
            if images.views
            else "data.path: no held-out image has masks to measure by"
        )
    # A trunk that has changed has changed for all prompts, whichever it was trained by.
    changed, named = "trunk" in recipe.adapters.parts, images.categories or recipe.data.phrase
    kinds = ["box", "point"] if recipe.shows_objects or changed else []
    kinds += ["text"] if named and (recipe.asks_phrases or changed) else []
    return pairs[: recipe.evaluate.max_images], kinds


def measure(
    recipe: AdaptRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Measure `folder`/merged and what it was before, a folder that is called `teacher_name`."""
    (about,) = [one for one in read_card(folder / "merged")["adapted"] if one["name"] == recipe.folder.name]
    view = about.get("view")  # what was merged, whatever the recipe says now
    pairs, kinds = measured(recipe, view)
    drawn: dict[str, dict[str, np.ndarray]] = {pair.name: {} for pair in pairs[: recipe.evaluate.pictures]}
    result: dict = {"images": len(pairs), "view": view}
    for title, model in ((START, chassis), (ADAPTED, folder / "merged")):
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for pair, kind, fits, masks_OHW in segmented(model, pairs, kinds, recipe.data.phrase, device):
            found[kind] += fits
            if kind == kinds[0] and pair.name in drawn:
                drawn[pair.name][title] = masks_OHW
        result[title] = {
            f"{name}_{kind}": float(np.mean([fit[name] for fit in fits]))
            for kind, fits in found.items()
            for name in ("iou", "dice")
            if fits
        }
        result["masks"] = {kind: len(fits) for kind, fits in found.items()}
    result["bf16_keeps"] = about.get("bf16_keeps")
    results.add("adapted_masks", result)
    by_name = {pair.name: pair for pair in pairs}
    results.pictures = [
        draw(
            by_name[name],
            masks,
            folder / "pictures" / f"{Path(name).with_suffix('').as_posix().strip('/').replace('/', '_')}.png",
        )
        for name, masks in drawn.items()
        if masks
    ]


def segmented(
    folder: Path, pairs: list[Pair], kinds: list[str], phrase: str | None, device: torch.device
) -> Iterator[tuple[Pair, str, list[dict[str, float]], np.ndarray]]:
    """Yield every image with each kind of prompt: how well the masks fit, and the masks, bool [O, H, W].

    Objects are shown one by one; phrases are scored by all their instances together. Images that cannot be read are
    left out; the doctor and the training name them.
    """
    tracker = torch.nn.Module.to(load_tracker(folder), device) if {"box", "point"} & set(kinds) else None
    concepts = ConceptModel(folder, device) if "text" in kinds else None
    for pair in pairs:
        try:
            image_HW3 = pair.image()
            truths = pair.masks(*image_HW3.shape[:2])
        except Unreadable:
            continue
        size = image_HW3.shape[:2]
        if tracker is not None and truths:
            side = tracker.config.image_size
            pixels = normalise(resize_image(image_HW3, side, "square")[0])[None].to(device)
            with torch.no_grad():
                embeddings = tracker.get_image_embeddings(pixels)
            truth_OHW = torch.from_numpy(np.stack([mask for _, mask in truths]))
            small = [solid(resize_mask(mask, (side, side))) for _, mask in truths]
            for kind in (kind for kind in kinds if kind != "text"):
                # By the image's name, so that both models are shown the same.
                rng = np.random.default_rng([split_code(pair.name), kind == "point"])
                points_O22 = torch.stack([draw_prompt(mask, kind, rng)[0] for mask in small]).to(device)
                shown = (points_O22.flatten(1), None) if kind == "box" else (None, points_O22[:, 0])
                masks_OHW = at_full_size(prompted_masks(tracker, embeddings, *shown)[0], size)
                yield pair, kind, fits_of(masks_OHW, truth_OHW), masks_OHW.numpy()
        if concepts is not None:
            levels = concepts.look(image_HW3)
            by_text: dict[str, list[np.ndarray]] = {}
            for category, mask in truths:
                by_text.setdefault(phrase or category, []).append(mask)
            for text, masks in by_text.items():
                if text:
                    union_1HW = concepts.find(levels, size, text).masks_OHW.any(0, keepdim=True)
                    truth_1HW = torch.from_numpy(np.stack(masks).any(0, keepdims=True))
                    yield pair, "text", fits_of(union_1HW, truth_1HW), union_1HW.numpy()


def fits_of(masks_OHW: Tensor, truth_OHW: Tensor) -> list[dict[str, float]]:
    """Return `iou` and `dice` of each mask."""
    found = overlaps(masks_OHW, truth_OHW)
    return [
        {name: float(value) for name, value in zip(found, values, strict=True)}
        for values in zip(*found.values(), strict=True)
    ]


def draw(pair: Pair, masks: dict[str, np.ndarray], path: Path) -> Path:
    """Draw an image with its true masks and those of both models side by side; lines are the true outlines."""
    image_HW3 = pair.image()
    truth = dict(enumerate((mask for _, mask in pair.masks(*image_HW3.shape[:2])), 1))
    panels = {"annotated": truth} | {title: dict(enumerate(found, 1)) for title, found in masks.items()}
    height, width = image_HW3.shape[:2]
    sheet = Image.new("RGB", (len(panels) * width, height + LINE), (255, 255, 255))
    for place, (title, filled) in enumerate(panels.items()):
        sheet.paste(paint(image_HW3, filled, truth), (place * width, LINE))
        ImageDraw.Draw(sheet).text((place * width + 4, 2), title, (30, 32, 38))
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = {title: (place * width, LINE, (place + 1) * width, LINE + height) for place, title in enumerate(panels)}
    save_png(sheet, path, [Comparison(pair.name, {title: sides[title] for title in masks})])
    return path


def tables(results: dict[str, dict]) -> list[str]:
    """Return the masks' results as Markdown."""
    found = results["adapted_masks"]
    columns: list[Column] = [
        (f"{kind}, {title}", f"{name}_{kind}", percent)
        for kind, count in found["masks"].items()
        for name, title in (("iou", "mIoU"), ("dice", "Dice"))
        if count
    ]
    view = f" of the view {found['view']}" if found["view"] else ""
    title = f"{found['images']} held-out images{view}, in %"
    parts = [result_table(title, {name: found[name] for name in (START, ADAPTED)}, columns)]
    if found["bf16_keeps"] is not None:
        parts.append(
            f"The weights are float32. Rounded to bfloat16, {percent(found['bf16_keeps'])} % of what the adapters "
            "change would be left; keep adapter/ next to such a copy."
        )
    return parts
