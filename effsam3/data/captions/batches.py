# SPDX-License-Identifier: Apache-2.0
"""Batches for text distillation: token ids and, from a store, the teacher's features for them.

Letters: B texts of a batch, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effsam3.data.sampler import PADDING
from effsam3.data.statistics import lowest
from effsam3.data.store.format import StoreError
from effsam3.data.store.key_index import blocks, hashes_of
from effsam3.data.store.reader import StoreReader


class CaptionBatches(Dataset):
    """Map-style dataset that builds a whole batch at a time from the positions of its texts.

    Args:
        texts: a part of `captions.Captions`: `len`, `texts(positions)` and `keys(positions)`.
        encode: texts to padded ids (B, L) and their mask, such as `models.tokens.Tokenizer.encode` at a length.
        store: the teacher's features; None when the teacher runs next to the student.
    """

    def __init__(self, texts, encode: Callable[[list[str]], tuple[Tensor, Tensor]], store: StoreReader | None = None):
        self.part, self.encode, self.store = texts, encode, store

    def __len__(self) -> int:
        return len(self.part)

    def names(self, positions: Sequence[int]) -> list[str]:
        """Return the keys of texts."""
        return self.part.keys(positions)

    def record_keys(self, positions: Sequence[int]) -> list[str]:
        """Return what a store calls texts: a key is the text's own hash, so a changed text is another one."""
        return self.part.keys(positions)

    def sample(self, size: int) -> list[int]:
        """Return the positions of up to `size` texts, the same in any order of them."""
        parts = (self.part.keys(some) for some in blocks(len(self)))
        return lowest((hashes_of([key.encode() for key in keys]) for keys in parts), size)

    def __getitems__(self, positions: list[int]) -> dict:
        """Return the batch of `positions`, of which `PADDING` ones come out as texts that count nowhere.

        Keys: `ids` int64 (B, L); `mask` bool (B, L), what the encoders may attend to; `counts` bool (B,), false for
        padding; `unreadable`, always empty (captions are checked when they are opened); and the store's fields.
        """
        # Padding takes the first text's place, so that shapes stay; `counts` leaves it out of the loss.
        kept = np.maximum(positions, 0).tolist()
        ids, mask = self.encode(self.part.texts(kept))
        counts = torch.tensor([position != PADDING for position in positions])
        batch: dict[str, Any] = {"ids": ids, "mask": mask, "counts": counts, "unreadable": []}
        batch["positions"] = torch.tensor(positions)
        if self.store is not None:
            keys = self.part.keys(kept)
            batch |= self.store.read(self.store.positions(keys))
            if other := [
                key for key, same in zip(keys, batch["length"][:, 0] == mask.sum(1), strict=True) if not same
            ]:
                raise StoreError(
                    f"{self.store.root}: {len(other)} of {len(keys)} records have another number of tokens than their "
                    f"text (first: {other[0]}); the store was made with another tokenizer or data.context_length: "
                    "embed again to another embed.to"
                )
        return batch

    def by_length(self, positions: np.ndarray) -> np.ndarray:
        """Order a global batch by the length of its texts, so that micro-batches pad little."""
        # Characters in place of tokens: near enough to sort by, and tokenizing is left to the workers.
        lengths = [len(text) for text in self.part.texts(positions.tolist())]
        return positions[np.argsort(lengths, kind="stable")]


class Chosen:
    """A view of a part: the texts at some of its positions."""

    def __init__(self, part, places: np.ndarray):
        self.part, self.places = part, places

    def __len__(self) -> int:
        return len(self.places)

    def texts(self, positions) -> list[str]:
        """Return the texts at these positions."""
        return self.part.texts(self.places[list(positions)])

    def keys(self, positions) -> list[str]:
        """Their keys."""
        return self.part.keys(self.places[list(positions)])


def distinct(part) -> Chosen:
    """Return every distinct text of a part once, for a store."""
    return Chosen(part, part.distinct())


def valid_tokens(batch: dict, padding_too: bool = False) -> Tensor:
    """Return 1 where a token counts, as the losses want it: float (B, 1, 1, L)."""
    mask_BL = torch.ones_like(batch["mask"]) if padding_too else batch["mask"]
    return (mask_BL & batch["counts"][:, None]).float()[:, None, None]


def as_map(feat_BLC: Tensor) -> Tensor:
    """Turn token features (B, L, C) into a map (B, C, 1, L), for the losses that image features have, too."""
    return feat_BLC.transpose(1, 2)[:, :, None]
