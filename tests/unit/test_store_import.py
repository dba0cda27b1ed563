# SPDX-License-Identifier: Apache-2.0
"""Import of upstream's shards, written here in their exact form, and the command `effsam3 store`."""

import os

import numpy as np
import pytest

from effsam3.cli import main
from effsam3.data.store.format import Field, StoreError, create_store
from effsam3.data.store.importing import import_upstream
from effsam3.data.store.reader import StoreReader, verify_store
from effsam3.data.store.writer import StoreWriter, finish_store


def write_upstream(folder, shape, ranks):
    """Files exactly as upstream's exporter leaves them; returns the value that counts for every key."""
    folder.mkdir()
    expected, random = {}, np.random.default_rng(0)
    for rank, keys in enumerate(ranks):
        with open(folder / f"rank{rank}-values.bin", "wb") as file:
            for key in keys:
                value = random.standard_normal(shape).astype("<f2")
                expected.setdefault(key, value)
                file.write(np.int32(random.integers(2**31 - 1)).tobytes() + value.tobytes())
        (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
    return expected


@pytest.mark.parametrize("shape", [(1024, 72, 72), (256, 64, 64), (16, 256)])
def test_import_reads_upstream_shards_in_place(tmp_path, shape):
    ranks = [["sa_7", "sa_3"], ["sa_9", "sa_7"]]  # the sampler repeats sa_7 to pad rank 1
    expected = write_upstream(tmp_path / "up", shape, ranks)
    lines = []
    manifest = import_upstream(tmp_path / "up", tmp_path / "s", report=lines.append)
    assert manifest.records == 3 and manifest.fields[0].shape == shape
    assert any("1 records repeat a key" in line for line in lines)
    assert any("ImageNet-normalised" in line for line in lines) == (len(shape) == 3)
    reader = StoreReader(tmp_path / "s")
    assert reader.keys == ["sa_7", "sa_3", "sa_9"]
    name = manifest.fields[0].name
    found = reader.read(reader.positions(list(expected)))[name].numpy()
    np.testing.assert_array_equal(found, np.stack(list(expected.values())))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["manifest.json"]
    assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) < 100_000
    report = verify_store(tmp_path / "s")
    assert (report.checked, report.unchecked, report.bad) == (0, 4, [])
    with pytest.raises(StoreError, match="already holds a store"):
        import_upstream(tmp_path / "up", tmp_path / "s")
    if len(shape) == 3:
        values = np.stack([expected[key] for key in ("sa_7", "sa_3", "sa_9")]).astype(np.float64)
        np.testing.assert_allclose(manifest.statistics["mean"], values.mean((0, 2, 3)), atol=1e-6)
        np.testing.assert_allclose(manifest.statistics["deviation"], values.std((0, 2, 3)), atol=1e-6)
        assert manifest.description["resize"] == "longest_side" and manifest.description["grid"] == shape[-1]


def test_import_of_torn_files(tmp_path):
    source = tmp_path / "up"
    expected = write_upstream(source, (16, 256), [["a", "b"], ["c", "d"]])
    values = source / "rank0-values.bin"
    whole = values.read_bytes()
    lines = []
    values.write_bytes(whole + whole[:100])
    import_upstream(source, tmp_path / "s", report=lines.append)
    assert "2 whole records of 8196 bytes (tokens float16[16, 256]) and 100 bytes more, 2 keys" in lines[0]
    assert set(StoreReader(tmp_path / "s").keys) == set(expected)
    for content, keys, words in (
        (whole[:-1], "a\nb\n", "1 whole records of 8196 bytes.*8195 bytes more, 2 keys: the file is cut"),
        (whole, "", "2 whole records.*0 keys: this export was killed"),
        (whole, None, "no rank0-keys.txt next to it"),
    ):
        values.write_bytes(content)
        (source / "rank0-keys.txt").unlink()
        if keys is not None:
            (source / "rank0-keys.txt").write_text(keys)
        with pytest.raises(StoreError, match=words):
            import_upstream(source, tmp_path / "t")
        assert not (tmp_path / "t").exists()
    (source / "rank0-keys.txt").write_text("a\nb\n")
    os.truncate(source / "rank1-values.bin", 100)
    with pytest.raises(StoreError, match=r"truncated shard .*rank1-values.bin: has 100 of 16392 bytes"):
        StoreReader(tmp_path / "s")
    with pytest.raises(StoreError, match="holds no rank"):
        import_upstream(tmp_path / "s", tmp_path / "t")


def test_command(tmp_path, capsys):
    keys = [f"sa_{i}" for i in range(10)]
    create_store(tmp_path / "s", [Field("features", "float16", (8, 5, 5))], {"tap": "trunk"})
    with StoreWriter(tmp_path / "s", 0) as out:
        for i, key in enumerate(keys[:9]):
            out.write(key, {"features": np.full((8, 5, 5), i, np.float16)})
        out.skip("sa_9", "cut short")
    finish_store(tmp_path / "s", keys, {"mean": [0.5] * 8})
    path = tmp_path / "s" / "shard-00000-0000.bin"
    assert main(["store", "show", str(tmp_path / "s")]) == 0
    text = capsys.readouterr().out
    for part in ("finished", "records    9", "float16", "8 x 5 x 5", "400", "tap", "trunk", "mean", "sa_9: cut short"):
        assert part in text
    assert main(["store", "verify", str(tmp_path / "s")]) == 0
    assert "9 of 9 records have the right checksum" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[::-1])
    assert main(["store", "verify", str(tmp_path / "s")]) == 1
    assert "sa_0 in shard-00000-0000.bin: wrong checksum" in capsys.readouterr().out

    expected = write_upstream(tmp_path / "up", (6, 3, 3), [["a"]])
    assert main(["store", "import", str(tmp_path / "up"), str(tmp_path / "t")]) == 2
    assert "--channels and --grid" in capsys.readouterr().err
    assert main(["store", "import", str(tmp_path / "up"), str(tmp_path / "t"), "--channels", "6", "--grid", "3"]) == 0
    text = capsys.readouterr().out
    assert "ImageNet-normalised" in text and "6 x 3 x 3" in text
    np.testing.assert_array_equal(StoreReader(tmp_path / "t").read([0])["features"][0], expected["a"])
