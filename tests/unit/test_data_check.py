# SPDX-License-Identifier: Apache-2.0
"""The dataset doctor on folders and files with one fault each: it is named, with where it is and whether it hurts."""

import re
from pathlib import Path

import numpy as np
import pytest
from checked_data import (
    EMPTY,
    FRAMES,
    IMAGE_CASES,
    check,
    coco,
    coco_images,
    davis,
    folder,
    image_folder,
    segmentation,
)
from numbered_videos import write_video
from own_videos import H, W, box, coco_video, moving, rle, square, write_frames, youtube_vis
from PIL import Image
from test_data_check_concepts import HARMLESS, HURTING
from vos_folders import save

import effsam3
from effsam3.cli import main
from effsam3.data.problems import HURT, NOTES
from effsam3.data.videos.checking import check_video, frames_per_second, jumps
from effsam3.data.videos.own_clips import OwnClips
from effsam3.data.videos.vos import open_vos
from effsam3.recipe.reader import load_recipe

PACKAGE = Path(effsam3.__file__).parent


# ---- one fault each


def no_frame(root):
    (folder(root) / "frames/00002.png").unlink()


def no_frame_of_a_json(root):
    (coco(root) / "00002.jpg").unlink()


def mask_beyond_the_frames(root):
    save(Image.fromarray(square(2, 2)), folder(root) / "masks/1/00005.png")


def damaged_frames(root):
    for name in ("00001.png", "00003.png"):
        (folder(root) / "frames" / name).write_bytes(b"no image")
    (root / "walk/frames/00001.png").write_bytes(b"no image")


def cut_frame(root):
    file = folder(root) / "frames/00004.png"
    file.write_bytes(file.read_bytes()[:-20])


def frame_of_another_size(root):
    save(Image.new("RGB", (W, H + 2)), folder(root) / "frames/00003.png")


def mask_of_another_size(root):
    save(Image.fromarray(np.ones((H, W + 2), bool)), folder(root) / "masks/2/00003.png")


def damaged_masks(root):
    for name in ("00001.png", "00003.png"):
        (davis(root) / name).write_bytes(b"no image")
    (root / "Annotations/walk/00001.png").write_bytes(b"no image")


def colours(root):
    save(Image.new("RGB", (W, H)), davis(root) / "00002.png")


def swapped_ids(root):
    masks_TNHW = np.stack([[square(2, 2 + k), square(12, 4 + k)] for k in range(5)])
    masks_TNHW[3:] = masks_TNHW[3:, ::-1]
    coco(root, masks_TNHW=masks_TNHW)


def another_id(root):
    masks_TNHW = np.zeros((5, 2, H, W), bool)
    masks_TNHW[:2, 0] = masks_TNHW[2:, 1] = square(5, 5)
    folder(root, masks_TNHW)


def nothing_visible(root):
    folder(root, np.zeros((5, 2, H, W), bool))


def one_never_visible(root):
    folder(root, moving() & np.array([True, False])[:, None, None])


def seen_once(root):
    folder(
        root, moving() & (np.arange(5) == 3)[:, None, None, None] | moving() & np.array([True, False])[:, None, None]
    )


def one_frame(root):
    folder(root, moving()[4:], ["00004.png"])


def wrong_order(root):
    coco(root, lambda content: [row.update(order_in_video=-row["id"] % 7) for row in content["images"]])


def gap(root):
    coco(root, lambda content: (content["images"].pop(2), drop(content, lambda row: row["image_id"] == 3)))


def unclear_names(root):
    names = ["a1_9.png", "a2_8.png", "a3_7.png"]
    folder(root, moving(3), names)


def category_only(root):
    def change(content):
        for row in content["annotations"]:
            row["category_id"] = row.pop("track_id")

    coco(root, change)


def one_category(root):
    coco(root, lambda content: [row.pop("track_id") for row in content["annotations"]])


def no_identity(root):
    def change(content):
        for row in content["annotations"]:
            del row["track_id"], row["category_id"]

    coco(root, change)


def drop(content, fits):
    content["annotations"] = [row for row in content["annotations"] if not fits(row)]


def json_with(change, make=coco_video):
    return lambda root: coco(root, change, make)


def twice(content):
    content["annotations"].append(content["annotations"][-1] | {"id": 99, "segmentation": rle(square(12, 20))})


def crowd(content):
    row = {"id": 99, "image_id": 3, "category_id": 1, "iscrowd": 1, "segmentation": rle(square(0, 0))}
    content["annotations"].append(row)


def void(root):
    def change(ids_HW):
        ids_HW[0] = 255
        return ids_HW

    davis(root, change)


def binary(root):
    write_frames(root / "walk/frames", FRAMES)
    for name, (one, _) in zip(FRAMES, moving(), strict=True):
        save(Image.fromarray(one.astype(np.uint8) * 255), root / "walk/masks" / name)


