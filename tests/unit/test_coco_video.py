# SPDX-License-Identifier: Apache-2.0
"""COCO-video JSONs as annotation tools really write them: each mask is read right, or what is wrong is named."""

import random

import numpy as np
import pytest
from opened_videos import MASKS, NAMES, check, opened, reasons, ring
from own_videos import H, W, box, coco_video, rle, runs, square, write_frames, write_json
from pycocotools import mask as coco_mask

from effsam3.data.synthetic.videos import mp4_bytes
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.vos import open_vos
from effsam3.errors import UserError

# ---- which object


@pytest.mark.parametrize("key", ["track_id", "instance_id", "attributes"])
def test_an_object_is_known_by_its_track_wherever_the_tool_puts_it(tmp_path, key):
    content = coco_video(MASKS)
    for annotation in content["annotations"]:
        number = annotation.pop("track_id") - 1  # 0 is an id
        annotation |= {"attributes": {"occluded": False, "track_id": number}} if key == "attributes" else {key: number}
    random.Random(0).shuffle(content["annotations"])
    (video,) = opened(tmp_path, content)
    check(video, objects=(0, 1))
    assert not video.notes


def test_ids_that_are_texts_are_numbered_and_kept(tmp_path):
    content = coco_video(MASKS)
    for annotation in content["annotations"]:
        annotation["track_id"] = {1: "zebra", 2: "ape"}[annotation["track_id"]]
    (video,) = opened(tmp_path, content)
    check(video)
    assert video.object_names == {1: "zebra", 2: "ape"} and not video.notes


def test_ids_count_for_each_video(tmp_path):
    one, other = coco_video(MASKS), coco_video(MASKS[:, ::-1], video="run")
    for image in other["images"]:
        image["id"] += 100
    for annotation in other["annotations"]:
        annotation["image_id"] += 100
    write_frames(tmp_path / "run", NAMES)
    run, walk = opened(tmp_path, {key: one[key] + other[key] for key in ("images", "annotations")})
    assert (run.name, walk.name) == ("run", "walk")
    check(walk)
    check(run, MASKS[:, ::-1])


def test_without_tracks_a_category_is_one_object_and_that_is_noted_once(tmp_path):
    content = coco_video(MASKS)
    for annotation in content["annotations"]:
        annotation["category_id"] = 10 * annotation.pop("track_id")  # categories have gaps
    (video,) = opened(tmp_path, content)
    check(video, objects=(10, 20))
    assert reasons(video) == ["category_as_track"] and video.object_names == {10: "category 10", 20: "category 20"}
    for annotation in content["annotations"]:
        annotation["category_id"] = 7
    (video,) = opened(tmp_path, content)
    assert video.objects == [7] and (video.masks(3)[7] == MASKS[3].any(0)).all()
    assert reasons(video) == ["category_as_track", "union", "union", "union"], "frames 2, 3 and 4 show both"
    for annotation in content["annotations"]:
        del annotation["category_id"]
    (video,) = opened(tmp_path, content)
    check(video, objects=(0, 1))
    assert reasons(video) == ["place_as_track"]


def test_categories_and_places_are_not_mixed_up(tmp_path):
    content = coco_video(MASKS)
    for annotation in content["annotations"]:
        annotation["category_id"] = 0  # of the second object
        if annotation.pop("track_id") == 1:
            del annotation["category_id"]  # the first in its frame's list: place 0
    (video,) = opened(tmp_path, content)
    check(video, objects=(1, 0))
    assert video.object_names == {0: "category 0", 1: "place 0"}
    assert reasons(video) == ["category_as_track", "place_as_track"]


