# SPDX-License-Identifier: Apache-2.0
"""People's own videos in YouTube-VIS' JSON and in folders: each is read right, or what is wrong with it is named."""

import json

import numpy as np
import pytest
from own_videos import H, W, box, coco_video, moving, rle, runs, square, write_frames, write_json, youtube_vis
from PIL import Image
from vos_folders import save

from effsam3.data.synthetic.videos import mp4_bytes, sav_record
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.vos import open_frames, open_vos, recognise
from effsam3.errors import UserError

MASKS = moving()
NAMES = [f"{k:05d}.jpg" for k in range(5)]


def check(video, masks_TNHW=MASKS, objects=(1, 2)):
    """The masks and frames are these."""
    assert video.annotated == list(range(len(masks_TNHW))) and video.objects == list(objects)
    assert video.size == (H, W) and set(video.object_names) == set(objects)
    for k, masks_NHW in enumerate(masks_TNHW):
        found = video.masks(k)
        assert list(found) == list(objects)
        assert all((found[name] == mask_HW).all() for name, mask_HW in zip(objects, masks_NHW, strict=True))
        seen = {name: mask_HW for name, mask_HW in zip(objects, masks_NHW, strict=True) if mask_HW.any()}
        shown = video.shown(k)
        assert shown.masks.keys() == seen.keys() and not shown.unknown
        assert all((shown.masks[name] == mask_HW).all() for name, mask_HW in seen.items())
        assert abs(video.read([k]).mean() - (10 + 20 * k)) < 4


@pytest.mark.parametrize(("form", "make"), [("coco_video", coco_video), ("youtube_vis", youtube_vis)])
@pytest.mark.parametrize(
    ("frames", "place"),
    [
        ("walk", "videos.json"),
        ("JPEGImages/walk", "instances.json"),
        ("train/JPEGImages/walk", "train.json"),
        ("train/walk", "annotations_train.json"),
        ("images/walk", "annotations/instances_default.json"),
    ],
)
def test_a_json_near_its_frames(tmp_path, form, make, frames, place):
    write_frames(tmp_path / frames, NAMES)
    file = write_json(tmp_path / place, make(MASKS))
    for path in (tmp_path, file):
        tree = recognise(path)
        assert tree.format == form and str(file) in tree.about
        (video,) = open_vos(path)
        assert video.name == "walk" and not video.notes and video.object_names == {1: 1, 2: 2}
        check(video)


def test_a_split_is_a_list_next_to_the_json(tmp_path):
    content = youtube_vis(MASKS)
    content["videos"].append(content["videos"][0] | {"id": 2, "file_names": [f"run/{name}" for name in NAMES]})
    file = write_json(tmp_path / "videos.json", content)
    (tmp_path / "val.txt").write_text("run\n")
    assert [video.name for video in open_vos(file)] == ["run", "walk"]
    assert [video.name for video in open_vos(file, split="val")] == ["run"]


# ---- YouTube-VIS


def opened(folder, content, names=NAMES):
    write_frames(folder / "walk", names)
    (video,) = open_vos(write_json(folder / "videos.json", content))
    return video


@pytest.mark.parametrize("encode", [rle, runs, lambda mask_HW: [box(*corners(mask_HW))]])
def test_masks_of_any_kind_and_nulls(tmp_path, encode):
    content = youtube_vis(MASKS, encode=encode)
    assert content["annotations"][1]["segmentations"][:2] == [None, None], "it comes on frame 2"
    video = opened(tmp_path, content)
    check(video)
    assert not video.notes


def corners(mask_HW):
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return rows[0].item(), columns[0].item(), rows[-1].item() + 1, columns[-1].item() + 1


def test_a_frame_with_only_a_box_is_unknown_and_an_empty_mask_is_absent(tmp_path):
    content = youtube_vis(MASKS)
    first, second = content["annotations"]
    first |= {"bboxes": [[2, 2, 6, 6]] * 5, "id": 0}
    first["segmentations"][1] = None
    second["segmentations"][4] = rle(np.zeros((H, W), bool))  # as some trackers write an absent object
    video = opened(tmp_path, content)
    assert video.objects == [0, 2] and set(video.masks(1)) == {2} and set(video.masks(0)) == {0, 2}
    assert not video.masks(4)[2].any() and [note.reason for note in video.notes] == ["no_mask", "empty_mask"]


