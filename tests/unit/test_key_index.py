# SPDX-License-Identifier: Apache-2.0
"""The mapped index of a store's keys against a dict, and that no old or damaged one leads to another's record."""

import pickle
import tracemalloc

import numpy as np
import pyarrow
import pytest

from effsam3.data.store import key_index
from effsam3.data.store.format import Field, StoreError, create_store, open_manifest
from effsam3.data.store.key_index import Hashes, KeyIndex, key_blocks
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store, repair_store

KEYS = [f"sa_{number * 7919}@Ü{number}" for number in range(3000)]
ABSENT = ["", "sa_1", *(f"{key}." for key in KEYS[:500])]


def write(root, keys, shard_bytes=64 * 500):
    """A store whose record of each key holds the key's own number."""
    create_store(root, [Field("features", "int32", (1,))], {})
    repair_store(root)
    with StoreWriter(root, 0, shard_bytes) as out:
        for key in keys:
            if key not in out.done:
                out.write(key, {"features": np.array([KEYS.index(key)], np.int32)})


def made(root, keys=KEYS):
    write(root, keys)
    finish_store(root, keys)
    return root


def some_of(keys):
    """The same a few at a time, as journals give them."""
    return key_blocks(pyarrow.array(keys, "string"))


def index_of(keys):
    return KeyIndex.of(some_of(keys), len(keys))


def index_file(root):
    (file,) = root.glob("keys-*.index")
    return file


def numbers(reader, keys):
    return reader.read(reader.positions(keys))["features"][:, 0].tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made(tmp_path_factory.mktemp("store"))


def test_a_set_of_hashes_holds_what_was_added(monkeypatch):
    monkeypatch.setattr(key_index, "LATEST", 30)
    made = Hashes()
    for count, key in enumerate(KEYS):
        assert key not in made and len(made) == count
        made.add(key)
    assert all(key in made for key in KEYS) and not any(key in made for key in ABSENT)


@pytest.mark.parametrize("bits", [64, 5])
def test_it_finds_what_a_dict_finds(monkeypatch, bits):
    """With five bits a hundred keys share each hash, and only the check tells them apart."""
    strong, mask = key_index.hashes_of, np.uint64(2**bits - 1)
    monkeypatch.setattr(key_index, "hashes_of", lambda keys: strong(keys) & mask)
    monkeypatch.setattr(key_index, "BLOCK", 700)
    index = index_of(KEYS)
    truth = {key: number for number, key in enumerate(KEYS)}
    asked = [*KEYS[::-3], *ABSENT, KEYS[5], KEYS[5]]
    assert index.find(asked).tolist() == [truth.get(key, -1) for key in asked]
    assert index.find([]).dtype == np.int64 and index_of([]).find(["a"]).tolist() == [-1]
    for twice in ([], KEYS[:1], KEYS[-1:], [*KEYS[7:900:3], KEYS[10], KEYS[10]]):
        keys = KEYS + twice
        assert index_of(keys).distinct(some_of(keys)) == len(KEYS)
    assert index_of([]).distinct([]) == 0


def test_making_it_takes_forty_bytes_a_key():
    """Of a hundred million keys a process cannot hold all."""
    count = 200_000
    keys = ([b"%d" % number for number in range(start, start + 500)] for start in range(0, count, 500))
    tracemalloc.start()
    index = KeyIndex.of(keys, count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == count and peak < 45 * count


def test_the_file_serves_without_the_journals_and_as_they_do(store, monkeypatch):
    mapped, asked = StoreReader(store), [*KEYS[::7], *ABSENT]
    assert "arrow_keys" not in vars(mapped) and mapped.keys == KEYS and len(mapped) == len(KEYS)
    copy = pickle.loads(pickle.dumps(mapped))
    monkeypatch.setattr(KeyIndex, "open", lambda *_: None)
    plain = StoreReader(store)
    assert len(plain) == len(KEYS)
    for reader in (mapped, copy):
        assert reader.find(asked).tolist() == plain.find(asked).tolist()
        assert numbers(reader, KEYS[::11]) == list(range(0, len(KEYS), 11))


def test_a_pickled_reader_holds_no_index(store):
    reader = StoreReader(store)
    reader.find(KEYS[:1])
    assert len(pickle.dumps(reader)) < index_file(store).stat().st_size / 5


def test_damage_is_never_another_record(store, tmp_path):
    data, rng = index_file(store).read_bytes(), np.random.default_rng(0)
    root, truth, lost = made(tmp_path), np.arange(len(KEYS)), 0
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 200):
            damaged[place] ^= rng.integers(1, 256)
        index_file(root).write_bytes(damaged)
        found = StoreReader(root).find(KEYS)
        assert ((found == truth) | (found == -1)).all()
        lost += (found == -1).sum()
    assert lost > 1000  # and such keys are reported as missing; embedding again makes the file anew
    index_file(root).write_bytes(data[:-1])
    assert StoreReader(root).find(KEYS).tolist() == truth.tolist()


def test_a_shard_that_is_made_again_in_another_order(tmp_path):
    """As many keys, in journals of the same size: only that writing removes the file tells that it is old."""
    root = made(tmp_path)
    shards = open_manifest(root).shards
    for suffix in (".bin", ".tsv"):  # the remedy for a damaged shard
        (root / shards[1].file).with_suffix(suffix).unlink()
    first = sum(shard.records for shard in shards[:1])
    lost = KEYS[first : first + shards[1].records]
    with pytest.raises(StoreError, match="is missing"):
        StoreReader(root)
    write(root, lost[::-1])  # stopped before it was finished
    assert not list(root.glob("keys-*.index"))
    assert numbers(StoreReader(root, allow_unfinished=True), KEYS[::5]) == list(range(0, len(KEYS), 5))
    finish_store(root, KEYS)
    assert numbers(StoreReader(root), KEYS[::5]) == list(range(0, len(KEYS), 5))


def test_another_journal_makes_it_void(tmp_path):
    root = made(tmp_path)
    (root / "shard-00000-0002.tsv").unlink()
    with pytest.raises(StoreError, match=r"shard-00000-0002\.tsv is missing"):
        StoreReader(root)
