# SPDX-License-Identifier: Apache-2.0
"""Embedding store: round trips, named errors, damage, resume."""

import json
import os
import pickle
import resource

import numpy as np
import pytest
import torch

from effsam3.data.store.format import Field, StoreError, create_store, open_manifest
from effsam3.data.store.reader import StoreReader, verify_store
from effsam3.data.store.writer import StoreWriter, finish_store, repair_store

FIELDS = [Field("features", "float16", (8, 5, 5))]
KEYS = [f"sa_{i}" for i in range(10)]


def record(key: str, fields=FIELDS) -> dict[str, np.ndarray]:
    """Values that depend on the key alone."""
    random = np.random.default_rng(list(key.encode()))
    return {f.name: (random.standard_normal(f.shape) * 50).astype(f.dtype) for f in fields}


def make(root, keys=KEYS, fields=FIELDS, finish=True, writer=0, **options):
    create_store(root, fields, {"tap": "trunk", "grid": 5}, expected=len(keys))
    repair_store(root)
    with StoreWriter(root, writer, **options) as out:
        for key in keys:
            if key not in out.done:
                out.write(key, record(key, fields))
    if finish:
        finish_store(root, keys, {"mean": [0.5] * 8})
    return root


def assert_holds(root, keys, fields=FIELDS, **options):
    reader = StoreReader(root, **options)
    found = reader.read(reader.positions(keys))
    assert not verify_store(root).bad
    for i, key in enumerate(keys):
        for name, value in record(key, fields).items():
            np.testing.assert_array_equal(found[name][i].numpy(), value)


@pytest.mark.parametrize("shape", [(3,), (2, 7, 9), (4, 128, 100)])
def test_round_trip_of_all_dtypes(tmp_path, shape):
    fields = [Field(dtype, dtype, shape) for dtype in ("int8", "float16", "uint8", "float32", "int32")]
    fields.append(Field("one", "int32", ()))
    make(tmp_path / "s", fields=fields, shard_bytes=1 << 20)
    manifest = open_manifest(tmp_path / "s")
    assert manifest.payload == int(np.prod(shape)) * 12 + 4
    assert manifest.stride % (4096 if manifest.payload >= 65536 else 64) == 0
    assert 0 <= manifest.stride - manifest.payload < 4096
    assert_holds(tmp_path / "s", KEYS[::-1], fields)
    reader = StoreReader(tmp_path / "s")
    assert len(reader) == 10 and reader.keys == KEYS and reader.missing(["sa_3", "sa_33"]) == ["sa_33"]
    assert reader.positions([]).dtype == np.int64


def test_tensors_are_written_and_read_into_reused_memory(tmp_path):
    create_store(tmp_path, FIELDS, {})
    with StoreWriter(tmp_path, 0) as out:
        for key in KEYS:
            strided = torch.from_numpy(record(key)["features"]).transpose(1, 2).contiguous().transpose(1, 2)
            out.write(key, {"features": strided})
    reader = StoreReader(tmp_path, allow_unfinished=True)
    for positions in ([3, 1, 3, 9], [7, 2]):
        found = reader.read(positions)["features"]
        assert found.shape == (len(positions), 8, 5, 5)
        for row, position in zip(found, positions, strict=True):
            np.testing.assert_array_equal(row, record(KEYS[position])["features"])


def test_shards_roll_over_and_every_writer_counts(tmp_path):
    stride = open_manifest(make(tmp_path, KEYS[:3], finish=False)).stride
    for writer, keys in ((1, KEYS[3:5]), (2, KEYS[5:])):
        make(tmp_path, keys, finish=False, writer=writer, shard_bytes=2 * stride)
    assert len(list(tmp_path.glob("shard-00002-*.bin"))) == 3
    make(tmp_path, [*KEYS, "sa_10", "sa_11"], writer=1, shard_bytes=2 * stride)  # three writers before, now one
    assert_holds(tmp_path, [*KEYS, "sa_10", "sa_11"])
    assert open_manifest(tmp_path).records == 12


def test_positions_are_exact_among_many_keys(tmp_path):
    keys = [f"k{i * 7919}" for i in range(5000)]
    make(tmp_path, keys, [Field("features", "uint8", (2,))])
    reader = StoreReader(tmp_path)
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(reader.positions([keys[i] for i in order]), order)
    with pytest.raises(StoreError, match=r"lacks 2 of 3 keys: k1, k2\. Run `effsam3 embed`"):
        reader.positions(["k1", keys[0], "k2"])