def test_frames_are_those_that_the_list_names(tmp_path):
    """A list may take every fourth frame, as SA-Co's do; of a video file, too."""
    content = youtube_vis(MASKS)
    content["videos"][0]["file_names"] = [f"walk/{4 * k:05d}.jpg" for k in range(5)]
    frames = np.stack([np.full((H, W, 3), 10 + 5 * k, np.uint8) for k in range(17)])
    (tmp_path / "walk.mp4").write_bytes(mp4_bytes(frames))
    (video,) = open_vos(write_json(tmp_path / "videos.json", content))
    assert video.frames == 17 and video.annotated == [0, 4, 8, 12, 16] and not video.notes
    assert (video.masks(8)[2] == MASKS[2, 1]).all() and abs(video.read([8]).mean() - 50) < 4
    write_frames(tmp_path / "walk", [f"{k:05d}.jpg" for k in range(17)])  # brightness 10 + 20k
    (video,) = open_vos(tmp_path)
    assert video.frames == 5 and video.annotated == [0, 1, 2, 3, 4] and abs(video.read([1]).mean() - 90) < 4
    del content["videos"][0]["file_names"]  # only a length
    content["videos"][0] |= {"length": 5, "name": "walk"}
    (tmp_path / "one").mkdir()
    (tmp_path / "walk.mp4").rename(tmp_path / "one" / "walk.mp4")
    (video,) = open_vos(write_json(tmp_path / "one" / "videos.json", content))
    assert video.frames == 17 and video.annotated == [0, 1, 2, 3, 4]


def test_lists_that_do_not_ascend_or_have_gaps_are_noted(tmp_path):
    content = youtube_vis(MASKS)
    content["videos"][0]["file_names"].reverse()
    video = opened(tmp_path, content)
    assert [note.reason for note in video.notes] == ["order"] and abs(video.read([0]).mean() - 90) < 4
    content["videos"][0]["file_names"] = [f"walk/{k:05d}.jpg" for k in (0, 1, 2, 4, 5)]
    assert [note.reason for note in opened(tmp_path, content).notes] == ["gap"]


def test_sizes_and_names_that_the_file_lacks(tmp_path):
    content = youtube_vis(MASKS)
    content["videos"][0] |= {"width": 0, "height": None, "file_names": NAMES, "name": "walk"}
    video = opened(tmp_path, content)
    check(video)
    assert video.name == "walk" and [note.reason for note in video.notes] == ["no_size"]
    content["videos"].append(content["videos"][0] | {"id": 2})
    write_frames(tmp_path / "1", NAMES)
    write_frames(tmp_path / "2", NAMES)
    (tmp_path / "walk").rename(tmp_path / "other")
    assert [video.name for video in open_vos(write_json(tmp_path / "videos.json", content))] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["annotations"][1].update(id=1), "two annotations of video walk have the id 1"),
        (lambda content: content["annotations"][1]["segmentations"].pop(), "has 4 segmentations, its video walk 5"),
        (lambda content: content["annotations"][0].update(video_id=9), r"annotations\[0\] is of video 9"),
        (lambda content: content["annotations"][0].pop("segmentations"), r"annotations\[0\] has no segmentations"),
        (lambda content: content["videos"].append({"id": 1}), "two videos have the id 1"),
        (lambda content: content["videos"][0].update(file_names="walk"), "file_names of video"),
    ],
)
def test_what_has_not_this_form_is_refused_with_its_place(tmp_path, change, words):
    content = youtube_vis(MASKS)
    change(content)
    with pytest.raises(UserError, match=f"videos.json: .*{words}"):
        open_vos(write_json(tmp_path / "videos.json", content))


def test_a_bad_mask_is_named_with_its_annotation(tmp_path):
    content = youtube_vis(MASKS)
    content["annotations"][1]["segmentations"][3] = {"size": [H, W], "counts": [7]}
    video = opened(tmp_path, content)
    with pytest.raises(UnreadableAnnotations, match="'walk'.*annotation 2, frame 3") as caught:
        video.masks(3)
    assert caught.value.reason == "bad_mask"


JUNK = [
    None,
    [],
    {},
    "x",
    "",
    -1,
    1.5,
    True,
    10**12,
    [1],
    {"a": 1},
    float("nan"),
    [[1, 2, 3, 4, 5, 6]],
    "\0",
    "a" * 300,
]


