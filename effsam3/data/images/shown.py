# SPDX-License-Identifier: Apache-2.0
"""Batches of images with the masks of objects that are to be shown, drawn from the images' annotations.

Letters: B images of a batch, K objects of an image, L side of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effsam3.data.images.features import ImageFeatures
from effsam3.data.images.pair_batches import resize_mask, solid
from effsam3.data.images.sa1b import mask_of, read_annotations
from effsam3.data.loader import new_batch
from effsam3.data.sampler import PADDING
from effsam3.data.transforms import resized_size
from effsam3.data.unreadable import UnreadableAnnotations


class ShownObjects(Dataset):
    """Map-style dataset of images, with or without features, and for each image the masks of a number of objects.

    Args:
        images: of a split.
        objects: K.
        side: L; the masks are those of the image as the model sees it, resized.
        seed: of which objects are drawn.
    """

    def __init__(self, images: ImageFeatures, objects: int, side: int, seed: int):
        self.images, self.objects, self.side, self.seed = images, objects, side, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> dict:
        """Return the images of `items`, each a (position, number) or only a position, which is its own number.

        The number seeds what is drawn. Besides what `ImageFeatures` gives, keys of the batch are `numbers`, a list,
        and `masks` bool (B, K, L, L). An image with fewer objects shows them several times; a mask is empty where
        there is nothing to show: no annotations, or an object too small to be seen.
        """
        pairs = [item if isinstance(item, tuple) else (item, max(item, 0)) for item in items]
        batch = self.images.__getitems__([position for position, _ in pairs])
        batch["numbers"] = [number for _, number in pairs]
        batch["masks"] = new_batch(len(pairs), self.objects, self.side, self.side, dtype=torch.bool).zero_()
        for place, (position, number) in enumerate(pairs):
            if position == PADDING or not batch["sizes"][place, 0]:
                continue
            row = self.images.index[position]
            try:
                annotations = read_annotations(row, self.images.folder)
            except UnreadableAnnotations as error:
                batch["unreadable"].append((error.key, f"{error.reason}: {error.detail}"))
                continue
            if not annotations:
                continue
            order = np.random.default_rng([self.seed, number]).permutation(len(annotations))
            # Those drawn first once more, where there are fewer objects than are to be shown.
            chosen = [order[slot % len(order)] for slot in range(self.objects)]
            masks = {one: self._mask(annotations[one], row) for one in sorted(set(chosen))}
            for slot, one in enumerate(chosen):
                batch["masks"][place, slot] = masks[one]
        return batch

    def _mask(self, annotation: dict, row: dict) -> Tensor:
        """Return an object's mask as the image is seen, bool (L, L)."""
        size = row["height"], row["width"]
        mask_LL = torch.zeros(self.side, self.side, dtype=torch.bool)
        height, width = resized_size(*size, self.side, self.images.resize)
        mask_LL[:height, :width] = solid(resize_mask(mask_of(annotation, *size), (height, width)))
        return mask_LL