class Records(torch.utils.data.Dataset):
    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, position):
        return self.reader.read([position])["features"][0]


def test_reading_after_pickling_and_in_forked_workers(tmp_path):
    reader = StoreReader(make(tmp_path))
    expected = reader.read(range(10))["features"]
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._files
    torch.testing.assert_close(copy.read(range(10))["features"], expected, rtol=0, atol=0)
    workers = torch.utils.data.DataLoader(Records(reader), 5, num_workers=2, multiprocessing_context="fork")
    torch.testing.assert_close(torch.cat(list(workers)), expected, rtol=0, atol=0)


# ---- manifest


def test_other_settings_are_refused_by_name(tmp_path):
    make(tmp_path)
    with pytest.raises(StoreError) as error:
        create_store(tmp_path, [Field("features", "int8", (8, 5, 5))], {"grid": 6, "teacher": {"revision": "x"}})
    for part in (
        '["features float16[8, 5, 5]"] -> ["features int8[8, 5, 5]"]',
        'description.tap: "trunk" -> absent',
        "description.grid: 5 -> 6",
        'description.teacher.revision: absent -> "x"',
    ):
        assert part in str(error.value)
    assert create_store(tmp_path, FIELDS, {"grid": 5, "tap": "trunk"}).records == 10


def test_missing_malformed_and_newer_manifests_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"no manifest.json.*effsam3 embed"):
        StoreReader(tmp_path)
    manifest = make(tmp_path) / "manifest.json"
    content = json.loads(manifest.read_text())
    for text in ("{", "[]", json.dumps(content | {"surprise": 1}), json.dumps({"format": "effsam3-store"})):
        manifest.write_text(text)
        with pytest.raises(StoreError, match="malformed"):
            StoreReader(tmp_path)
    manifest.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(StoreError, match="not version 1"):
        StoreReader(tmp_path)
    manifest.unlink()
    with pytest.raises(StoreError, match=r"no manifest.json"):
        create_store(tmp_path, FIELDS, {})


@pytest.mark.parametrize("finish", [True, False])
def test_wrong_manifest_is_named_and_never_repaired_with(tmp_path, finish):
    make(tmp_path, finish=finish)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("shard-*")}
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["fields"][0]["shape"] = [8, 5, 4]
    path.write_text(json.dumps(content))
    for use in (lambda: StoreReader(tmp_path, allow_unfinished=True), lambda: repair_store(tmp_path)):
        with pytest.raises(StoreError, match="wrong manifest"):
            use()
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.glob("shard-*")}


def test_unfinished_store_says_how_far_it_is(tmp_path):
    make(tmp_path, finish=False)
    create_store(tmp_path, FIELDS, {"tap": "trunk", "grid": 5}, expected=200)
    with pytest.raises(StoreError, match="10 of 200 records; run `effsam3 embed` again"):
        StoreReader(tmp_path)
    assert len(StoreReader(tmp_path, allow_unfinished=True)) == 10


def test_finish_wants_every_key_and_names_skipped_ones(tmp_path):
    create_store(tmp_path, FIELDS, {})
    with StoreWriter(tmp_path, 0) as out:
        out.write("a", record("a"))
        out.skip("b", "cannot\tbe\nread")
        out.skip("c", "first try")
    with StoreWriter(tmp_path, 1) as out:
        assert len(out.done) == 1 and "a" in out.done
        out.write("c", record("c"))
    with pytest.raises(StoreError, match="2 of 5 keys are neither stored nor skipped: d, e"):
        finish_store(tmp_path, ["a", "b", "c", "d", "e"])
    manifest = finish_store(tmp_path, ["a", "b", "c"], {"mean": [1.0, 2.0]})
    assert manifest.skipped == ({"key": "b", "reason": "cannot be read"},) and manifest.records == 2
    before = (tmp_path / "manifest.json").read_bytes()
    finish_store(tmp_path, ["a", "b", "c"], {"mean": [1.0, 2.0]})
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert open_manifest(tmp_path) == manifest


# ---- writer


