# SPDX-License-Identifier: Apache-2.0
"""Building the index: rows that say what the files are, every bad file named, a killed run that resumes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from effsam3.data import indexing
from effsam3.data.images import index as index_sa1b
from effsam3.data.images import sa1b
from effsam3.data.images.decoding import ORIENTATION
from effsam3.data.images.index import build_index, summary
from effsam3.data.indexing import write_parquet
from effsam3.data.splits import split_of
from effsam3.data.synthetic.images import make_synthetic_sa1b, sa1b_record
from effsam3.data.unreadable import UnreadableImage
from effsam3.data.workers import worker_pool
from effsam3.errors import UserError

ROOT = Path(__file__).parents[2]


def build(source, out, **options):
    sources = source if isinstance(source, list) else [source]
    return build_index(sources, out, **({"workers": 1, "progress": False} | options))


def rows(out):
    return parquet.read_table(out).to_pylist()


def names(report, reason, section="excluded"):
    found = report[section][reason]
    assert found["count"] == len(found["files"])
    return [Path(name).name for name in found["files"]]


def save(path, pixels, **options):
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sa1b") / "flat"
    make_synthetic_sa1b(folder, 30, side_px=64)
    (folder / "sa_30.json").unlink()
    return folder


def test_rows_say_what_the_files_are(flat, tmp_path):
    report = build(flat, tmp_path / "index.parquet", val_fraction=0.3)
    table = rows(tmp_path / "index.parquet")
    assert [row["key"] for row in table] == sorted(f"sa_{n}" for n in range(1, 31))
    assert parquet.read_schema(tmp_path / "index.parquet").names == list(sa1b.COLUMNS)
    masks = 0
    for row in table:
        image = flat / f"{row['key']}.jpg"
        assert (tmp_path / row["image_file"]).resolve() == image.resolve() and "\\" not in row["image_file"]
        assert row["image_offset"] == 0 and row["image_bytes"] == image.stat().st_size
        assert (row["width"], row["height"]) == Image.open(image).size and row["converted"] == ""
        assert row["split"] == split_of(row["key"], 0.3)
        if row["key"] == "sa_30":
            assert row["annotation_file"] is None and row["num_masks"] == row["annotation_bytes"] == 0
        else:
            masks += row["num_masks"]
            assert row["num_masks"] == len(json.loads(image.with_suffix(".json").read_text())["annotations"])
    splits = [row["split"] for row in table]
    assert report["images"] == {"train": splits.count("train"), "val": splits.count("val")} and splits.count("val")
    assert report["masks"] == masks and report["without_annotations"] == 1
    assert report["converted"] == report["excluded"] == report["annotation_problems"] == report["tars"] == {}
    assert json.loads((tmp_path / "index.report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.parquet", "index.report.json"]


def test_photographs_without_json_are_usable(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    photos = tmp_path / "photos"
    photos.mkdir()
    for suffix in ("jpg", "JPEG", "png", "webp", "bmp", "tif"):
        save(photos / f"photo.of {suffix}.{suffix}", pixels)
    (photos / "notes.txt").write_text("no image")
    (photos / "._photo.jpg").write_bytes(b"\0\5\x16\7")
    report = build(photos, tmp_path / "deep" / "down" / "index.parquet")
    assert sum(report["images"].values()) == report["without_annotations"] == 6 and not report["excluded"]
    for row in sa1b.load_index(tmp_path / "deep" / "down" / "index.parquet"):
        assert sa1b.read_image(row, tmp_path / "deep" / "down").shape == (20, 30, 3)


def test_an_index_moves_with_its_data(flat, tmp_path):
    (tmp_path / "here" / "data").mkdir(parents=True)
    for path in flat.glob("sa_1*"):
        (tmp_path / "here" / "data" / path.name).write_bytes(path.read_bytes())
    build(tmp_path / "here" / "data", tmp_path / "here" / "index.parquet")
    (tmp_path / "here").rename(tmp_path / "there")
    for row in sa1b.load_index(tmp_path / "there" / "index.parquet"):
        assert row["image_file"].startswith("data/")
        sa1b.read_image(row, tmp_path / "there")


# ---- what is left out


def bad_folder(folder: Path) -> None:
    """Fill a folder with one usable image, one of each conversion, and one of each reason to leave out."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    save(folder / "good.jpg", pixels)
    save(folder / "grey.jpg", pixels[..., 0])
    save(folder / "cmyk.jpg", Image.fromarray(pixels).convert("CMYK"))
    save(folder / "palette.png", Image.fromarray(pixels).quantize(16))
    save(folder / "alpha.png", np.dstack([pixels, pixels[..., 0]]))
    save(folder / "deep.png", rng.integers(0, 65535, (40, 60)).astype(np.uint16))
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        save(folder / f"exif{orientation}.jpg", pixels, exif=exif)
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-900])
    save(folder / "one.png", pixels[:1, :1])
    save(folder / "thin.png", pixels[:15])
    save(folder / "float.tif", pixels[..., 0].astype(np.float32))
    save(folder / "wide.png", np.zeros((200, 400, 3), np.uint8))
    huge = io.BytesIO()
    save(huge, pixels, format="BMP")
    header = bytearray(huge.getvalue())
    header[18:26] = (30000).to_bytes(4, "little") * 2
    (folder / "huge.bmp").write_bytes(header)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")


