# SPDX-License-Identifier: Apache-2.0
"""Batches of images with several phrases each and the instances of every phrase, for training through the heads.

Letters: B images of a batch, K phrases of an image, R = B K phrases, N slots for instances, M side of the masks, S
side of the square images in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effsam3.data import coco
from effsam3.data.concepts.asking import Asked, AskedImage, Asking, Choice
from effsam3.data.concepts.files import open_concepts
from effsam3.data.concepts.pairs import ConceptObject, ConceptPair, Limits, Subset, phrase_of
from effsam3.data.images.features import read_batch
from effsam3.data.images.pair_batches import resize_mask
from effsam3.data.loader import new_batch
from effsam3.data.problems import Note
from effsam3.data.sampler import PADDING
from effsam3.errors import UserError


class Images(Protocol):
    """Images by their position, such as `ImageFeatures`, with or without the teacher's features of them."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the images."""

    def __getitems__(self, positions: list[int]) -> dict:
        """Return `positions`, `pixels`, `sizes` and `unreadable` of a batch as `ImageFeatures` does."""


class AnnotatedImages:
    """The images of annotated concepts, from the folders of their files."""

    def __init__(self, images: Sequence[AskedImage], image_size: int):
        self.images, self.image_size = images, image_size
        self.keys = [image.name for image in images]

    def __getitems__(self, positions: list[int]) -> dict:
        return read_batch(positions, self._read, self.image_size, "square")

    def _read(self, position: int) -> np.ndarray:
        image = self.images[position]
        return image.subset.read_image(image.name, image.size)


class ConceptPhrases(Dataset):
    """Map-style dataset that builds a whole batch at a time.

    Args:
        images: what is looked at.
        ask: draws the phrases of the image at a position, each with its pair; None: it is not there.
        phrases: K.
        mask_side: M.
        seed: of everything that is drawn.
        annotated: False where nobody knows what is there: the phrases are for a teacher to answer.
        notes: what was left out or repaired when the data were read.
    """

    def __init__(
        self,
        images: Images,
        ask: Callable[[int, np.random.Generator], list[Asked]],
        phrases: int,
        mask_side: int,
        seed: int = 0,
        annotated: bool = True,
        notes: Sequence[Note] = (),
    ):
        self.images, self.ask, self.phrases, self.mask_side, self.seed = images, ask, phrases, mask_side, seed
        self.annotated, self.notes, self.keys = annotated, list(notes), images.keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> dict:
        """Return the images of `items`, each a (position, number) or only a position, which is its own number.

        The number seeds which phrases are asked. Of `PADDING` they are blank, and of images that cannot be read as
        they would be; `sizes` tells both, and neither has annotations.

        Keys of the batch, besides those of `images`: `phrases`, a list of R texts; `counted` bool (R,), False for
        blank ones, of padding and in place of those that an image lacks; `image_R` int64 (R,), the place of each
        one's image; `boxes` float32 (R, N, 4), x1 y1 x2 y2 in 0..1; `masks` uint8 (R, N, M, M), 0 to 255 by how
        much of a pixel they cover; `valid` bool (R, N), which slots hold an instance; `annotated` bool (R,), whether
        the instances are known.
        """
        numbered = [item if isinstance(item, tuple) else (item, max(item, 0)) for item in items]
        batch: dict[str, Any] = self.images.__getitems__([position for position, _ in numbered])
        asked: list[Asked] = []
        counted: list[bool] = []
        for position, number in numbered:
            # Not ending in 0: numpy takes [1] and [1, 0] for the same seed.
            rng = np.random.default_rng([self.seed, number, 1])
            drawn = [] if position == PADDING else self.ask(position, rng)
            counted += [place < len(drawn) for place in range(self.phrases)]
            asked += drawn + [("", None)] * (self.phrases - len(drawn))
        image_R, counted_R = torch.arange(len(items)).repeat_interleave(self.phrases), torch.tensor(counted)
        known_R = (batch["sizes"][:, 0] > 0)[image_R] & counted_R & self.annotated
        found = [
            instances_of(pair) if pair is not None and known else []
            for (_, pair), known in zip(asked, known_R.tolist(), strict=True)
        ]
        rows, slots, side = len(asked), max(1, *map(len, found)), self.mask_side
        boxes, valid = torch.zeros(rows, slots, 4), torch.zeros(rows, slots, dtype=torch.bool)
        masks = new_batch(rows, slots, side, side, dtype=torch.uint8).zero_()
        for row, ((_, pair), own) in enumerate(zip(asked, found, strict=True)):
            for slot, instance in enumerate(own):
                assert pair is not None  # it has instances
                boxes[row, slot], masks[row, slot] = self._box_and_mask(instance, pair.size)
                valid[row, slot] = True
        return batch | {
            "phrases": [phrase for phrase, _ in asked],
            "counted": counted_R,
            "image_R": image_R,
            "boxes": boxes,
            "masks": masks,
            "valid": valid,
            "annotated": known_R,
        }

    def _box_and_mask(self, instance: ConceptObject, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        height, width = size
        x, y, across, down = instance.box
        corners = torch.tensor([x / width, y / height, (x + across) / width, (y + down) / height])
        return corners.clamp(0, 1), resize_mask(coco.decode(instance.rle, *size), (self.mask_side, self.mask_side))


def instances_of(pair: ConceptPair) -> list[ConceptObject]:
    """Return a pair's instances by the first annotator who sees it as most do."""
    return next(own for own in pair.objects if bool(own) == pair.there)


# ---- from files


def open_asked(
    path: Path, folders: Sequence[Path], refuse: Callable[[str], str], objects: int, key: str
) -> tuple[list[AskedImage], list[Note]]:
    """Read annotated concepts (SA-Co, COCO, LVIS, RefCOCO; a file or a folder of them) for training.

    Args:
        folders: of the images; none: the files' own.
        refuse: why a phrase cannot be asked, "" if it can.
        objects: phrases with more instances are left out, as nobody could find them all.
        key: of the recipe, that named the path.

    Returns:
        The images that something can be learned from, each once, and what was left out or repaired.

    Raises:
        UserError: there is no such file, a file is none of the known formats, or nothing of it can be used.
    """
    limits = Limits(refuse=refuse, objects=objects, absent=0)  # absent categories are listed here, not as pairs
    subsets = open_concepts(path, folders, limits, key)
    found: dict[tuple[str, ...], AskedImage] = {}
    for subset in subsets:
        for image in _images_of(subset, objects):
            # A file that several subsets ask about is one image: what one marks is no negative of another's.
            place = (*map(str, subset.folders), image.name)
            found[place] = _joined(found[place], image) if place in found else image
    notes = [note for subset in subsets for note in subset.notes]
    usable = [image for image in found.values() if image.asked]
    notes += [
        Note("no_pairs", image.name, "no phrase of it can be asked") for image in found.values() if not image.asked
    ]
    if not usable:
        raise UserError(f"{key}: no image of {path} has a phrase that can be learned from. {_first(notes)}")
    return usable, notes


def annotated_phrases(
    images: Sequence[AskedImage],
    choice: Choice,
    image_size: int,
    mask_side: int,
    seed: int = 0,
    all_images: Sequence[AskedImage] | None = None,
    notes: Sequence[Note] = (),
) -> ConceptPhrases:
    """Return the data set of images with annotated phrases; negatives are drawn from those of `all_images`."""
    ask = partial(_ask_known, Asking(all_images or images, choice), images)
    return ConceptPhrases(AnnotatedImages(images, image_size), ask, choice.phrases, mask_side, seed, notes=notes)


def listed_phrases(
    images: Images, phrases: Sequence[str], count: int, mask_side: int, seed: int = 0, notes: Sequence[Note] = ()
) -> ConceptPhrases:
    """Return the data set of any images, each asked for `count` of `phrases` by chance: only a teacher can answer."""
    ask = partial(_ask_any, phrases, count)
    return ConceptPhrases(images, ask, count, mask_side, seed, annotated=False, notes=notes)


# Functions of the module, as worker processes may have to be sent them.
def _ask_known(asking: Asking, images: Sequence[AskedImage], position: int, rng: np.random.Generator) -> list[Asked]:
    return asking.draw(images[position], rng)


def _ask_any(phrases: Sequence[str], count: int, position: int, rng: np.random.Generator) -> list[Asked]:
    return [(phrases[place], None) for place in rng.choice(len(phrases), count, replace=False)]


def read_phrases(path: Path, refuse: Callable[[str], str], least: int, key: str) -> tuple[list[str], list[Note]]:
    """Read a text file of phrases, one a line; blank lines and repeated phrases are left out.

    Raises:
        UserError: it cannot be read, or fewer than `least` phrases can be asked.
    """
    notes: list[Note] = []
    found: dict[str, None] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); expected is a text file, a phrase a line") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found[phrase_of(line, Limits(refuse=refuse))] = None
        except coco.Malformed as fault:
            notes.append(Note(fault.reason, f"{path.name}, line {number}", str(fault)))
    if len(found) < least:
        raise UserError(f"{key}: {path} has {len(found)} phrases, {least} are asked of an image. {_first(notes)}")
    return list(found), notes