def frames_alone(root):
    write_frames(root / "walk", FRAMES)


CASES = [
    (no_frame, "missing_frame", "walk, frame 2"),
    (no_frame_of_a_json, "missing_frame", "walk, 00002.jpg"),
    (mask_beyond_the_frames, "missing_frame", "walk, frame 5"),
    (damaged_frames, "corrupt", "walk, 00001.png|walk, 00003.png"),
    (cut_frame, "truncated", "walk, 00004.png"),
    (frame_of_another_size, "size_mismatch", "walk, 00003.png"),
    (mask_of_another_size, "size_mismatch", "walk, 00003.png"),
    (damaged_masks, "corrupt", "walk|walk"),
    (colours, "colour_mask", "walk"),
    (swapped_ids, "jumping_id", "walk, 00003.jpg, object 2|walk, 00003.jpg, object 1"),
    (another_id, "jumping_id", "walk, 00002.png, object 2"),
    (nothing_visible, "no_object", "walk"),
    (one_never_visible, "never_visible", "walk, object 2"),
    (seen_once, "seen_once", "walk, object 2"),
    (one_frame, "one_frame", "walk"),
    (wrong_order, "order", "video walk"),
    (gap, "gap", "video walk, frame 2"),
    (unclear_names, "names", "walk"),
    (category_only, "category_as_track", "video walk"),
    (one_category, "merged_objects", "walk"),
    (no_identity, "guessed_objects", "walk"),
    (json_with(segmentation(EMPTY)), "empty_mask", "annotations[7] (walk/00004.jpg)"),
    (json_with(segmentation(rle(square(0, 0) & False))), "empty_mask", "annotations[7] (walk/00004.jpg)"),
    (json_with(segmentation([])), "no_mask", "annotations[7] (walk/00004.jpg)"),
    (json_with(segmentation([[1, 1, 5, 5], box(2, 2, 8, 8)])), "two_points", "annotations[7] (walk/00004.jpg)"),
    (json_with(segmentation({"size": [H, W], "counts": [3, 4]})), "bad_mask", "walk, 00004.jpg"),
    (json_with(segmentation({"size": [W, H], "counts": [H * W]})), "size_mismatch", "walk, 00004.jpg"),
    (json_with(segmentation([box(2, 2, 3, 4)])), "tiny_mask", "walk, 00004.jpg, object 2"),
    (json_with(segmentation([box(0, 0, H, W)])), "whole_frame", "walk, 00004.jpg, object 2"),
    (
        json_with(lambda content: content["annotations"][-1].update(attributes={"outside": True})),
        "outside",
        "annotations[7] (walk/00004.jpg)",
    ),
    (json_with(twice), "union", "annotations[8] (walk/00004.jpg)"),
    (json_with(crowd), "crowd", "annotations[8] (walk/00002.jpg)"),
    (json_with(lambda content: content["annotations"][-1].update(image_id=77)), "no_image", "annotations[7]"),
    (json_with(lambda content: [row.update(width=0) for row in content["images"]]), "no_size", "video walk"),
    (json_with(lambda content: content["images"][3].update(id=1)), "not_opened", "{root}/walk.json"),
    (
        json_with(lambda content: content["annotations"][1].update(id=1), youtube_vis),
        "not_opened",
        "{root}/walk.json",
    ),
    (void, "void", "walk, 00000.png|walk, 00001.png|walk, 00002.png|walk, 00003.png|walk, 00004.png"),
    (binary, "binary", "{root}/walk/masks"),
    (frames_alone, "no_masks", "{root}"),
]


@pytest.mark.parametrize(("make", "reason", "where"), CASES, ids=[f"{case[1]}-{n}" for n, case in enumerate(CASES)])
def test_every_fault_is_named(tmp_path, make, reason, where, capsys):
    make(tmp_path)
    code, report = check(tmp_path)
    found = [row["where"] for row in report["problems"] if row["reason"] == reason]
    assert found == where.replace("{root}", str(tmp_path)).split("|"), report["problems"]
    hurts = reason not in NOTES
    assert code == int(any(row["hurts"] for row in report["problems"])) and (code or not hurts)
    assert hurts or {row["reason"] for row in report["problems"] if row["hurts"]} <= {"gap"}, report["problems"]
    printed = capsys.readouterr().out
    assert f"{len(found)} x {reason}: " in printed and found[0] in printed
    if not code:  # what the doctor lets pass trains
        clips = OwnClips(open_vos(tmp_path), image_size=24, frames=3, objects=2, augment=False)
        assert all(not clips[0, number]["unreadable"] for number in range(4))


