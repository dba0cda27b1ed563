# SPDX-License-Identifier: Apache-2.0
"""Stage adapt: the images of a recipe, to learn from and held out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from effsam3.data.images.pair_batches import PairBatches, divide
from effsam3.data.images.pairs import Pair, open_pairs
from effsam3.data.problems import Note
from effsam3.data.synthetic.pairs import make_synthetic_pairs
from effsam3.data.unreadable import Unreadable
from effsam3.errors import UserError
from effsam3.files import stamp
from effsam3.hardware.accelerator import on_main
from effsam3.stages.adapt.facts import AdaptData, AdaptRecipe


class OwnImages(NamedTuple):
    """The images of a recipe, and what is known of all of them."""

    train: list[Pair]
    val: list[Pair]
    views: list[str]
    categories: list[str]
    notes: list[Note]

    def batches(self, recipe: AdaptRecipe, split: str, image_size: int, text: float | None = None) -> PairBatches:
        """Return the data set of a split; `text` is another share of phrases than the recipe's, with none absent."""
        return PairBatches(
            getattr(self, split),
            image_size,
            recipe.data.objects,
            recipe.prompts.text if text is None else text,
            recipe.prompts.absent if text is None else 0.0,
            recipe.data.phrase,
            self.categories,
            self.views,
            recipe.train.seed,
        )


def own_images(recipe: AdaptRecipe) -> OwnImages:
    """Open the recipe's images, divided into those to learn from and those held out.

    Raises:
        UserError: there are none of either, or none that the prompts of the recipe can be drawn on.
    """
    data = recipe.data
    pairs, notes = open_pairs(data.path, data.images, data.view)
    if data.val_path is None:
        parts = divide(pairs, data.held_out)
    else:
        held_out, more = open_pairs(data.val_path, data.images, data.view)
        parts, notes = {"train": pairs, "val": held_out}, notes + more
    views = sorted({pair.view for pair in parts["train"]}) if data.view is not None else []
    if unknown := [pair for pair in parts["val"] if views and pair.view not in views]:
        raise UserError(
            f"data.view: {unknown[0].name} is held out with the view {unknown[0].view!r}, which no other has"
        )
    categories = sorted({category for pair in parts["train"] for category in pair.categories if category})
    if recipe.asks_phrases and data.phrase is None and not categories:
        raise UserError(
            "prompts.text: the masks have no categories to name; give a phrase for all of them, data.phrase"
        )
    # An image without an object has nothing to show; asked for, it teaches that a concept is absent.
    usable = {
        split: [pair for pair in part if pair.sources or recipe.asks_phrases][: data.limit]
        for split, part in parts.items()
    }
    if not usable["train"] or not usable["val"]:
        hint = "".join(f". {note.detail}" for note in notes if note.reason == "no_png")
        raise UserError(
            f"data.path: {len(usable['train'])} images with masks to learn from and {len(usable['val'])} held out; "
            f"both are needed (data.held_out divides them, data.val_path names other ones){hint}"
        )
    return OwnImages(usable["train"], usable["val"], views, categories, notes)


def ready_images(recipe: AdaptRecipe, accelerator: Accelerator) -> OwnImages:
    """Open the images; for `data.source: synthetic` draw them first, once."""
    if recipe.data.source == "synthetic":
        on_main(accelerator, partial(_draw_images, recipe.data))
    images = own_images(recipe)
    readable(images.train, 1, recipe.data.path)  # before a model is loaded
    return images


def _draw_images(data: AdaptData) -> None:
    root = Path(data.path)
    made = {"images": data.synthetic_images, "side_px": data.synthetic_side_px}
    annotations = root / "annotations.json"
    # Not a second JSON next to it: a folder with exactly one is a data set.
    stamp(root / "synthetic.stamp", made, "synthetic images", "data.path", real=annotations)
    if not annotations.is_file():
        make_synthetic_pairs(root, made["images"], made["side_px"])


def images_to_adapt_to(recipe: AdaptRecipe) -> None:
    """Images with masks, to learn from and held out."""
    if recipe.data.source == "own":
        own_images(recipe)


def images_that_can_be_read(recipe: AdaptRecipe) -> None:
    """Some image and its masks that can be read."""
    if recipe.data.source == "own":
        readable(own_images(recipe).train, 1, recipe.data.path)


def readable(pairs: Sequence[Pair], count: int, path: str) -> list[int]:
    """Return the places of the first images that can be read with their masks, `count` of them where there are.

    Raises:
        UserError: there is none.
    """
    found: list[int] = []
    first: Unreadable | None = None
    for place, pair in enumerate(pairs):
        try:
            pair.masks(*pair.image().shape[:2])
        except Unreadable as fault:
            first = first or fault
            continue
        found.append(place)
        if len(found) == count:
            break
    if first is not None and not found:
        raise UserError(
            f"data.path: none of the {len(pairs)} images to learn from can be used (first: {first.key}: "
            f"{first.reason}: {first.detail}); run effsam3 data check {path} --as images"
        )
    return found
