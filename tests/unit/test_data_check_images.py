# SPDX-License-Identifier: Apache-2.0
"""The dataset doctor on images with masks, with one fault each."""

import json

import pytest
from checked_data import IMAGE_CASES, check, coco, coco_images, image_folder, swapped_folders

from effsam3.cli import main
from effsam3.data.problems import NOTES
from effsam3.data_check import most_common


@pytest.mark.parametrize(("make", "reason", "where"), IMAGE_CASES, ids=[case[1] for case in IMAGE_CASES])
def test_every_fault_of_images_is_named(tmp_path, make, reason, where):
    make(tmp_path)
    code, report = check(tmp_path)
    found = [row["where"] for row in report["problems"] if row["reason"] == reason]
    assert found == [where.replace("{root}", str(tmp_path))], report["problems"]
    assert code == int(reason not in NOTES)


def test_images_are_told_from_videos(tmp_path):
    image_folder(tmp_path / "folder")
    coco_images(tmp_path / "json")
    coco(tmp_path / "video")
    for name in ("folder", "json"):
        code, report = check(tmp_path / name, "--pictures", str(tmp_path / "sheet.png"))
        counts = report["counts"]
        assert (code, report["problems"], report["recipe"]) == (0, [], "adapt/lora")
        assert (counts["images"], counts["objects"], counts["most_on_an_image"]) == (5, 8, 2)
        assert report["keys"] == {"data.path": str(tmp_path / name), "data.objects": 2}
        (tmp_path / "sheet.png").unlink()
    assert counts["categories"] == {"thing": 8}
    assert check(tmp_path / "video")[1]["recipe"] == "adapt/video_coco"
    assert check(tmp_path / "json", "--as", "videos")[1]["counts"]["videos"] == 1


@pytest.mark.parametrize(
    "places", [("images", "annotations/instances.json"), ("train", "labels/instances_train.json")]
)
def test_images_of_a_standard_coco_folder(tmp_path, places):
    coco_images(tmp_path)
    (tmp_path / places[1]).parent.mkdir()
    (tmp_path / "images").rename(tmp_path / places[0])
    (tmp_path / "walk.json").rename(tmp_path / places[1])
    for path in (tmp_path, tmp_path / places[1]):
        assert main(["data", "check", str(path), "--json", str(tmp_path / "report.txt")]) == 0
        report = json.loads((tmp_path / "report.txt").read_text())
        assert report["format"] == "images with masks: COCO JSON of images" and report["counts"]["images"] == 5


def test_images_that_are_nowhere(tmp_path, capsys):
    coco_images(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    code, report = check(tmp_path)
    printed = capsys.readouterr().out
    assert code == 1 and report["recipe"] is None and "for a recipe" not in printed
    assert f"lists 5 images, none of which is in {tmp_path} (first: 00000.png); give their folder" in printed
    assert check(tmp_path, "--images", str(tmp_path / "elsewhere"))[0] == 0
    assert "for a recipe" in capsys.readouterr().out


def test_what_is_neither_images_nor_videos(tmp_path, capsys):
    for options in ([], ["--as", "images"]):
        assert main(["data", "check", str(tmp_path), *options]) == 2
        told = capsys.readouterr().err
        assert "images/" in told and "masks/" in told and "COCO JSON" in told and "None" not in told


def test_swapped_folders_and_images_without_an_object(tmp_path, capsys):
    swapped_folders(tmp_path / "swapped")
    check(tmp_path / "swapped")
    assert "masks/ holds files named like images/'s: are the two swapped?" in capsys.readouterr().out
    image_folder(tmp_path / "empty", lambda masks: [mask.fill(0) for mask in masks.values()])
    check(tmp_path / "empty")
    printed = capsys.readouterr().out
    assert "1 x no_object" in printed and "videos" not in printed


def test_images_with_masks_are_no_videos(tmp_path, capsys):
    image_folder(tmp_path)
    convert = ["data", "convert", str(tmp_path), "--to", "davis", "--out", str(tmp_path / "out")]
    for command in (convert, ["data", "check", str(tmp_path), "--as", "videos"]):
        assert main(command) == 2
        assert "these are images with masks (stage adapt reads them)" in capsys.readouterr().err


def test_many_sizes_are_called_sizes():
    assert most_common({"sizes": {f"{side} x 9": 1 for side in range(5)}}, "sizes").endswith("2 x 9 (1), 2 more sizes")
