# SPDX-License-Identifier: Apache-2.0
"""Loads whole batches in data worker processes, in the order asked for."""

from __future__ import annotations

from collections.abc import Iterable

from torch.utils.data import DataLoader, Dataset


def loader(dataset: Dataset, batches: Iterable[list[int]], workers: int, pin: bool) -> DataLoader:
    """Yield `dataset.__getitems__(positions)` for every list of positions.

    `workers` processes read ahead, 0 reads in this one; `pin` puts tensors into page-locked memory for a GPU.
    """
    return DataLoader(dataset, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin)


def _as_it_is(batch: dict) -> dict:
    """A batch is already collated: the dataset built it whole."""
    return batch