def places(value, path=()):
    """Yield the keys that lead to each value of a JSON, without those in its masks."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if key != "counts":
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("make", [coco_video, youtube_vis])
def test_a_json_with_any_wrong_value_is_refused_by_name_or_read(tmp_path, make):
    write_frames(tmp_path / "walk", NAMES)
    text, rng, refused = json.dumps(make(MASKS, encode=runs)), np.random.default_rng(0), 0
    paths = list(places(json.loads(text)))
    for number in range(200):
        content = json.loads(text)
        *way, last = paths[rng.integers(len(paths))]
        holder = content
        for key in way:
            holder = holder[key]
        holder[last] = JUNK[number % len(JUNK)]
        if number % 5 == 0 and isinstance(holder, dict):
            del holder[last]
        try:
            for video in open_vos(write_json(tmp_path / "videos.json", content)):
                assert set(video.object_names) == set(video.objects) and isinstance(video.notes, list)
                for index in video.annotated:
                    assert video.masks(index).keys() >= video.shown(index).masks.keys() and video.read([index]).any()
        except UserError:
            refused += 1
    assert 50 < refused < 200


# ---- folders of frames and of mask PNGs


def write_masks(folder, kind, masks_TNHW=MASKS):
    """Write PNGs of ids, or a folder for each object, named by number or in words."""
    for k, masks_NHW in enumerate(masks_TNHW):
        if kind == "ids":
            save(Image.fromarray((masks_NHW * np.array([[[1]], [[2]]], np.uint8)).max(0)), folder / f"{k:05d}.png")
        for n, mask_HW in enumerate(masks_NHW if kind != "ids" else ()):
            name = ["ape", "zebra"][n] if kind == "words" else f"{n + 1:03d}"
            save(Image.fromarray(mask_HW), folder / name / f"{k:05d}.PNG")


@pytest.mark.parametrize("kind", ["ids", "numbers", "words"])
@pytest.mark.parametrize(
    ("frames", "masks", "name"),
    [
        ("data/walk/frames", "data/walk/masks", "walk"),
        ("data/frames/walk", "data/masks/walk", "walk"),
        ("data/frames", "data/masks", "data"),
    ],
)
def test_folders(tmp_path, kind, frames, masks, name):
    write_frames(tmp_path / frames, NAMES)
    write_masks(tmp_path / masks, kind)
    assert recognise(tmp_path / "data").format == "folders"
    (video,) = open_vos(tmp_path / "data")
    assert video.name == name and not video.notes
    check(video)
    assert list(video.object_names.values()) == (["ape", "zebra"] if kind == "words" else [1, 2])


def test_masks_of_a_video_file_belong_to_its_frames_by_number(tmp_path):
    frames = np.stack([np.full((H, W, 3), 10 + 20 * k, np.uint8) for k in range(5)])
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "walk.mp4").write_bytes(mp4_bytes(frames))
    write_masks(tmp_path / "masks" / "walk", "ids")
    (tmp_path / "masks" / "walk" / "00001.png").unlink()
    (video,) = open_vos(tmp_path)
    assert video.frames == 5 and video.annotated == [0, 2, 3, 4] and (video.masks(3)[2] == MASKS[3, 1]).all()
    save(Image.fromarray(square(1, 1)), tmp_path / "masks" / "walk" / "00005.png")
    with pytest.raises(UnreadableVideo, match="frame 5 has masks but is not in .*walk.mp4"):
        open_vos(tmp_path)[0].annotated  # noqa: B018


@pytest.mark.parametrize("value", [1, 255])
def test_black_and_white_masks_are_one_object(tmp_path, value):
    write_frames(tmp_path / "walk" / "frames", NAMES)
    for k in range(5):
        save(Image.fromarray(MASKS[k, 0].astype(np.uint8) * value), tmp_path / "walk" / "masks" / f"{k:05d}.png")
    (video,) = open_vos(tmp_path)
    check(video, MASKS[:, :1], objects=(1,))
    assert [note.reason for note in video.notes] == ["binary"] * (value == 255)


def test_a_mask_beyond_the_frames_and_a_video_without_frames_are_named(tmp_path):
    write_frames(tmp_path / "frames" / "walk", NAMES[:4])
    write_masks(tmp_path / "masks" / "walk", "ids")
    write_masks(tmp_path / "masks" / "gone", "ids")
    gone, walk = open_vos(tmp_path)
    with pytest.raises(UnreadableVideo, match="frame 4 has masks but is not in"):
        walk.annotated  # noqa: B018
    with pytest.raises(UnreadableVideo, match="'gone'.*no file .*frames/gone"):
        gone.annotated  # noqa: B018


# ---- one door


def test_one_file_of_sav_and_frames_without_masks(tmp_path):
    (tmp_path / "v_manual.json").write_text(json.dumps(sav_record("v", MASKS)))
    write_frames(tmp_path / "v", NAMES)
    assert recognise(tmp_path / "v_manual.json").format == "sav_train"
    (video,) = open_vos(tmp_path / "v_manual.json")
    assert video.annotated == [0, 4] and (video.masks(4)[1] == MASKS[4, 1]).all()
    assert recognise(tmp_path / "v").format == "frames"
    (video,) = open_frames(tmp_path / "v")
    assert (video.name, video.frames, video.annotated, video.objects) == ("v", 5, [], [])
    assert [video.name for video in open_frames(tmp_path)] == ["v"], "those with masks are frames, too"
    with pytest.raises(UserError, match="there is no folder"):
        recognise(tmp_path / "gone")
