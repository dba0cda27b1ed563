# SPDX-License-Identifier: Apache-2.0
"""Batches of images with masks: which objects are shown, or which phrase is asked for, is drawn by a number.

Letters: B images of a batch, N slots for objects, S side of the square images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from effsam3.data.images.pairs import Pair
from effsam3.data.loader import new_batch
from effsam3.data.sampler import PADDING
from effsam3.data.splits import SPLITS, split_code
from effsam3.data.transforms import resize_image
from effsam3.data.unreadable import Unreadable

MOST_INSTANCES = 100  # of a phrase: half of SAM 3's queries


class Named(Protocol):
    """An image, or whatever is held out by its name."""

    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=Named)


def divide(pairs: Sequence[NamedT], held_out: float) -> dict[str, list[NamedT]]:
    """Divide images into `train` and `val`: by a hash of their names, and exactly in these shares.

    Data sets of one's own are small: by a threshold, as large ones are divided, a dozen images could leave none.
    """
    ordered = sorted(pairs, key=lambda pair: split_code(pair.name))
    count = max(1, round(len(ordered) * held_out))
    parts = (ordered[count:], ordered[:count])
    return {split: sorted(part, key=lambda pair: pair.name) for split, part in zip(SPLITS, parts, strict=True)}


class PairBatches(Dataset):
    """Map-style dataset that builds a whole batch at a time.

    Args:
        pairs: the images.
        image_size: S; the whole image is resized to S x S, whatever its shape.
        objects: the most objects that are shown on an image.
        text: share of the images that are asked for a phrase instead.
        absent: share of these whose phrase is of a category that they do not have.
        phrase: asked for instead of the names of categories: it means all objects.
        categories: of the whole data set, of which absent ones are drawn.
        views: names of all views, none without.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        image_size: int,
        objects: int,
        text: float = 0.0,
        absent: float = 0.0,
        phrase: str | None = None,
        categories: Sequence[str] = (),
        views: Sequence[str] = (),
        seed: int = 0,
    ):
        self.pairs, self.image_size, self.objects, self.seed = pairs, image_size, objects, seed
        self.text, self.absent, self.phrase = text, absent, phrase
        self.categories, self.views = list(categories), list(views)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> dict:
        """Return the images of `items`, each a (position, number) or only a position, which is its own number.

        The number seeds what is drawn. Images that cannot be read, and `PADDING`, come out without objects.

        Keys of the batch: `pixels` uint8 (B, 3, S, S); `masks` uint8 (B, N, S, S), 0 to 255: thin objects fade where
        they get smaller than a pixel; `valid` bool (B, N), which slots hold an object; `views` int64 (B,); lists
        `texts` (None where objects are shown), `keys` and `numbers`; `unreadable`, pairs (key, reason).
        """
        batch: dict[str, Any] = {"texts": [], "keys": [], "numbers": [], "unreadable": []}
        side = self.image_size
        batch["pixels"] = new_batch(len(items), 3, side, side, dtype=torch.uint8).zero_()
        batch["views"] = torch.zeros(len(items), dtype=torch.int64)
        drawn: list[list[Tensor]] = []
        for place, item in enumerate(items):
            position, number = item if isinstance(item, tuple) else (item, max(item, 0))
            text: str | None = None
            masks: list[Tensor] = []
            key = "" if position == PADDING else self.pairs[position].name
            if position != PADDING:
                pair = self.pairs[position]
                if self.views:
                    batch["views"][place] = self.views.index(pair.view)
                try:
                    pixels, text, masks = self._sample(pair, np.random.default_rng([self.seed, number]))
                    batch["pixels"][place] = pixels
                except Unreadable as error:
                    batch["unreadable"].append((error.key, f"{error.reason}: {error.detail}"))
            drawn.append(masks)
            for name, value in (("texts", text), ("keys", key), ("numbers", number)):
                batch[name].append(value)
        slots = max(1, *(len(masks) for masks in drawn))
        batch["masks"] = new_batch(len(items), slots, side, side, dtype=torch.uint8).zero_()
        batch["valid"] = torch.zeros(len(items), slots, dtype=torch.bool)
        for place, masks in enumerate(drawn):
            for slot, mask_SS in enumerate(masks):
                batch["masks"][place, slot], batch["valid"][place, slot] = mask_SS, True
        return batch

    def _sample(self, pair: Pair, rng: np.random.Generator) -> tuple[Tensor, str | None, list[Tensor]]:
        """Return an image, the phrase (None: objects are shown) and masks; raises Unreadable."""
        image_HW3 = pair.image()
        found = pair.masks(*image_HW3.shape[:2])
        text = None
        if rng.random() < self.text:
            text, found = self._ask(found, rng)
        if text is None:
            chosen = rng.permutation(len(found))[: self.objects]
            found = [found[place] for place in sorted(chosen)]
        masks = [resize_mask(mask_HW, (self.image_size, self.image_size)) for _, mask_HW in found[:MOST_INSTANCES]]
        return resize_image(image_HW3, self.image_size, "square")[0], text, [mask for mask in masks if mask.any()]

    def _ask(self, found: list, rng: np.random.Generator) -> tuple[str | None, list]:
        """Draw a phrase and return what it means here; None where nothing can be asked for."""
        here = sorted({category for category, _ in found if category})
        elsewhere = [category for category in self.categories if category not in here]
        wants_absent = rng.random() < self.absent or not found
        if self.phrase is not None:
            return self.phrase, found
        if wants_absent and elsewhere:
            return elsewhere[rng.integers(len(elsewhere))], []
        if not here:  # nothing to call them by; where nothing is shown either, they teach nothing
            return None, found if self.text < 1 else []
        text = here[rng.integers(len(here))]
        return text, [one for one in found if one[0] == text]


def resize_mask(mask_HW: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize a boolean mask to (rows, columns) as its image is, uint8, 0 to 255 by how much of a pixel it covers."""
    mask_1HW = torch.from_numpy(mask_HW.astype(np.uint8) * 255)[None]
    return functional.resize(mask_1HW, list(size), antialias=True)[0]


def solid(mask_HW: Tensor) -> Tensor:
    """Return where a mask of 0 to 255 covers half of a pixel, or at all if nowhere does."""
    half_HW = mask_HW >= 128
    return half_HW if half_HW.any() else mask_HW > 0