def test_every_note_of_a_reader_is_in_the_tables():
    """Else the doctor would say that it hurts."""
    files = [file for folder in ("videos", "images") for file in (PACKAGE / "data" / folder).glob("*.py")]
    found = {reason for file in files for reason in re.findall(r'\bNote\("(\w+)"', file.read_text(encoding="utf-8"))}
    assert len(found) > 15 and found <= (HURT | NOTES).keys()


def test_every_reason_of_the_tables_is_tested():
    tested = {reason for _, reason, _ in CASES + IMAGE_CASES} | HURTING | HARMLESS
    elsewhere = {"held_out"}  # said by training alone: test_concept_images.py
    assert (HURT | NOTES).keys() - tested == {"not_checked", "place_as_track", "synthetic"} | elsewhere
    assert not HURT.keys() & NOTES.keys()


# ---- what is right


@pytest.mark.parametrize("make", [folder, davis, coco, lambda root: coco(root, make=youtube_vis)])
def test_counts_of_what_is_right(tmp_path, make, capsys):
    make(tmp_path)
    code, report = check(tmp_path, "--pictures", str(tmp_path / "sheet.png"))
    counts = report["counts"]
    assert code == 0 and not report["problems"]
    assert (counts["videos"], counts["frames"], counts["annotated_frames"], counts["objects"]) == (1, 5, 5, 2)
    assert counts["object_frames"] == moving().any((2, 3)).sum() == 8
    assert counts["frames_of_an_object"] == [3, 4, 5] and counts["most_on_a_frame"] == 2
    assert counts["sizes"] == {f"{W} x {H}": 1} and counts["empty_frames"] == 0
    assert report["keys"] == {"data.path": str(tmp_path), "data.frames": 5, "data.objects": 2}
    assert report["recipe"] == ("adapt/video_frames" if make in (folder, davis) else "adapt/video_coco")
    printed = capsys.readouterr().out
    assert "nothing is wrong with it" in printed and "1 video of 5 frames" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=2) > 60).any(), "masks are coloured, the frames are grey"


@pytest.mark.parametrize("make", [folder, coco, image_folder, coco_images])
def test_what_is_suggested_is_a_recipe(tmp_path, make):
    make(tmp_path)
    report = check(tmp_path)[1]
    recipe = load_recipe(report["recipe"], [f"{key}={value}" for key, value in report["keys"].items()])
    assert recipe.data.path == str(tmp_path) and recipe.data.objects == 2


def test_empty_frames_are_counted(tmp_path):
    masks_TNHW = moving()
    masks_TNHW[1] = False
    folder(tmp_path, masks_TNHW)
    assert check(tmp_path)[1]["counts"]["empty_frames"] == 1


def test_bad_usage(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "gone")]) == 2
    folder(tmp_path)
    assert main(["data", "check", str(tmp_path), "--split", "other"]) == 2
    assert "there is no other.txt" in capsys.readouterr().err


def test_all_problems_are_in_the_file_and_a_few_are_printed(tmp_path, capsys):
    for name in FRAMES:
        (folder(tmp_path) / "frames" / name).write_bytes(b"")
    for name in FRAMES:
        (tmp_path / "walk/frames" / name).write_bytes(b"")
    code, report = check(tmp_path)
    assert code == 1 and [row["reason"] for row in report["problems"]].count("empty") >= 5
    printed = capsys.readouterr().out
    assert report["recipe"] is None and "for a recipe" not in printed
    assert "00002.png" in printed and "00004.png" not in printed and "and 3 more in" in printed


def test_ids_only_jump_where_an_object_takes_the_place_of_one_that_left():
    there, beside, away = square(4, 4).ravel(), square(4, 6).ravel(), square(12, 20).ravel()
    assert jumps({1: there}, {2: there}) == [(1, 2)]
    assert jumps({1: there, 2: away}, {1: away, 2: there}) == [(1, 2), (2, 1)]
    assert not jumps({1: there}, {1: beside, 2: there})  # a new object behind one that moves on
    assert not jumps({1: there, 2: there}, {1: there, 2: there})  # a part and the whole
    assert not jumps({1: there}, {2: away}) and not jumps({}, {1: there}) and not jumps({1: there}, {})


def test_a_long_video_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("effsam3.data.videos.checking.CHUNK_BYTES", 3 * H * W * 2)
    folder(tmp_path)
    (video,) = open_vos(tmp_path)
    read, sizes = type(video).read, []
    monkeypatch.setattr(type(video), "read", lambda self, some: sizes.append(len(some)) or read(self, some))
    assert not check_video(video).problems and sizes == [1, 2, 2]


def test_the_rate_of_a_video_is_what_its_file_says(tmp_path):
    write_video(tmp_path / "whole.mp4", 3, rate=25)
    write_video(tmp_path / "one.ts", 1)  # a transport stream says nothing, and one picture does not tell
    assert [frames_per_second(tmp_path / name) for name in ("whole.mp4", "one.ts")] == [25, None]
