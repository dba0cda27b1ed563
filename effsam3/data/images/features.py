# SPDX-License-Identifier: Apache-2.0
"""Batches for feature distillation: resized images and, from a store, the teacher's features for them.

Letters: B images of a batch, C channels, G grid rows and columns, S image side in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effsam3.data.images.sa1b import read_image
from effsam3.data.loader import new_batch
from effsam3.data.sampler import PADDING
from effsam3.data.store.reader import StoreReader, dequantise_int8
from effsam3.data.transforms import Resize, resize_image
from effsam3.data.unreadable import UnreadableImage


class ImageFeatures(Dataset):
    """Map-style dataset that builds a whole batch at a time from the positions of its images.

    Args:
        index: rows of an SA-1B index, a Hugging Face dataset.
        folder: what the rows' files are relative to.
        image_size: S.
        resize: `square` or `longest_side`, see `transforms.resize_image`.
        store: the teacher's features; None gives images only (teacher pass, online teacher).
        tied: whether `store_keys` end in the digest of the image's bytes; with a store, it knows.

    Raises StoreError naming the images that the store has no features of, or only those of another image of that name.
    """

    def __init__(
        self, index, folder: Path, image_size: int, resize: Resize, store: StoreReader | None = None, tied: bool = True
    ):
        self.index, self.folder = index, folder
        self.image_size, self.resize = image_size, resize
        self.store = store
        self.keys: list[str] = list(index["key"])
        self.tied = tied if store is None else store.manifest.ties_inputs
        self.records = None if store is None else store.positions(store_keys(index, self.tied))
        self.pixels_stored = store is not None and "pixels" in store.names

    @functools.cached_property
    def store_keys(self) -> list[str]:
        """What a store calls the images. Made when asked for: a gigabyte for all SA-1B, of no use in training."""
        return store_keys(self.index, self.tied)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, positions: list[int]) -> dict:
        """Return the batch of `positions`, of which `PADDING` ones come out as images without valid pixels.

        Keys of the batch: `pixels` uint8 (B, 3, S, S); `sizes` int64 (B, 2), the valid rows and columns, (0, 0) for
        padding and unreadable images; `positions` int64 (B,); `unreadable`, pairs (key, reason); and the store's
        fields, such as `features`.
        """
        batch: dict[str, Any] = {"positions": torch.tensor(positions), "unreadable": []}
        if self.store is not None and self.records is not None:
            # A record is read for padding, too: fixed shapes, and the valid mask keeps it out of everything.
            batch |= self.store.read(self.records[np.maximum(positions, 0)])
        if self.pixels_stored:
            batch["sizes"] = batch["sizes"].long()
            # Size zero: the valid mask then leaves the whole image out.
            batch["sizes"][batch["positions"] == PADDING] = 0
            return batch
        return batch | read_batch(positions, self.read, self.image_size, self.resize)

    def read(self, position: int) -> np.ndarray:
        """Read an image, uint8 RGB (H, W, 3); raises UnreadableImage."""
        return read_image(self.index[position], self.folder)


def read_batch(
    positions: Sequence[int], read: Callable[[int], np.ndarray], image_size: int, resize: Resize
) -> dict[str, Any]:
    """Return `positions`, `pixels`, `sizes` and `unreadable` of a batch, as `ImageFeatures` has them."""
    batch: dict[str, Any] = {"positions": torch.tensor(positions), "unreadable": []}
    batch["pixels"] = new_batch(len(positions), 3, image_size, image_size, dtype=torch.uint8).zero_()
    batch["sizes"] = torch.zeros(len(positions), 2, dtype=torch.int64)
    for place, position in enumerate(positions):
        if position == PADDING:
            continue
        try:
            image_HW3 = read(position)
        except UnreadableImage as error:
            batch["unreadable"].append((error.key, f"{error.reason}: {error.detail}"))
            continue
        batch["pixels"][place], size = resize_image(image_HW3, image_size, resize)
        batch["sizes"][place] = torch.tensor(size)
    return batch


def store_keys(index, tied: bool) -> list[str]:
    """Return what a store calls the images of an index: `name@digest`, in an untied store only the name."""
    if not tied:
        return list(index["key"])
    return [f"{key}@{digest}" for key, digest in zip(index["key"], index["image_digest"], strict=True)]


def stored_features(batch: dict) -> Tensor:
    """Return a batch's stored features as float32 (B, C, G, G), whatever the store's payload."""
    if "scale" in batch:
        return dequantise_int8(batch["features"], batch["scale"])
    return batch["features"].float()