def test_a_store_that_grows_keeps_its_statistics_and_tells_replaced_inputs(tmp_path):
    """Keys end in the digest of what the features were made of; another digest is another record."""
    inputs = {"inputs": "xxh3_64 of the image's bytes, at the end of its key"}
    old, new = f"sa_1@{'a' * 16}", f"sa_1@{'b' * 16}"
    create_store(tmp_path, FIELDS, inputs)
    with StoreWriter(tmp_path, 0) as writer:
        writer.write(old, record(old))
    finish_store(tmp_path, [old], {"mean": [1.0]})
    reader = StoreReader(tmp_path)
    with pytest.raises(
        StoreError, match=r"lacks 2 of 2 keys: .* Of 1 of them .* \(replaced since it was made\): sa_1\."
    ):
        reader.positions([new, f"sa_2@{'a' * 16}"])
    create_store(tmp_path, FIELDS, inputs)
    with StoreWriter(tmp_path, 0) as writer:
        assert new not in writer.done
        writer.write(new, record(new))
    assert StoreReader(tmp_path, allow_unfinished=True).missing([new]) == [] and StoreReader(tmp_path).missing([new])
    finish_store(tmp_path, [new], {"mean": [2.0]})
    reader = StoreReader(tmp_path)
    assert reader.manifest.statistics == {"mean": [1.0]} and reader.keys == [old, new]
    for key in (old, new):
        np.testing.assert_array_equal(reader.read(reader.positions([key]))["features"][0], record(key)["features"])


def test_wrong_records_are_refused(tmp_path):
    create_store(tmp_path, FIELDS, {})
    good = record("a")["features"]
    with StoreWriter(tmp_path, 0) as out:
        for bad, words in (
            ({"features": good.astype(np.float32)}, r"float32\[8, 5, 5\].*wants features float16"),
            ({"features": good[:, :4]}, r"float16\[8, 4, 5\]"),
            ({}, "has fields"),
            ({"features": good, "scale": good}, "has fields"),
        ):
            with pytest.raises(StoreError, match=words):
                out.write("a", bad)
        for key in ("", "a\tb", "a\nb", "a\rb", "\udcff"):
            with pytest.raises(StoreError, match="cannot be stored"):
                out.write(key, {"features": good})
        out.write('"quoted, key" of Ünïcode', {"features": good})
        with pytest.raises(StoreError, match="already stored"):
            out.write('"quoted, key" of Ünïcode', {"features": good})
    assert StoreReader(tmp_path, allow_unfinished=True).keys == ['"quoted, key" of Ünïcode']


def test_one_live_process_per_writer(tmp_path):
    create_store(tmp_path, FIELDS, {})
    with StoreWriter(tmp_path, 0) as out:
        out.write("a", record("a"))
        for use in (lambda: StoreWriter(tmp_path, 0), lambda: repair_store(tmp_path)):
            with pytest.raises(StoreError, match="writer 0 is a live process"):
                use()
        StoreWriter(tmp_path, 1).close()
        reader, ready = os.pipe()
        child = os.fork()  # a data worker that lives on must not keep the writer locked
        if not child:
            os.write(ready, b"1")
            os.read(os.pipe()[0], 1)
        os.read(reader, 1)
    try:
        StoreWriter(tmp_path, 0).close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_full_disk_is_named_and_harmless(tmp_path):
    big = [Field("features", "float16", (64, 32, 32))]
    create_store(tmp_path, big, {}, expected=10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = StoreWriter(tmp_path, 0)
    for key in KEYS[:3]:
        out.write(key, record(key, big))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 131072 + 5000, hard))  # the fourth record fits in part
    try:
        with pytest.raises(StoreError, match=r"'sa_3' of 131072 bytes.*7 records to come need.*run the same command"):
            out.write("sa_3", record("sa_3", big))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out.close()
    assert verify_store(tmp_path).checked == 3
    make_rest = StoreWriter(tmp_path, 0)
    assert [key in make_rest.done for key in KEYS] == [True] * 3 + [False] * 7
    for key in KEYS[3:]:
        make_rest.write(key, record(key, big))
    make_rest.close()
    assert_holds(tmp_path, KEYS, big, allow_unfinished=True)


# ---- damage


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


def garbage(path, count):
    with open(path, "ab") as file:
        file.write(np.random.default_rng(count).bytes(count))


