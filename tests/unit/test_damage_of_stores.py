# SPDX-License-Identifier: Apache-2.0
"""A store's manifest and an accelerate config, damaged at random: an error with the file's name, or its content."""

import shutil

import numpy as np
import torch
from mutations import mutate_bytes, mutate_json

from effsam3.data.store.format import Field, create_store
from effsam3.data.store.reader import StoreReader, verify_store
from effsam3.data.store.writer import StoreWriter, finish_store
from effsam3.errors import UserError
from effsam3.hardware.accelerate_configs import config_file, read_config

MUTATIONS = 200
KEYS = [f"sa_{number}" for number in range(4)]


def test_manifests(tmp_path):
    root = tmp_path / "store"
    create_store(root, [Field("features", "float16", (2, 3))], {"tap": "trunk", "grid": 3}, expected=len(KEYS))
    with StoreWriter(root, 0) as writer:
        for number, key in enumerate(KEYS):
            writer.write(key, {"features": np.full((2, 3), number, np.float16)})
    finish_store(root, KEYS, {"mean": [0.5, 0.5]})
    rng, path = np.random.default_rng(5), root / "manifest.json"
    whole, refused = path.read_bytes(), 0
    wanted = StoreReader(root).read(np.arange(len(KEYS)))["features"]
    for _ in range(MUTATIONS):
        path.write_bytes(mutate_json(whole, rng))
        try:
            store = StoreReader(root, allow_unfinished=True)
            found = store.read(store.positions(KEYS))
            if verify_store(root).bad:
                refused += 1
                continue
        except UserError as error:
            assert str(root) in str(error)
            refused += 1
            continue
        (features,) = found.values()  # a damaged name is another name of the same bytes
        assert torch.equal(features, wanted)
    assert refused > MUTATIONS / 10


def test_accelerate_configs(tmp_path):
    path = shutil.copy(config_file("zero2_cpu"), tmp_path / "config.yaml")
    rng, whole, refused = np.random.default_rng(6), path.read_bytes(), 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate_bytes(whole, rng))
        try:
            assert read_config(path).processes > 0 and read_config(path).on_cpu in (True, False)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > MUTATIONS / 10
