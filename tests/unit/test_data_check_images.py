# SPDX-License-Identifier: Apache-2.0
"""The dataset doctor on images with masks, with one fault each."""

import pytest
from checked_data import IMAGE_CASES, check, coco, coco_images, image_folder

from effsam3.data.problems import NOTES


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
