# SPDX-License-Identifier: Apache-2.0
"""Batches for feature distillation: resized images and, from a store, the teacher's features for them.

Letters: B images of a batch, C channels, G grid rows and columns, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effsam3.data.images.sa1b import read_image
from effsam3.data.loader import new_batch
from effsam3.data.sampler import PADDING
from effsam3.data.statistics import lowest
from effsam3.data.store.key_index import hashes_of, sum_of
from effsam3.data.store.reader import StoreReader, dequantise_int8
from effsam3.data.transforms import Resize, resize_image
from effsam3.data.unreadable import UnreadableImage

BLOCK = 1 << 22  # rows whose hashes are looked at together: 32 MiB


class ImageFeatures(Dataset):
    """Map-style dataset that builds a whole batch at a time from the positions of its images.

    Args:
        index: rows of an SA-1B index, see `sa1b.load_index`; no list is made of them.
        folder: what the rows' files are relative to.
        image_size: S.
        resize: `square` or `longest_side`, see `transforms.resize_image`.
        store: the teacher's features; None gives images only (teacher pass, online teacher).
        tied: whether `record_keys` end in the digest of the image's bytes; with a store, it knows.

    Raises StoreError naming the images that the store has no features of, or only those of another image of that name.
    """

    def __init__(
        self, index, folder: Path, image_size: int, resize: Resize, store: StoreReader | None = None, tied: bool = True
    ):
        self.index, self.folder = index, folder
        self.image_size, self.resize = image_size, resize
        self.store = store
        self.keys: Sequence[str] = index["key"]
        self.tied = tied if store is None else store.manifest.ties_inputs
        self._named = index.select_columns(["key", "image_digest"])
        if store is not None:
            refuse_missing(index, store)
        self.pixels_stored = store is not None and "pixels" in store.names

    def names(self, positions: Sequence[int]) -> list[str]:
        """Return the keys of images."""
        return self._named[positions]["key"]

    def record_keys(self, positions: Sequence[int]) -> list[str]:
        """Return what a store calls images."""
        return store_keys(self._named[positions], self.tied)

    def sample(self, size: int) -> list[int]:
        """Return the positions of up to `size` images, as `statistics_sample` does of all keys."""
        return lowest(codes_of(self.index, "key_code"), size)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, positions: list[int]) -> dict:
        """Return the batch of `positions`, of which `PADDING` ones come out as images without valid pixels.

        Keys of the batch: `pixels` uint8 (B, 3, S, S); `sizes` int64 (B, 2), the valid rows and columns, (0, 0) for
        padding and unreadable images; `positions` int64 (B,); `unreadable`, pairs (key, reason); and the store's
        fields, such as `features`.
        """
        batch: dict[str, Any] = {"positions": torch.tensor(positions), "unreadable": []}
        if self.store is not None:
            # A record is read for padding, too: fixed shapes, and the valid mask keeps it out of everything.
            keys = self.record_keys(np.maximum(positions, 0).tolist())
            # Looked up now: the places of all records would be as long as the index, in every process.
            batch |= self.store.read(self.store.positions(keys))
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


# ---- keys in a store


def store_keys(rows, tied: bool) -> list[str]:
    """Return what a store calls images, of columns by name: `name@digest`, in an untied store only the name."""
    if not tied:
        return list(rows["key"])
    return [f"{key}@{digest}" for key, digest in zip(rows["key"], rows["image_digest"], strict=True)]


def codes_of(index, name: str) -> Iterator[np.ndarray]:
    """Yield one of an index's columns of hashes (`sa1b.CODES`), a block of rows at a time."""
    column = index.select_columns(name).with_format("arrow")
    for start in range(0, len(index), BLOCK):
        yield column[start : start + BLOCK][name].to_numpy()


def _code(tied: bool) -> str:
    return "store_code" if tied else "key_code"


def _hashed(index, tied: bool, hashes: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple[int, str]]:
    """Yield (position, key in a store) of the rows whose code is one of those that `hashes` picks of a block."""
    for number, block_N in enumerate(codes_of(index, _code(tied))):
        if len(chosen := hashes(block_N)):
            rows = (number * BLOCK + np.flatnonzero(np.isin(block_N, chosen))).tolist()
            yield from zip(rows, store_keys(index[rows], tied), strict=True)


def refuse_missing(index, store: StoreReader) -> None:
    """Raise StoreError unless the store has features of every image of an index."""
    # By hashes of the keys, which the index has, too: to make all keys would take a minute and gigabytes.
    total, count = sum_of(codes_of(index, _code(store.manifest.ties_inputs)))
    if store.manifest.whole.get(total) == count:
        return  # it was finished for these very images
    missing = [key for _, key in _hashed(index, store.manifest.ties_inputs, store.absent)]
    if missing:
        raise store.lacking(missing, len(index))


def without(index, keys: Iterable[str], tied: bool):
    """Return an index without the images that a store calls by these keys."""
    from datasets import concatenate_datasets

    left_out = set(keys)
    wanted = hashes_of([key.encode() for key in left_out])
    ends = [row for row, key in _hashed(index, tied, lambda _: wanted) if key in left_out]
    # In stretches, because a list of the rows that stay would be as long as the index.
    stretches = [range(last + 1, stop) for last, stop in pairwise([-1, *ends, len(index)])]
    parts = [index.select(stretch) for stretch in stretches if stretch]
    return concatenate_datasets(parts) if parts else index.select([])


def stored_features(batch: dict) -> Tensor:
    """Return a batch's stored features as float32 (B, C, G, G), whatever the store's payload."""
    if "scale" in batch:
        return dequantise_int8(batch["features"], batch["scale"])
    return batch["features"].float()