def test_a_crowd_is_an_object_if_it_has_a_track(tmp_path):
    # So are the masks of Datumaro and CVAT, and supervision's with holes.
    (video,) = opened(tmp_path, coco_video(MASKS, encode=runs, iscrowd=1))
    check(video)
    assert not video.notes
    content = coco_video(MASKS)
    crowd = {"id": 99, "image_id": 1, "category_id": 1, "iscrowd": 1, "segmentation": runs(square(0, 20))}
    alone = {"id": 99, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": runs(square(14, 24))}
    content["annotations"] += [crowd, alone]
    (video,) = opened(tmp_path, content)
    assert reasons(video) == ["category_as_track", "crowd"]
    assert video.object_names == {1: 1, 2: 2, 3: "category 3"} and (video.masks(0)[3] == square(14, 24)).all()


def test_a_track_that_is_outside_is_absent(tmp_path):
    content = coco_video(MASKS)
    for annotation in content["annotations"]:
        annotation["attributes"] = {"outside": annotation["image_id"] == 5, "keyframe": True}
    (video,) = opened(tmp_path, content)
    expected = MASKS.copy()
    expected[4] = False
    check(video, expected)
    assert reasons(video) == ["outside"] * 2 and "00004.jpg" in video.notes[0].where


def test_several_annotations_of_one_track_are_one_object(tmp_path):
    content = coco_video(MASKS)
    content["annotations"].append({"id": 1, "image_id": 2, "track_id": 1, "segmentation": runs(square(13, 22))})
    (video,) = opened(tmp_path, content)
    expected = MASKS.copy()
    expected[1, 0] |= square(13, 22)
    check(video, expected)
    (note,) = video.notes
    assert note.reason == "union" and "00001.jpg" in note.where and "object 1" in note.detail


# ---- masks


@pytest.mark.parametrize(
    "segmentation",
    [
        rle(ring()),
        runs(ring()),
        runs(~ring()),  # begins with a run of 0
        [box(2, 3, 9, 12)],
        [box(2, 3, 9, 12), box(8, 10, 15, 28)],
        [[3.5, 2.25, 20.75, 4.0, 11.0, 17.5]],
        [[0, 0, W, 0, W, H, 0, H]],
    ],
)
def test_masks_are_what_pycocotools_decodes(tmp_path, segmentation):
    content = coco_video(MASKS)
    content["annotations"][0]["segmentation"] = segmentation
    (video,) = opened(tmp_path, content)
    found = segmentation
    if isinstance(found, list):
        found = coco_mask.merge(coco_mask.frPyObjects(found, H, W))
    elif isinstance(found["counts"], list):
        found = coco_mask.frPyObjects(found, H, W)
    assert (video.masks(0)[1] == coco_mask.decode(found)).all() and video.masks(0)[1].any() and not video.notes


def test_an_annotation_without_a_mask_is_unknown_not_absent(tmp_path):
    content = coco_video(MASKS)
    empty = [[], None, "gone", [[3, 4, 8, 9]], [[3, 4, 8, 9], [1, 2]]]
    chosen = content["annotations"][:1] + content["annotations"][1::2]
    for annotation, value in zip(chosen, empty, strict=True):
        annotation |= {"segmentation": value, "bbox": [1, 2, 3, 4]}
        if value == "gone":
            del annotation["segmentation"]
    without = {(one["image_id"], one["track_id"]) for one in content["annotations"] if "bbox" in one}
    (video,) = opened(tmp_path, content)
    assert len(without) == 5
    for k in range(5):
        masks = video.masks(k)
        assert {(k + 1, name) for name in (1, 2) if name not in masks} == {one for one in without if one[0] == k + 1}
        assert all((mask == MASKS[k, name - 1]).all() for name, mask in masks.items())
    assert reasons(video) == ["no_mask"] * 5 + ["two_points"] * 2


def test_a_polygon_of_two_points_next_to_others_is_left_out(tmp_path):
    content = coco_video(MASKS)
    content["annotations"][0]["segmentation"] = [[3, 4, 8, 9], box(2, 2, 8, 8)]
    (video,) = opened(tmp_path, content)
    assert reasons(video) == ["two_points"] and video.masks(0)[1].sum() == 36


def test_an_empty_mask_and_an_empty_frame_keep_their_meaning(tmp_path):
    content = coco_video(MASKS)
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 2]
    content["annotations"][0]["segmentation"] = rle(np.zeros((H, W), bool))
    (video,) = opened(tmp_path, content)
    assert video.annotated == [0, 1, 2, 3, 4], "an image of the file is an annotated frame"
    for k in (0, 1):
        assert list(video.masks(k)) == [1, 2] and not any(mask.any() for mask in video.masks(k).values())
    assert reasons(video) == ["empty_mask"]


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [W, H], "counts": [W * H]}, "size_mismatch"),
        ({"size": [H, W], "counts": [10, 20]}, "bad_mask"),
        ({"size": [H, W], "counts": "04"}, "bad_mask"),
        ({"size": [H, W], "counts": "\u00e9"}, "bad_mask"),
        ({"counts": [H * W]}, "bad_mask"),
        ([[300, 1, 310, 1, 310, 9]], "bad_mask"),
        ([3, 4, 8, 4, 8, 9], "bad_mask"),
        ("mask.png", "bad_mask"),
    ],
)
def test_a_bad_mask_is_named_with_its_file(tmp_path, segmentation, reason):
    content = coco_video(MASKS)
    content["annotations"][1]["segmentation"] = segmentation
    (video,) = opened(tmp_path, content)
    assert video.masks(0)[1].any(), "only the frame of the bad one is refused"
    with pytest.raises(UnreadableAnnotations, match=r"'walk'.*annotations\[1\] \(walk/00001.jpg\)") as caught:
        video.masks(1)
    assert caught.value.reason == reason