def _images_of(subset: Subset, objects: int) -> list[AskedImage]:
    by_name = subset.images()
    if subset.looked is None:
        return [_asked(subset, name, pairs[0].size, pairs, objects) for name, pairs in by_name.items()]
    found: dict[str, AskedImage] = {}
    categories, families = subset.categories or {}, subset.looked.families
    for number, (name, size) in subset.looked.images.items():
        image = _asked(subset, name, size, by_name.get(name, []), objects)
        absent = sorted(subset.looked.absent(number))
        near = {families.get(pair.category) for pair in image.present if pair.category is not None} - {None}
        image.absent = [categories[one] for one in absent]
        # LVIS has no families: what was looked for on an image was chosen to be hard.
        image.hard = [categories[one] for one in absent if subset.federated or families.get(one) in near]
        found[name] = _joined(found[name], image) if name in found else image
    return list(found.values())


def _asked(subset: Subset, name: str, size: tuple[int, int], pairs: list[ConceptPair], objects: int) -> AskedImage:
    """Sort an image's pairs: to be asked, not there, or perhaps there."""
    image = AskedImage(name, size, subset, [], [], [], [], free=subset.categories is None)
    for pair in pairs:
        if pair.there and pair.exhaustive and len(instances_of(pair)) <= objects:
            image.present.append(pair)
        elif pair.exhaustive and not pair.marked:
            image.absent.append(pair.phrase)
        else:
            image.other.append(pair.phrase)
    image.hard = list(image.absent)
    return image


def _joined(one: AskedImage, other: AskedImage) -> AskedImage:
    """Return what two subsets, or two entries of one, know of an image together."""
    asked = {pair.phrase for pair in one.present}
    present = [*one.present, *(pair for pair in other.present if pair.phrase not in asked)]
    unclear = [*one.other, *other.other]
    there = {pair.phrase for pair in present} | set(unclear)
    absent, hard = (
        [phrase for phrase in dict.fromkeys((*first, *second)) if phrase not in there]
        for first, second in ((one.absent, other.absent), (one.hard, other.hard))
    )
    return replace(one, present=present, absent=absent, hard=hard, other=unclear, free=one.free and other.free)


def _first(notes: Sequence[Note]) -> str:
    return "; ".join(f"{note.where}: {note.reason} ({note.detail})" for note in notes[:1])
