# SPDX-License-Identifier: Apache-2.0
"""Building SA-V's index: rows that say what the files are, every bad file named, a killed run that resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from datasets import load_dataset
from PIL import Image

from effsam3.data.splits import split_of
from effsam3.data.synthetic.videos import make_synthetic_sav, make_video, mp4_bytes, sav_record
from effsam3.data.videos import index as index_sav
from effsam3.data.videos.extract_frames import extract_frames
from effsam3.data.videos.index import build_index, summary
from effsam3.data.videos.sav import COLUMNS, load_index, read_sav
from effsam3.errors import UserError

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data"
SMALL = {"frames": 14, "side_px": 32, "objects": 3}


def build(source, out, **options):
    sources = source if isinstance(source, list) else [source]
    return build_index(sources, out, **({"workers": 1, "progress": False} | options))


def rows(out):
    return parquet.read_table(out).to_pylist()


def left_out(report):
    for found in report["excluded"].values():
        assert found["count"] == len(found["files"])
    return {reason: [Path(name).name for name in found["files"]] for reason, found in report["excluded"].items()}


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sav") / "flat"
    make_synthetic_sav(folder, 9, **SMALL)
    (folder / "sav_000002_auto.json").write_bytes((folder / "sav_000002_manual.json").read_bytes())
    return folder


def spelled_out(runs, count):
    """Return whether each annotated frame is inside one of [start, stop, start, stop, ...]."""
    return [any(start <= k < stop for start, stop in zip(runs[::2], runs[1::2], strict=True)) for k in range(count)]


def test_rows_say_what_the_files_are(flat, tmp_path):
    report = build(flat, tmp_path / "index.parquet", val_fraction=0.3)
    table = rows(tmp_path / "index.parquet")
    expected = sorted([f"sav_{n:06d}_manual" for n in range(1, 10)] + ["sav_000002_auto"])
    assert [row["key"] for row in table] == expected
    assert parquet.read_schema(tmp_path / "index.parquet").names == list(COLUMNS)
    for row in table:
        assert row["key"] == f"{row['video_id']}_{row['kind']}"
        json_file = flat / f"{row['key']}.json"
        assert (tmp_path / row["video_file"]).resolve() == flat / f"{row['video_id']}.mp4"
        assert (tmp_path / row["annotation_file"]).resolve() == json_file
        assert row["annotation_bytes"] == json_file.stat().st_size
        truth = make_video(int(row["video_id"][-6:]), **SMALL)
        assert (row["frames"], row["height"], row["width"], row["objects"]) == (14, *truth.frames.shape[1:3], 3)
        assert row["annotated"] == 4 and row["gaps"] == []
        shown = truth.masks[::4].any((2, 3)).T.tolist()
        assert [spelled_out(runs, 4) for runs in row["visible"]] == shown
        assert row["split"] == split_of(row["video_id"], 0.3), "both rows of a video are in one split"
    splits = {row["video_id"]: row["split"] for row in table}.values()
    assert report["videos"] == {split: list(splits).count(split) for split in ("train", "val")}
    assert min(report["videos"].values()) > 0
    assert report["annotations"] == {"manual": 9, "auto": 1} and report["excluded"] == {}
    assert report["objects"] == 30 and report["annotated_frames"] == 40
    assert json.loads((tmp_path / "index.report.json").read_text()) == report
    assert "9 videos" in summary(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.parquet", "index.report.json"]
    val = [row for row in table if row["split"] == "val"]
    assert load_index(tmp_path / "index.parquet", "val", limit=1).to_list() == val[:1]
    everything = load_dataset("parquet", data_files=str(tmp_path / "index.parquet"), cache_dir=str(tmp_path / "cache"))
    assert everything["train"].to_list() == table, "any Hugging Face tool reads it"


def test_the_runs_of_objects_that_come_and_go(tmp_path):
    masks = np.zeros((24, 3, 8, 10), bool)
    masks[4:8, 0, 2, 2] = masks[16:, 0, 2, 2] = True
    masks[:, 1, 2, 2] = True
    content = sav_record("v", masks)
    content["masklet"][3] = None
    (tmp_path / "v_manual.json").write_text(json.dumps(content))
    (tmp_path / "v.mp4").write_bytes(mp4_bytes(np.zeros((24, 8, 10, 3), np.uint8)))
    build(tmp_path, tmp_path / "index.parquet")
    (row,) = rows(tmp_path / "index.parquet")
    assert row["visible"] == [[1, 2, 4, 6], [0, 3, 4, 6], []] and row["gaps"] == [3] and row["annotated"] == 6


def test_real_annotations_go_with_frames_of_their_size(tmp_path):
    if not (SAMPLES / "sav_000001_auto.json").is_file():
        pytest.skip("SA-V's sample annotations are not in ../shared/data")
    for kind in ("manual", "auto"):
        (tmp_path / f"sav_000001_{kind}.json").symlink_to(SAMPLES / f"sav_000001_{kind}.json")
    (tmp_path / "sav_000001").mkdir()
    grey = Image.new("RGB", (480, 848), (90, 90, 90))
    for index in range(121):
        grey.save(tmp_path / "sav_000001" / f"{4 * index:05d}.jpg")
    report = build(tmp_path, tmp_path / "index.parquet", check="header", val_fraction=0.0)
    assert report["annotations"] == {"manual": 1, "auto": 1} and report["excluded"] == {}
    auto, manual = rows(tmp_path / "index.parquet")
    assert (manual["frames"], manual["annotated"], manual["objects"], auto["objects"]) == (483, 121, 5, 9)
    hidden = [121 - sum(spelled_out(runs, 121)) for runs in manual["visible"]]
    assert hidden == [1, 0, 11, 113, 0] and manual["visible"][3] == [113, 121]


def test_extracted_frames_are_taken_before_the_video(flat, tmp_path):
    extract_frames([flat], tmp_path / "frames", every=4, workers=1, progress=False)
    build([flat, tmp_path / "frames"], tmp_path / "index.parquet")
    assert all(row["video_file"] == f"frames/{row['video_id']}" for row in rows(tmp_path / "index.parquet"))
    assert len(rows(tmp_path / "index.parquet")) == 10


def test_rows_are_in_order_of_their_keys_whatever_the_ids(flat, tmp_path, monkeypatch):
    """Between the two rows of `a` are those of `a_b`."""
    monkeypatch.setattr(index_sav, "CHUNK_VIDEOS", 1)
    record = json.loads((flat / "sav_000001_manual.json").read_text())
    for name in ("a", "a_b", "a_b_c", "ab", "b"):
        (tmp_path / f"{name}.mp4").symlink_to(flat / "sav_000001.mp4")
        for kind in ("manual", "auto"):
            (tmp_path / f"{name}_{kind}.json").write_text(json.dumps(record | {"video_id": name}))
    build(tmp_path, tmp_path / "index.parquet")
    keys = [row["key"] for row in rows(tmp_path / "index.parquet")]
    assert len(keys) == 10 and keys == sorted(keys) and keys[1] == "a_b_auto"


def test_an_index_moves_with_its_data(flat, tmp_path):
    (tmp_path / "here").mkdir()
    build([flat], tmp_path / "here" / "index.parquet")
    (tmp_path / "here" / "deep").mkdir()
    for path in flat.iterdir():
        (tmp_path / "here" / "deep" / path.name).write_bytes(path.read_bytes())
    build(tmp_path / "here" / "deep", tmp_path / "here" / "index.parquet")
    (tmp_path / "here").rename(tmp_path / "there")
    for row in rows(tmp_path / "there" / "index.parquet"):
        assert row["video_file"].startswith("deep/") and (tmp_path / "there" / row["video_file"]).is_file()


# ---- what is left out


def bad_folder(folder):
    """Fill a folder with a good video, and one for each reason to leave out."""
    folder.mkdir()
    masks = np.zeros((14, 2, 32, 32), bool)
    masks[:, :, 3:9, 3:9] = True
    frames = np.random.default_rng(0).integers(0, 255, (14, 32, 32, 3), dtype=np.uint8)
    video = mp4_bytes(frames)

    def write(name, content=None, mp4=video, video_id=None):
        content = sav_record(video_id or name, masks) if content is None else content
        (folder / f"{name}_manual.json").write_text(content if isinstance(content, str) else json.dumps(content))
        if mp4 is not None:
            (folder / f"{name}.mp4").write_bytes(mp4)

    write("good")
    write("broken_json", "{")
    write("other_json", {"images": []})
    write("alone", mp4=None)
    write("renamed", video_id="somebody")
    write("wide", sav_record("wide", masks.repeat(2, 3)))
    odd = sav_record("odd_mask", masks)
    odd["masklet"][2][0]["size"] = [32, 64]
    write("odd_mask", odd)
    write("torn_mask", json.dumps(sav_record("torn_mask", masks)).replace('"counts": "', '"counts": "0', 1))
    write("long", sav_record("long", masks[:13].repeat(2, 0)))
    write("invisible", sav_record("invisible", masks & False))
    write("cut", mp4=video[: len(video) // 2])
    damaged = bytearray(video)
    middle = video.find(b"mdat") + len(video) // 2
    damaged[middle : middle + len(video) // 4] = bytes(len(video) // 4)
    write("damaged", mp4=bytes(damaged))
    write("text", mp4=b"<html>404</html>")
    (folder / "mute.mp4").write_bytes(video)
    (folder / "gone_auto.json").symlink_to(folder / "nowhere.json")
    for name, numbers in (("holes", (0, 4, 12)), ("sizes", (0, 4, 8, 12)), ("torn", (0, 4, 8, 12))):
        write(name, mp4=None)
        (folder / name).mkdir()
        for number in numbers:
            side = 40 if (name, number) == ("sizes", 8) else 32
            noise = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number:05d}.jpg")
    jpeg = (folder / "torn" / "00008.jpg").read_bytes()
    (folder / "torn" / "00008.jpg").write_bytes(jpeg[:-200])
    (folder / "again").mkdir()
    (folder / "again" / "good_manual.json").write_text("{}")


def test_bad_files_are_left_out_and_named(tmp_path):
    bad_folder(tmp_path / "data")
    report = build(tmp_path / "data", tmp_path / "index.parquet")
    assert left_out(report) == {
        "bad_json": ["broken_json_manual.json"],
        "bad_mask": ["torn_mask_manual.json"],
        "corrupt": ["cut_manual.json", "text_manual.json"],
        "duplicate": ["good_manual.json"],
        "frame_count": ["long_manual.json"],
        "missing_frame": ["holes_manual.json"],
        "no_object": ["invisible_manual.json"],
        "not_sav": ["other_json_manual.json"],
        "other_video": ["renamed_manual.json"],
        "size_mismatch": ["odd_mask_manual.json", "sizes_manual.json", "wide_manual.json"],
        "truncated": ["damaged_manual.json", "torn_manual.json"],
        "unreadable": ["gone_auto.json"],
        "without_annotations": ["mute.mp4"],
        "without_video": ["alone_manual.json"],
    }
    assert [row["key"] for row in rows(tmp_path / "index.parquet")] == ["good_manual"]
    assert "excluded: size_mismatch 3" in summary(report)


def test_one_bad_json_costs_that_file_only(tmp_path):
    """Written by other tools or by hand; each has a good neighbour, and `lists` is a valid COCO file."""
    masks = np.zeros((14, 2, 32, 32), bool)
    masks[:, :, 3:9, 3:9] = True
    video = mp4_bytes(np.zeros((14, 32, 32, 3), np.uint8))

    def write(name, change):
        content = sav_record(name, masks)
        change(content, content["masklet"][1][0])
        (tmp_path / f"{name}_manual.json").write_text(json.dumps(content))
        (tmp_path / f"{name}.mp4").write_bytes(video)

    lists = [3 * 32 + 3, 6, *[26, 6] * 5, 32 * 32 - 8 * 32 - 9]
    write("good", lambda content, rle: None)
    write("lists", lambda content, rle: rle.update(counts=lists))
    write("null", lambda content, rle: rle.update(counts=None))
    write("missing", lambda content, rle: rle.pop("counts"))
    write("accent", lambda content, rle: rle.update(counts="\u00e9" + rle["counts"]))
    write("doubled", lambda content, rle: content.update(masklet_id=[5, 5]))
    write("fraction", lambda content, rle: content.update(masklet_id=[0, 1.7]))
    write("nan", lambda content, rle: content.update(video_height=float("nan")))
    write("huge", lambda content, rle: content.update(video_width=10**400))
    write("lone", lambda content, rle: content.update(video_id="\ud800" * 9))
    report = build(tmp_path, tmp_path / "index.parquet")
    assert left_out(report) == {
        "bad_mask": ["accent_manual.json"],
        "not_sav": [f"{name}_manual.json" for name in ("fraction", "huge", "missing", "nan", "null")],
        "object_ids": ["doubled_manual.json"],
        "other_video": ["lone_manual.json"],
    }
    assert [row["key"] for row in rows(tmp_path / "index.parquet")] == ["good_manual", "lists_manual"]
    assert rows(tmp_path / "index.parquet")[0]["visible"] == rows(tmp_path / "index.parquet")[1]["visible"]
    told = report["excluded"]["not_sav"]["details"]
    assert told["null_manual.json"] == "masklet[1]: counts is None; it must be a list"
    assert "1.7; it must be a whole number" in told["fraction_manual.json"]
    assert "masklet_id has 5 twice" in report["excluded"]["object_ids"]["details"]["doubled_manual.json"]
    annotations = read_sav(rows(tmp_path / "index.parquet")[1], tmp_path)
    assert (annotations.mask(1, 0) == masks[4, 0]).all()


def test_header_check_does_not_decode_and_says_so(tmp_path):
    bad_folder(tmp_path / "data")
    report = build(tmp_path / "data", tmp_path / "index.parquet", check="header")
    found = {row["video_id"] for row in rows(tmp_path / "index.parquet")}
    assert found - {"damaged"} == {"good", "sizes", "torn"}
    assert left_out(report)["missing_frame"] == ["holes_manual.json"]
    assert "checked headers only" in summary(report)


def test_unusable_requests_are_user_errors(flat, tmp_path):
    (tmp_path / "sav.tar").touch()
    (tmp_path / "nothing").mkdir()
    good = tmp_path / "index.parquet"
    for source, out, options, message in [
        (tmp_path / "none", good, {}, "not a folder"),
        (tmp_path / "sav.tar", good, {}, "not a folder"),
        ([], good, {}, "no source"),
        (flat, tmp_path / "index.csv", {}, ".parquet"),
        (flat, good, {"val_fraction": 1.0}, "--val-fraction"),
        (flat, good, {"check": "deep"}, "--check"),
        (tmp_path / "nothing", good, {}, "no usable video"),
    ]:
        with pytest.raises(UserError, match=message):
            build(source, out, **options)
    assert not good.exists()


# ---- parallel, resumable

KILLED = """
import sys, time
from effsam3.data.videos import index as index_sav
index_sav.CHUNK_VIDEOS = 2
make, made = index_sav._make_rows, []
def make_three(*arguments):
    if len(made) == 3:
        print("three", flush=True)
        time.sleep(60)
    made.append(1)
    return make(*arguments)
