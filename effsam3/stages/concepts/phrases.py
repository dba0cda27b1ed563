# SPDX-License-Identifier: Apache-2.0
"""Stage concepts: the images of a recipe and their phrases, to learn from and held out."""

from __future__ import annotations

from pathlib import Path

from effsam3.data.concepts.asking import AskedImage, Choice
from effsam3.data.concepts.training import (
    ConceptPhrases,
    annotated_phrases,
    listed_phrases,
    open_asked,
    read_phrases,
)
from effsam3.data.problems import Note
from effsam3.data.splits import SPLITS, split_of
from effsam3.data.store.reader import StoreReader
from effsam3.data.synthetic.concepts import make_synthetic_concepts
from effsam3.errors import UserError
from effsam3.files import stamp
from effsam3.models.text.tokens import Tokenizer
from effsam3.stages.concepts.facts import ConceptData, ConceptsRecipe
from effsam3.stages.image.training import both_datasets


def draw_concepts(data: ConceptData) -> None:
    """Draw the images of `data.source: synthetic`, once.

    Raises:
        UserError: others are there.
    """
    folder = Path(data.path)
    made = {"images": data.synthetic_images, "held_out": data.synthetic_held_out, "side_px": data.synthetic_side_px}
    stamp(folder / "synthetic.stamp", made, "synthetic concepts", "data.path", real=Path(data.learned))
    if not Path(data.learned).is_file():
        make_synthetic_concepts(folder, **made)


def phrases_of(
    recipe: ConceptsRecipe, image_size: int, mask_side: int, store: StoreReader | None = None
) -> tuple[ConceptPhrases, ConceptPhrases]:
    """Return images to learn from and held-out ones, with their phrases; with a store also the teacher's features.

    Raises:
        UserError: there are none of either, or in no known format; it names the key.
    """
    data, seed = recipe.data, recipe.train.seed
    if data.source == "images":
        assert data.listed is not None  # the recipe's rules see to it
        listed, notes = read_phrases(Path(data.listed), Tokenizer().why_not, data.phrases, "data.listed")
        both = both_datasets(recipe, Path(data.path), image_size, store, "data.path")
        asked = [listed_phrases(images, listed, data.phrases, mask_side, seed, notes) for images in both]
        return asked[0], asked[1]
    images, notes = open_images(data, data.learned, "data.path")
    val_notes: list[Note] = []
    if data.validated is None:
        parts: dict[str, list[AskedImage]] = {split: [] for split in SPLITS}
        for image in images:
            parts[split_of(image.name, data.held_out)].append(image)
        if not all(parts.values()):
            counts = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
            raise UserError(f"data.held_out: {data.held_out:g} divides the {len(images)} images into {counts}; name "
                            "another share, or other pairs to hold out with data.val_path")  # fmt: skip
        train, val = parts["train"], parts["val"]
    else:
        val, val_notes = open_images(data, data.validated, "data.val_path")
        held_out = {place_of(image) for image in val}
        train = [image for image in images if place_of(image) not in held_out]
        notes += [Note("held_out", image.name) for image in images if place_of(image) in held_out]
        if not train:
            raise UserError(f"data.val_path: all {len(images)} images of {data.learned} are held out by "
                            f"{data.validated}; name pairs of other images")  # fmt: skip
    val = val[: data.limit][: recipe.train.eval_samples]
    choice = Choice(phrases=data.phrases, negatives=data.negatives, hard=data.hard)
    shape = (choice, image_size, mask_side, seed)
    return (
        annotated_phrases(train[: data.limit], *shape, all_images=train, notes=notes),
        annotated_phrases(val, *shape, notes=val_notes),
    )


def open_images(data: ConceptData, path: str, key: str) -> tuple[list[AskedImage], list[Note]]:
    """Read the pairs of a path."""
    return open_asked(Path(path), [Path(folder) for folder in data.images], Tokenizer().why_not, data.objects, key)


def place_of(image: AskedImage) -> tuple[str, ...]:
    """Return what tells an image from others: the folders that it may be in, and its name."""
    return *(str(folder.resolve()) for folder in image.subset.folders), image.name


def pairs_to_learn_from(recipe: ConceptsRecipe) -> None:
    """Images with phrases, to learn from and held out."""
    if recipe.data.source != "synthetic":
        phrases_of(recipe, 1, 1)