@pytest.mark.parametrize("missing", [0, None, "gone"])
def test_sizes_that_the_file_does_not_know_are_the_frames(tmp_path, missing):
    content = coco_video(MASKS, encode=lambda mask_HW: [box(*edges(mask_HW))])
    for image in content["images"]:
        image |= {"width": missing, "height": missing}
        if missing == "gone":
            del image["width"], image["height"]
    (video,) = opened(tmp_path, content)
    check(video)
    assert reasons(video) == ["no_size"]


def edges(mask_HW):
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return rows[0].item(), columns[0].item(), rows[-1].item() + 1, columns[-1].item() + 1


def test_frames_of_another_size_than_the_file_says_are_named(tmp_path):
    write_frames(tmp_path / "walk", NAMES, (2 * H, 2 * W))
    (video,) = open_vos(write_json(tmp_path / "videos.json", coco_video(MASKS)))
    with pytest.raises(UnreadableAnnotations, match=r"masks of \(20, 30\), frames of \(40, 60\)"):
        video.masks(0)


# ---- which frame


@pytest.mark.parametrize("key", ["order_in_video", "frame_id", None])
def test_frames_are_sorted_and_lists_and_ids_are_not_believed(tmp_path, key):
    content = coco_video(MASKS)
    for image in content["images"]:
        order = image.pop("order_in_video")
        image |= {} if key is None else {key: 5 * order}
        image["id"] = 99 - image["id"]
    for annotation in content["annotations"]:
        annotation["image_id"] = 99 - annotation["image_id"]
    random.Random(1).shuffle(content["images"])
    (video,) = opened(tmp_path, content)
    check(video)
    assert not video.notes and video.frame_names == [name[:-4] for name in NAMES]


def test_order_and_gaps_are_noted(tmp_path):
    content = coco_video(MASKS)
    for image in content["images"]:
        image["order_in_video"] = 9 - image["order_in_video"]
    content["images"].pop(2)
    (video,) = opened(tmp_path, content)
    assert reasons(video) == ["gap", "no_image", "no_image", "order"]
    assert video.frame_names == ["00004", "00003", "00001", "00000"]


def test_without_video_id_a_folder_is_a_video(tmp_path):
    content = coco_video(MASKS)
    for image in content["images"]:
        image["file_name"] = "data\\walk\\" + image.pop("path")[5:]  # from Windows
        del image["video_id"]
    (video,) = opened(tmp_path, content, frames="data/walk")
    assert video.name == "walk"
    check(video)
    for image in content["images"]:
        image["file_name"] = image["file_name"][-9:]
    (video,) = opened(tmp_path, content, frames=".", file="trip.json")
    assert video.name == "trip"
    check(video)