def test_bad_images_are_left_out_and_named(tmp_path):
    bad_folder(tmp_path / "data")
    report = build(tmp_path / "data", tmp_path / "index.parquet", max_pixels=50_000)
    assert {reason: names(report, reason) for reason in report["excluded"]} == {
        "corrupt": ["text.jpg"],
        "empty": ["empty.jpg"],
        "huge": ["huge.bmp", "wide.png"],
        "too_small": ["one.png", "thin.png"],
        "truncated": ["cut.jpg"],
        "unreadable": ["gone.jpg"],
        "unsupported_mode": ["float.tif"],
    }
    turned = [f"exif{n}" for n in range(2, 9)]
    assert report["converted"] == {
        "grayscale": {"count": 2, "keys": ["deep", "grey"]},
        "palette": {"count": 1, "keys": ["palette"]},
        "cmyk": {"count": 1, "keys": ["cmyk"]},
        "16bit": {"count": 1, "keys": ["deep"]},
        "alpha": {"count": 1, "keys": ["alpha"]},
        "exif": {"count": 7, "keys": turned},
    }
    table = {row["key"]: row for row in rows(tmp_path / "index.parquet")}
    assert set(table) == {"good", "grey", "cmyk", "palette", "alpha", "deep", *turned}
    assert [table[f"exif{n}"]["width"] for n in range(2, 9)] == [60, 60, 60, 40, 40, 40, 40]
    assert table["deep"]["converted"] == "grayscale,16bit" and table["good"]["converted"] == ""
    for row in table.values():
        assert sa1b.read_image(row, tmp_path).shape == (row["height"], row["width"], 3)
    text = summary(report)
    for word in ("13 images", "corrupt 1", "text.jpg", "exif 7 (exif2, exif3, exif4, ...)", "thin.png"):
        assert word in text


def test_header_check_does_not_decode_and_says_so(tmp_path):
    bad_folder(tmp_path / "data")
    report = build(tmp_path / "data", tmp_path / "index.parquet", check="header", max_pixels=50_000)
    assert report["check"] == "header" and "truncated" not in report["excluded"]
    assert "--check decode" in summary(report)
    by_header = {row["key"]: row for row in rows(tmp_path / "index.parquet")}
    with pytest.raises(UnreadableImage, match="truncated"):
        sa1b.read_image(by_header.pop("cut"), tmp_path)
    build(tmp_path / "data", tmp_path / "index.parquet", max_pixels=50_000)
    assert {row["key"]: row for row in rows(tmp_path / "index.parquet")} == by_header


