# SPDX-License-Identifier: Apache-2.0
"""The folder trees SA-1B is kept in: all give the same rows; damaged tars are named."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from effsam3.data.images import sa1b
from effsam3.data.images.decoding import decode_image
from effsam3.data.images.index import build_index
from effsam3.data.images.sa1b_folders import scan_tar
from effsam3.data.splits import split_of
from effsam3.data.synthetic.images import make_synthetic_sa1b

PLACE = {"image_file", "image_offset", "annotation_file", "annotation_offset"}


def build(source, out, **options):
    sources = source if isinstance(source, list) else [source]
    return build_index(sources, out, **({"workers": 1, "progress": False} | options))


def rows(out, without=frozenset()):
    return [{name: row[name] for name in row if name not in without} for row in parquet.read_table(out).to_pylist()]


def names(report, reason, section="excluded"):
    found = report[section][reason]
    assert found["count"] == len(found["files"])
    return [Path(name).name for name in found["files"]]


def pack(tar_file, folder, members, prefix=""):
    with tarfile.open(tar_file, "w") as tar:
        for name in members:
            tar.add(folder / name, prefix + name)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sa1b") / "flat"
    make_synthetic_sa1b(folder, 30, side_px=64)
    (folder / "sa_30.json").unlink()
    return folder


@pytest.fixture(scope="module")
def tars(flat):
    folder = flat.parent / "tars"
    folder.mkdir()
    members = sorted(path.name for path in flat.glob("sa_*"))
    pack(folder / "sa_000000.tar", flat, [name for name in members if int(name[3:].split(".")[0]) <= 12], "./")
    pack(folder / "sa_000001.tar", flat, [name for name in members if int(name[3:].split(".")[0]) > 12])
    return folder


def test_every_tree_gives_the_same_rows(flat, tars, tmp_path):
    for path in flat.glob("sa_*"):
        kind = "images" if path.suffix == ".jpg" else "annotations"
        folder = tmp_path / "tree" / kind / split_of(path.stem, 0.1)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    nested = tmp_path / "nested"
    for image in flat.glob("sa_*"):
        (nested / f"sa_00000{image.stem[-1]}").mkdir(parents=True, exist_ok=True)
        (nested / f"sa_00000{image.stem[-1]}" / image.name).write_bytes(image.read_bytes())
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "data").symlink_to(flat)
    (linked / "loop").symlink_to(linked)
    sources = {
        "flat": flat,
        "nested": nested,
        "linked": linked,
        "tree": tmp_path / "tree",
        "tars": tars,
        "each": sorted(tars.iterdir()),
        "twice": [flat, flat, flat.parent / "flat"],
    }
    for name, source in sources.items():
        report = build(source, tmp_path / f"{name}.parquet")
        assert report["images"]["train"] + report["images"]["val"] == 30, name
        assert not report["excluded"], name
    expected = rows(tmp_path / "flat.parquet", PLACE)
    for name in sources:
        assert rows(tmp_path / f"{name}.parquet", PLACE) == expected, name
    assert (tmp_path / "tars.parquet").read_bytes() == (tmp_path / "each.parquet").read_bytes()


def test_members_of_tars_are_read_in_place(flat, tars, tmp_path):
    build(tars, tmp_path / "index.parquet")
    for row in sa1b.load_index(tmp_path / "index.parquet"):
        assert row["image_file"].endswith(".tar") and row["image_offset"] > 0
        extracted = decode_image((flat / f"{row['key']}.jpg").read_bytes())[0]
        np.testing.assert_array_equal(sa1b.read_image(row, tmp_path), extracted)
        if row["annotation_file"]:
            record = json.loads((flat / f"{row['key']}.json").read_text())
            assert sa1b.read_annotations(row, tmp_path) == record["annotations"]


def test_the_trees_folders_decide_the_split(flat, tmp_path):
    for split, numbers in (("train", range(1, 6)), ("val", range(6, 10))):
        for kind, suffix in (("images", ".jpg"), ("annotations", ".json")):
            folder = tmp_path / "tree" / kind / split
            folder.mkdir(parents=True)
            for number in numbers:
                (folder / f"sa_{number}{suffix}").write_bytes((flat / f"sa_{number}{suffix}").read_bytes())
    report = build(tmp_path / "tree", tmp_path / "index.parquet", val_fraction=0)
    assert report["images"] == {"train": 5, "val": 4} and report["without_annotations"] == 0


def test_truncated_compressed_and_corrupt_tars_are_named(flat, tars, tmp_path):
    whole = (tars / "sa_000001.tar").read_bytes()
    members = {Path(name).name: (offset, size) for name, offset, size in scan_tar(tars / "sa_000001.tar").members}
    folder = tmp_path / "data"
    folder.mkdir()
    cut_in = "sa_20.jpg"
    (folder / "cut.tar").write_bytes(whole[: members[cut_in][0] + members[cut_in][1] // 2])
    (folder / "zip.tar.gz").write_bytes(b"\x1f\x8b whatever")
    (folder / "renamed.tar").write_bytes(b"\x1f\x8b whatever")
    (folder / "text.tar").write_text("hello" * 500)
    (folder / "empty.tar").touch()
    report = build(folder, tmp_path / "index.parquet")
    assert {reason: names(report, reason, "tars") for reason in report["tars"]} == {
        "compressed": ["renamed.tar", "zip.tar.gz"],
        "corrupt": ["empty.tar", "text.tar"],
        "truncated": ["cut.tar"],
    }
    assert [name.split(":")[1] for name in names(report, "truncated")] == [cut_in]
    before = {name.split(".")[0] for name, (offset, _) in members.items() if offset < members[cut_in][0]}
    assert {row["key"] for row in rows(tmp_path / "index.parquet")} == before - {"sa_20"}


@pytest.mark.parametrize("where", ["in a header", "between members", "without an end"])
def test_a_tar_cut_anywhere_keeps_its_whole_members(tars, tmp_path, where):
    whole = scan_tar(tars / "sa_000001.tar")
    assert not whole.problem
    data = (tars / "sa_000001.tar").read_bytes()
    header = whole.members[4][1] - 512  # in ustar, right before the data
    last = whole.members[-1]
    end = {
        "in a header": header + 100,
        "between members": header,
        "without an end": last[1] + -(-last[2] // 512) * 512,
    }
    (tmp_path / "cut.tar").write_bytes(data[: end[where]])
    scan = scan_tar(tmp_path / "cut.tar")
    assert scan.problem == "truncated" and not scan.cut
    assert scan.members == (whole.members if where == "without an end" else whole.members[:4])