index_sav._make_rows = make_three
index_sav.build_index([sys.argv[1]], sys.argv[2], workers=1, progress=False)
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(index_sav, "CHUNK_VIDEOS", 2)
    made = []
    make = index_sav._make_rows
    monkeypatch.setattr(index_sav, "_make_rows", lambda *arguments: made.append(1) or make(*arguments))
    build(flat, tmp_path / "whole.parquet")
    whole = len(made)
    out = tmp_path / "index.parquet"
    process = subprocess.Popen([sys.executable, "-c", KILLED, flat, out], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"three\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists() and len(list((tmp_path / "index.chunks").glob("*.parquet"))) == 3

    made.clear()
    build(flat, out)
    assert len(made) == whole - 3 > 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "index.chunks").exists()


def test_chunks_of_changed_files_or_other_options_are_not_reused(tmp_path, monkeypatch):
    data = tmp_path / "data"
    make_synthetic_sav(data, 4, **SMALL)
    monkeypatch.setattr(index_sav, "CHUNK_VIDEOS", 2)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)  # as if killed just before the end
    made = []
    make = index_sav._make_rows
    monkeypatch.setattr(index_sav, "_make_rows", lambda *arguments: made.append(1) or make(*arguments))

    def chunks_made(**options):
        made.clear()
        build(data, tmp_path / "index.parquet", **options)
        return len(made)

    whole = chunks_made()
    assert whole > 1 and chunks_made() == 0
    assert chunks_made(check="header") == whole and chunks_made(check="header") == 0
    os.utime(data / "sav_000001.mp4", ns=(1, 1))
    assert chunks_made() == 1
    (data / "sav_000004_manual.json").write_text("{}")
    assert chunks_made() == 1 and len(rows(tmp_path / "index.parquet")) == 3


def test_the_script_with_two_workers_writes_the_same_bytes(flat, tmp_path):
    build(flat, tmp_path / "one.parquet", val_fraction=0.1)

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, ROOT / "scripts" / "index_sav.py", *arguments, "--out", tmp_path / "two.parquet"]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run(flat, "--workers", "2", "--val-fraction", "0.1")
    assert done.returncode == 0, done.stderr
    assert "9 videos" in done.stdout and "two.report.json" in done.stdout and "9/9" in done.stderr
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    wrong = run(tmp_path / "none")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