def test_bad_annotations_are_dropped_and_the_image_kept(flat, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    image = (flat / "sa_1.jpg").read_bytes()
    width, height = Image.open(flat / "sa_1.jpg").size

    def with_box(box):
        record = sa1b_record(1, np.ones((1, height, width), bool))
        record["annotations"][0]["bbox"] = box
        return record

    other = json.dumps(sa1b_record(1, np.ones((1, height + 1, width), bool)))
    texts = {
        "fine": (flat / "sa_1.json").read_text(),
        "none": json.dumps({"image": {"width": width, "height": height}, "annotations": []}),
        "torn": '{"image": {"wid',
        "list": "[1, 2]",
        "other": other,
        "nan_box": json.dumps(with_box([float("nan")] * 4)),
        "far_box": json.dumps(with_box([2 * width, 0, 5, 5])),
        "lone": '[{"segmentation": "\\ud800"}]',
    }
    for name, text in texts.items():
        (data / f"{name}.jpg").write_bytes(image)
        (data / f"{name}.json").write_text(text)
    (data / "alone.json").write_text(other)
    for where in (tmp_path, data):  # the report itself, beside the data, is no annotation
        for _ in range(2):
            report = build(data, where / "index.parquet")
            problems = report["annotation_problems"]
            assert {reason: names(report, reason, "annotation_problems") for reason in problems} == {
                "bad_box": ["far_box.json"],
                "bad_json": ["torn.json"],
                "not_sa1b": ["list.json", "lone.json", "nan_box.json"],
                "size_mismatch": ["other.json"],
                "without_image": ["alone.json"],
            }  # fmt: skip
    told = report["annotation_problems"]["not_sa1b"]["details"]
    assert told["nan_box.json"].startswith("annotation 0: bbox is [nan, nan, nan, nan]; it must be a list of 4 finite")
    masks = {
        row["key"]: (row["num_masks"], row["annotation_file"] is None) for row in rows(tmp_path / "index.parquet")
    }
    count = len(json.loads(texts["fine"])["annotations"])
    assert masks == {
        "fine": (count, False), "none": (0, False), "torn": (0, True), "list": (0, True), "other": (0, True),
        "nan_box": (0, True), "far_box": (0, True), "lone": (0, True),
    }  # fmt: skip
    assert report["without_annotations"] == 6


def test_of_two_images_with_one_key_the_first_stays_and_the_other_is_named(flat, tmp_path):
    for folder in ("b", "a"):
        (tmp_path / folder).mkdir()
        for number in (1, 2) if folder == "a" else (2, 3):
            for suffix in (".jpg", ".json"):
                file = f"sa_{number}{suffix}"
                (tmp_path / folder / file).write_bytes((flat / file).read_bytes())
    for sources in ([tmp_path / "b", tmp_path / "a"], [tmp_path / "a", tmp_path / "b"], [tmp_path]):
        report = build(sources, tmp_path / "out" / "index.parquet")
        assert report["excluded"]["duplicate"] == {"count": 1, "files": ["../b/sa_2.jpg"]}
        assert [row["image_file"] for row in rows(tmp_path / "out" / "index.parquet")] == [
            "../a/sa_1.jpg", "../a/sa_2.jpg", "../b/sa_3.jpg",
        ]  # fmt: skip


def test_names_that_are_not_utf8_are_named(flat, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fine.jpg").write_bytes((flat / "sa_1.jpg").read_bytes())
    with open(os.fsencode(tmp_path / "data") + b"/caf\xe9.jpg", "wb") as file:
        file.write((flat / "sa_1.jpg").read_bytes())
    report = build(tmp_path / "data", tmp_path / "index.parquet")
    assert len(rows(tmp_path / "index.parquet")) == 1
    assert names(report, "undecodable_name") == ["caf\\udce9.jpg"]


def test_unusable_requests_are_user_errors(flat, tmp_path):
    (tmp_path / "sa.tar.gz").touch()
    (tmp_path / "sa.zip").touch()
    (tmp_path / "nothing").mkdir()
    good = tmp_path / "index.parquet"
    for source, out, options, message in [
        (tmp_path / "none", good, {}, "does not exist"),
        (tmp_path / "sa.tar.gz", good, {}, "decompress"),
        (tmp_path / "sa.zip", good, {}, "neither"),
        ([], good, {}, "no source"),
        (flat, tmp_path / "index.csv", {}, ".parquet"),
        (flat, good, {"val_fraction": 1.0}, "--val-fraction"),
        (flat, good, {"check": "deep"}, "--check"),
        (flat, good, {"max_pixels": 10**9}, "--max-pixels"),
        (tmp_path / "nothing", good, {}, "no usable image"),
    ]:
        with pytest.raises(UserError, match=message):
            build(source, out, **options)
    assert not good.exists()


# ---- parallel, resumable


def test_two_workers_write_the_same_bytes(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(index_sa1b, "CHUNK_IMAGES", 7)
    build(flat, tmp_path / "one.parquet", workers=1)
    build(flat, tmp_path / "two.parquet", workers=2)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


KILLED = """
import sys, time
from effsam3.data.images import index as index_sa1b
index_sa1b.CHUNK_IMAGES = 4
make, made = index_sa1b._make_rows, []
def make_three(*arguments):
    if len(made) == 3:
        print("three", flush=True)
        time.sleep(60)
    made.append(1)
    return make(*arguments)
index_sa1b._make_rows = make_three
index_sa1b.build_index([sys.argv[1]], sys.argv[2], workers=1, progress=False)
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(index_sa1b, "CHUNK_IMAGES", 4)
    made = []
    make = index_sa1b._make_rows
    monkeypatch.setattr(index_sa1b, "_make_rows", lambda *arguments: made.append(1) or make(*arguments))
    build(flat, tmp_path / "whole.parquet")
    whole = len(made)
    out = tmp_path / "index.parquet"
    process = subprocess.Popen([sys.executable, "-c", KILLED, flat, out], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"three\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists() and len(list((tmp_path / "index.chunks").glob("*.parquet"))) == 3
    (tmp_path / "index.chunks" / ".torn.parquet.1.partial").write_bytes(b"half a p")

    made.clear()
    build(flat, out)
    assert len(made) == whole - 3 > 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "index.chunks").exists()


def test_chunks_of_changed_files_or_other_options_are_not_reused(flat, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for path in flat.glob("sa_?.*"):
        (data / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(index_sa1b, "CHUNK_IMAGES", 3)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)  # as if killed just before the end
    made = []
    make = index_sa1b._make_rows
    monkeypatch.setattr(index_sa1b, "_make_rows", lambda *arguments: made.append(1) or make(*arguments))

    def chunks_made(**options):
        made.clear()
        build(data, tmp_path / "index.parquet", **options)
        return len(made)

    whole = chunks_made()
    assert whole > 2 and chunks_made() == 0
    assert chunks_made(min_side=17) == whole and chunks_made() == 0
    os.utime(data / "sa_5.jpg", ns=(1, 1))
    assert chunks_made() == 1
    (data / "sa_9.json").write_text("{}")
    assert chunks_made() == 1
    assert [row["num_masks"] for row in rows(tmp_path / "index.parquet")][-1] == 0
    assert chunks_made(val_fraction=0.9) > 0
    (data / "sa_00.jpg").write_bytes((flat / "sa_30.jpg").read_bytes())
    assert chunks_made(val_fraction=0.9) == 1, "new images leave the others' chunks as they are"


def test_many_rows_are_in_row_groups(flat, tmp_path, monkeypatch):
    """What fits into one has the bytes of a table that is written at once."""
    build(flat, tmp_path / "one.parquet")
    table = parquet.read_table(tmp_path / "one.parquet")
    write_parquet(table, tmp_path / "at_once.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "at_once.parquet").read_bytes()
    monkeypatch.setattr(indexing, "ROWS", 8)
    monkeypatch.setattr(index_sa1b, "CHUNK_IMAGES", 4)
    build(flat, tmp_path / "several.parquet")
    found = parquet.ParquetFile(tmp_path / "several.parquet")
    assert [found.metadata.row_group(n).num_rows for n in range(4)] == [8, 8, 8, 6] and found.read() == table


def test_a_killed_worker_is_a_clear_error():
    with pytest.raises(UserError, match="run the same command again"):
        with worker_pool(2) as submit:
            submit(os._exit, 1).result()


# ---- scripts


def run(script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_scripts(flat, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "sa_000000.tar", "w") as tar:
        tar.add(flat, "")
    done = run("index_sa1b.py", tars, "--out", tmp_path / "index.parquet", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "30 images" in done.stdout and "index.report.json" in done.stdout and "30/30" in done.stderr
    wrong = run("index_sa1b.py", tmp_path / "none", "--out", tmp_path / "index.parquet")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