def zeros(path, count):
    with open(path, "r+b") as file:
        file.seek(-count, 2)
        file.write(bytes(count))


@pytest.mark.parametrize(
    ("suffix", "harm", "count", "lost"),
    [
        ("tsv", cut, 1, 1),
        ("tsv", cut, 20, 1),
        ("tsv", garbage, 3, 0),
        ("tsv", zeros, 9, 1),
        ("bin", cut, 1, 1),
        ("bin", cut, 448, 1),
        ("bin", cut, 449, 2),
        ("bin", garbage, 1000, 0),
        ("bin", zeros, 9, 1),
        ("bin", zeros, 448 + 9, 2),
    ],
)
def test_torn_tail_is_cut_and_written_again(tmp_path, suffix, harm, count, lost):
    make(tmp_path, finish=False)
    assert (open_manifest(tmp_path).payload, open_manifest(tmp_path).stride) == (400, 448)
    harm(tmp_path / f"shard-00000-0000.{suffix}", count)
    repair_store(tmp_path)
    with StoreWriter(tmp_path, 1) as out:
        assert [key for key in KEYS if key in out.done] == KEYS[: 10 - lost] and len(out.done) == 10 - lost
    make(tmp_path)
    assert_holds(tmp_path, KEYS)
    assert verify_store(tmp_path).checked == 10


def test_journal_line_without_sense_is_cut(tmp_path):
    make(tmp_path, finish=False)
    with open(tmp_path / "shard-00000-0000.tsv", "ab") as file:
        file.write(b"\0\0 lost by a power failure\n")
    garbage(tmp_path / "shard-00000-0000.bin", 448)
    assert repair_store(tmp_path) == {"shard-00000-0000.bin": 1}
    assert_holds(make(tmp_path), KEYS)


def test_journal_cut_anywhere_loses_nothing_before_the_cut(tmp_path):
    original = (make(tmp_path, KEYS[:2], finish=False) / "shard-00000-0000.tsv").read_bytes()
    for size in range(len(original)):
        (tmp_path / "shard-00000-0000.tsv").write_bytes(original[:size])
        repair_store(tmp_path)
        done = max(original[:size].count(b"\n") - 1, 0)
        make(tmp_path, KEYS[:2], finish=False)
        assert (tmp_path / "shard-00000-0000.tsv").read_bytes() == original, (size, done)


def test_flipped_byte_is_found(tmp_path):
    path = make(tmp_path) / "shard-00000-0000.bin"
    data = bytearray(path.read_bytes())
    data[4 * 448 + 17] ^= 1
    path.write_bytes(data)
    report = verify_store(tmp_path)
    assert [(bad.key, bad.reason) for bad in report.bad] == [("sa_4", "wrong checksum")] and report.checked == 9
    for name in ("shard-00000-0000.bin", "shard-00000-0000.tsv"):  # the remedy that the message names
        (tmp_path / name).unlink()
    assert_holds(make(tmp_path), KEYS)


def test_truncated_and_missing_shards_are_named(tmp_path):
    path = make(tmp_path) / "shard-00000-0000.bin"
    reader = StoreReader(tmp_path)
    os.truncate(path, 1000)
    with pytest.raises(StoreError, match=r"truncated shard .*shard-00000-0000.bin: has 1000 of 4432 bytes"):
        StoreReader(tmp_path)
    with pytest.raises(StoreError, match="truncated shard"):
        reader.read([9])
    assert len(verify_store(tmp_path).bad) == 8
    path.unlink()
    with pytest.raises(StoreError, match=r"shard-00000-0000.bin is missing"):
        StoreReader(tmp_path)
    assert len(verify_store(tmp_path).bad) == 10
    cut(tmp_path / "shard-00000-0000.tsv", 1)
    with pytest.raises(StoreError, match=r"truncated journal .* has 9 of 10 lines"):
        StoreReader(tmp_path)


def test_damaged_journal_is_named(tmp_path):
    path = make(tmp_path) / "shard-00000-0000.tsv"
    path.write_bytes(path.read_bytes().replace(b"sa_4\t", b"sa_4 "))
    with pytest.raises(StoreError, match=r"shard-00000-0000.tsv is damaged"):
        StoreReader(tmp_path).keys  # noqa: B018  they are read now
