# SPDX-License-Identifier: Apache-2.0
"""Images and the store's features of them, matched by key and digest."""

import numpy as np
import pytest
import torch
import xxhash
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from effsam3.data.images.features import ImageFeatures, store_keys
from effsam3.data.loader import loader
from effsam3.data.store.format import INPUTS, Field, StoreError, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store

KEYS, DIGESTS = ["2023/a.jpg", "a.jpg", "b@2.jpg"], [f"{number:016x}" for number in (7, 8, 9)]


def index_of(digests: list[str]) -> Dataset:
    """Rows with what `sa1b.load_index` gives them."""
    codes = {
        "key_code": [xxhash.xxh3_64_intdigest(key.encode()) for key in KEYS],
        "store_code": [
            xxhash.xxh3_64_intdigest(f"{key}@{of}".encode()) for key, of in zip(KEYS, digests, strict=True)
        ],
    }
    hashed = {name: np.array(some, np.uint64) for name, some in codes.items()}
    return Dataset.from_dict({"key": KEYS, "image_digest": digests} | hashed)


INDEX = index_of(DIGESTS)


@pytest.fixture
def store(tmp_path) -> StoreReader:
    """Records in another order than the index, whose features are 2, 1, 0."""
    create_store(tmp_path, [Field("features", "float16", (1, 2, 2))], {INPUTS: "digests"})
    stored = [f"{key}@{digest}" for key, digest in zip(KEYS, DIGESTS, strict=True)][::-1]
    with StoreWriter(tmp_path, 0) as writer:
        for number, key in enumerate(stored):
            writer.write(key, {"features": np.full((1, 2, 2), number, np.float16)})
    finish_store(tmp_path, stored)
    return StoreReader(tmp_path)


def test_training_finds_each_record_and_keeps_no_list_of_long_keys(tmp_path, store):
    """Of eleven million images the list is a gigabyte in every process, beside the records' positions."""
    dataset = ImageFeatures(INDEX, tmp_path, 16, "square", store)
    found = store.read(store.positions(store_keys(dataset.index, tied=True)))["features"]
    assert torch.equal(found[:, 0, 0, 0], torch.tensor([2.0, 1.0, 0.0], dtype=torch.float16))
    assert not [name for name, value in vars(dataset).items() if isinstance(value, list)]
    expected = [f"{key}@{digest}" for key, digest in zip(KEYS, DIGESTS, strict=True)]
    assert dataset.record_keys(range(len(KEYS))) == expected


def test_another_digest_is_another_image(tmp_path, store):
    other = index_of([DIGESTS[1], *DIGESTS[1:]])
    with pytest.raises(StoreError, match="lacks 1 of 3 keys.*under the same name.*2023/a.jpg"):
        ImageFeatures(other, tmp_path, 16, "square", store)


def test_a_store_that_ties_nothing_goes_by_names(tmp_path):
    assert ImageFeatures(INDEX, tmp_path, 16, "square", tied=False).record_keys(range(len(KEYS))) == KEYS


@pytest.mark.parametrize("workers", [0, 1])
def test_data_workers_read_into_the_memory_that_they_hand_over(store, workers):
    class Records(TorchDataset):
        def __getitems__(self, positions):
            batch = store.read(positions)
            return batch | {"shared": batch["features"].is_shared()}

    order = [[2, 0, 0], [1]]
    batches = list(loader(Records(), order, workers, pin=False))
    assert [batch["shared"] for batch in batches] == [bool(workers)] * 2
    assert [batch["features"][:, 0, 1, 1].tolist() for batch in batches] == [[2.0, 0.0, 0.0], [1.0]]
