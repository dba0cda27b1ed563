# SPDX-License-Identifier: Apache-2.0
"""COCO-video JSONs of known tools, and files that are none."""

import numpy as np
import pytest
from opened_videos import MASKS, NAMES, check, opened, reasons, ring
from own_videos import H, W, box, coco_video, runs, square, write_frames, write_json
from pycocotools import mask as coco_mask

from effsam3.data.videos.vos import open_vos
from effsam3.errors import UserError

# ---- files of tools


def test_cvat_through_datumaro(tmp_path):
    """Frames by number only, in images/<subset>; masks as crowds, tracks among the attributes; a closed track."""
    names = [f"frame_{k:06d}.PNG" for k in range(5)]
    images = [{"id": k + 1, "width": W, "height": H, "file_name": name, "license": 0, "flickr_url": "", "coco_url": "",
               "date_captured": 0} for k, name in enumerate(names)]  # fmt: skip
    annotations = [
        {"id": 2 * k + n + 1, "image_id": k + 1, "category_id": 1, "segmentation": runs(MASKS[k, n]), "area": 36.0,
         "bbox": [0.0, 0.0, 5.0, 5.0], "iscrowd": 1,
         "attributes": {"occluded": False, "track_id": n, "keyframe": k == 0, "outside": (k, n) == (4, 1)}}
        for k in range(5) for n in range(2) if MASKS[k, n].any()
    ]  # fmt: skip
    content = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": ""},
               "categories": [{"id": 1, "name": "car", "supercategory": ""}], "images": images[::-1],
               "annotations": annotations}  # fmt: skip
    write_frames(tmp_path / "images" / "default", names)
    write_json(tmp_path / "annotations" / "instances_default.json", content)
    (video,) = open_vos(tmp_path)
    expected = MASKS.copy()
    expected[4, 1] = False
    check(video, expected, objects=(0, 1))
    assert reasons(video) == ["outside"] and video.name == "instances_default"


def test_label_studio(tmp_path):
    """No tracks, no sizes, ids from 0, an annotation for each contour, addresses for paths, names with a prefix."""
    prefixes = ["0a1b2c3d", "ffee1234", "12345678", "9ab00c1d", "5e5e5e50"]
    names = [f"{prefix}-frame_{k}.jpg" for k, prefix in enumerate(prefixes)]
    images = [{"width": None, "height": None, "id": k, "file_name": f"images\\{name}",
               "path": f"/data/upload/1/{name}"} for k, name in enumerate(names)]  # fmt: skip
    annotations = [
        {"id": number, "image_id": k, "category_id": 0, "segmentation": [box(2, left, 6, left + 4)], "bbox": [],
         "ignore": 0, "iscrowd": 0, "area": 16}
        for number, (k, left) in enumerate((k, left) for k in range(5) for left in (2, 20))
    ]  # fmt: skip
    content = {
        "images": images[::-1],
        "categories": [{"id": 0, "name": "dog"}],
        "annotations": annotations,
        "info": {},
    }
    (video,) = opened(tmp_path, content, frames="images", names=names, file="result.json")
    check(video, np.stack([[square(2, 2, 4) | square(2, 20, 4)]] * 5), objects=(0,))
    assert reasons(video) == ["category_as_track", "no_size", *["union"] * 5]


def test_sahi(tmp_path):
    """CocoVid has boxes only: nothing is learned from it, and that is said for every annotation."""
    content = {
        "videos": [{"id": 1, "name": "walk", "fps": 30}],
        "images": [{"id": k + 1, "file_name": f"walk/{name}", "height": H, "width": W, "video_id": 1, "frame_id": k}
                   for k, name in enumerate(NAMES)],
        "annotations": [{"id": k + 1, "image_id": k + 1, "video_id": 1, "category_id": 0, "category_name": "dog",
                         "bbox": [1, 2, 3, 4], "area": 12, "segmentation": [], "iscrowd": 0, "instance_id": 7}
                        for k in range(5)],
        "categories": [{"id": 0, "name": "dog", "supercategory": "dog"}],
    }  # fmt: skip
    (video,) = opened(tmp_path, content)
    assert video.name == "walk" and video.objects == [7] and reasons(video) == ["no_mask"] * 5
    assert all(video.masks(k) == {} for k in range(5))


def test_supervision(tmp_path):
    """A solid mask is a polygon through the middles of its border pixels, one with a hole an RLE and a crowd."""
    content = coco_video(MASKS)
    for number, annotation in enumerate(content["annotations"]):
        annotation.pop("track_id")
        annotation |= {"id": number + 1, "category_id": 0, "iscrowd": 0}
    solid = [[2, 2, 2, 7, 7, 7, 7, 2]]
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [2, 2, 5, 5], "area": 36,
                               "segmentation": solid, "iscrowd": 0},
                              {"id": 2, "image_id": 2, "category_id": 0, "bbox": [5, 4, 10, 10], "area": 88,
                               "segmentation": runs(ring()), "iscrowd": 1}]  # fmt: skip
    (video,) = opened(tmp_path, content)
    assert video.objects == [0] and (video.masks(1)[0] == ring()).all()
    expected = coco_mask.decode(coco_mask.frPyObjects(solid, H, W))[..., 0]
    assert (video.masks(0)[0] == expected).all() and 25 <= expected.sum() <= 36
    assert reasons(video) == ["category_as_track"]


# ---- what is no such file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(annotations={}), "annotations is {}; it must be a list"),
        (lambda content: content["images"][0].pop("id"), r"images\[0\] has no id"),
        (lambda content: content["images"][0].update(id=[1]), "it must be a whole number or a text"),
        (lambda content: content["annotations"][0].pop("image_id"), r"annotations\[0\] has no image_id"),
        (lambda content: content["annotations"][0].update(attributes=[1]), "attributes of an annotation"),
        (lambda content: content["annotations"][0].update(track_id=1.5), "track_id is 1.5"),
        (lambda content: content["images"][0].update(height=-3), "height of walk/00000.jpg is -3"),
        (lambda content: content["images"][0].update(order_in_video="first"), "order_in_video of walk/00000.jpg"),
        (lambda content: content["images"].append(7), r"images\[5\] is 7; it must be an object"),
    ],
)
def test_what_has_not_this_form_is_refused_with_its_place(tmp_path, change, words):
    content = coco_video(MASKS)
    change(content)
    with pytest.raises(UserError, match=f"videos.json: .*{words}"):
        open_vos(write_json(tmp_path / "videos.json", content))


def test_files_that_are_no_json_of_videos(tmp_path):
    with pytest.raises(UserError, match="is neither a video nor a JSON of videos"):
        open_vos(write_json(tmp_path / "other.json", {"shapes": []}))
    (tmp_path / "torn.json").write_text('{"images": [')
    with pytest.raises(UserError, match="torn.json is no JSON"):
        open_vos(tmp_path / "torn.json")
    write_json(tmp_path / "torn.json", coco_video(MASKS))
    write_json(tmp_path / "more.json", coco_video(MASKS))
    with pytest.raises(UserError, match="has 2 JSONs; give one of them: .*more.json, .*torn.json"):
        open_vos(tmp_path)