def test_frames_that_cannot_be_told_apart_are_refused_with_both_names(tmp_path):
    content = coco_video(MASKS)
    for image in content["images"]:
        image["file_name"] = image.pop("path")[5:]
        del image["video_id"], image["order_in_video"]
    content["images"] += [image | {"id": image["id"] + 100} for image in content["images"]]
    file = write_json(tmp_path / "videos.json", content)
    with pytest.raises(UserError, match=r"image 1 \(00000.jpg\) and image 101 \(00000.jpg\) cannot be told apart"):
        open_vos(file)
    for number, image in enumerate(content["images"]):
        image |= {"frame_id": number % 5}  # of two videos
    write_json(file, content)
    with pytest.raises(UserError, match="have one frame_id; are they of two videos"):
        open_vos(file)
    for number, image in enumerate(content["images"]):
        image |= {"video_id": number // 5}
    write_json(file, content)
    write_frames(tmp_path, NAMES)
    with pytest.raises(UserError, match="of video '1' and .*of video '0' both are .*00000.jpg"):
        open_vos(file)
    for name in ("0", "1"):
        write_frames(tmp_path / name, NAMES)
    for name in NAMES:
        (tmp_path / name).unlink()
    assert [video.frames for video in open_vos(file)] == [5, 5]
    content["images"][1]["id"] = content["images"][0]["id"]
    with pytest.raises(UserError, match="00000.jpg and 00001.jpg have the id 1"):
        open_vos(write_json(file, content))


def test_a_frame_that_is_missing_is_named_when_it_is_read(tmp_path):
    (video,) = opened(tmp_path, coco_video(MASKS), names=NAMES[:4])
    assert video.masks(4)[1].any()
    with pytest.raises(UnreadableVideo, match="00004.jpg") as caught:
        video.read([4])
    assert caught.value.reason == "missing_frame"


@pytest.mark.parametrize("name", ["walk.mp4", "videos.json.mp4", "other.mov"])
def test_frames_may_be_those_of_a_video_file(tmp_path, name):
    content = coco_video(MASKS)
    for image in content["images"]:
        image["order_in_video"] = 2 * image["order_in_video"]
    frames = np.stack([np.full((H, W, 3), 10 + 10 * k, np.uint8) for k in range(11)])
    (tmp_path / name.replace("videos.json", "videos")).write_bytes(mp4_bytes(frames))
    (video,) = open_vos(write_json(tmp_path / "videos.json", content))
    assert video.frames == 11 and video.annotated == [0, 2, 4, 6, 8]
    for k in range(5):
        assert (video.masks(2 * k)[1] == MASKS[k, 0]).all() and abs(video.read([2 * k]).mean() - (10 + 20 * k)) < 4
    content["images"][4]["order_in_video"] = 11
    (video,) = open_vos(write_json(tmp_path / "videos.json", content))
    with pytest.raises(UnreadableVideo, match=r"frame 11 has masks but is not in .*\(11 frames\)"):
        video.annotated  # noqa: B018


def test_images_without_names_are_those_of_a_video_file(tmp_path):
    content = coco_video(MASKS, video="../walk")
    for image in content["images"]:
        del image["path"]
    file = write_json(tmp_path / "videos.json", content)
    (video,) = open_vos(file)
    assert video.name == "walk", "no name leads out of a folder"
    with pytest.raises(UnreadableVideo, match="00000.jpg"):
        video.read([0])
    mixed = coco_video(MASKS)
    del mixed["images"][1]["path"]
    (video,) = opened(tmp_path / "mixed", mixed)
    assert abs(video.read([0]).mean() - 10) < 4
    with pytest.raises(UnreadableVideo, match="00001.jpg"):
        video.read([1])
    (tmp_path / "walk.mp4").write_bytes(mp4_bytes(np.zeros((5, H, W, 3), np.uint8)))
    (video,) = open_vos(file)
    assert video.frames == 5 and (video.masks(4)[2] == MASKS[4, 1]).all()
    content["images"] = [image | {"video_id": ".."} for image in content["images"]]
    assert open_vos(write_json(file, content))[0].name == "videos"


def test_frames_of_a_video_file_go_by_their_names_where_a_tool_counts_its_images(tmp_path):
    content = coco_video(MASKS)
    for image in content["images"]:
        image |= {"frame_id": image.pop("order_in_video"), "path": f"walk/{2 * (image['id'] - 1):05d}.jpg"}
    (tmp_path / "walk.mp4").write_bytes(mp4_bytes(np.zeros((11, H, W, 3), np.uint8)))
    (video,) = open_vos(write_json(tmp_path / "videos.json", content))
    assert video.annotated == [0, 2, 4, 6, 8] and (video.masks(8)[2] == MASKS[4, 1]).all()
