# SPDX-License-Identifier: Apache-2.0
"""Benchmark videos in all folder trees, against the masks they were written from; what is wrong with bad ones."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image
from vos_folders import palette_image, write_vos_trees

from effsam3.data.synthetic.videos import make_synthetic_sav, make_video, sav_record
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.vos import open_vos
from effsam3.errors import UserError

SMALL = {"frames": 22, "side_px": 64, "objects": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vos")
    write_vos_trees(folder, 3, **SMALL)
    make_synthetic_sav(folder / "sav_train", 3, **SMALL)
    return folder


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_davis(folder, name, ids_by_number, numbers, size=(8, 10), digits=5):
    """Write frames of these numbers, and palette masks for some of them."""
    for number in numbers:
        save(folder / "JPEGImages" / name / f"{number:0{digits}d}.jpg", Image.new("RGB", size[::-1], (number, 0, 0)))
    for number, ids_HW in ids_by_number.items():
        image = Image.fromarray(ids_HW)
        image.putpalette(palette_image(np.zeros((1, 2, 2), bool)).getpalette())
        save(folder / "Annotations" / name / f"{number:0{digits}d}.png", image)


# ---- the same videos in three folder trees


@pytest.mark.parametrize(("name", "every"), [("sav_val", 4), ("davis", 1), ("sav_train", 4)])
def test_masks_and_frames_are_those_written(root, name, every):
    videos = open_vos(root / name)
    assert [video.name for video in videos] == ["sav_000001", "sav_000002", "sav_000003"]
    for number, video in enumerate(videos, 1):
        truth = make_video(number, **SMALL)
        ids = [1, 2, 3] if name == "davis" else [0, 1, 2]
        assert (video.frames, video.size) == (22, truth.frames.shape[1:3]) and video.objects == ids
        assert video.annotated == list(range(0, 22, every))
        assert video.frame_names == [f"{index:05d}" for index in range(22)]
        for index in video.annotated[:: 5 // every]:
            masks = video.masks(index)
            assert list(masks) == ids and all(mask.dtype == bool for mask in masks.values())
            hidden = np.zeros(video.size, bool)
            for position, mask in reversed(list(enumerate(masks.values()))):
                expected = truth.masks[index, position]
                if name == "davis":  # a pixel has one id only: the last object's
                    expected, hidden = expected & ~hidden, hidden | expected
                assert (mask == expected).all()
        pixels = video.read([21, 4])
        assert pixels.shape == (2, 3, *video.size) and pixels.dtype == np.uint8
        assert np.abs(pixels.transpose(0, 2, 3, 1).astype(int) - truth.frames[[21, 4]]).mean() < 8


def test_splits_choose_videos(root):
    assert len(open_vos(root / "sav_val", split="sav_val")) == len(open_vos(root / "davis", split="val")) == 3
    file = root / "davis" / "ImageSets" / "2017" / "mine.txt"
    file.write_text("sav_000003\nsav_000001\n")
    assert [video.name for video in open_vos(root / "davis", split="mine")] == ["sav_000001", "sav_000003"]
    file.write_text("sav_000003\nhorse\n")
    with pytest.raises(UserError, match="names 1 videos without masks, such as horse"):
        open_vos(root / "davis", split="mine")
    with pytest.raises(UserError, match="there is no other.txt"):
        open_vos(root / "davis", split="other")


def test_folders_that_are_no_tree(root, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        open_vos(tmp_path / "gone")
    with pytest.raises(UserError, match="no known folder tree"):
        open_vos(tmp_path)
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(UserError, match="no video with masks"):
        open_vos(tmp_path)


# ---- DAVIS, MOSE, YouTube-VOS


def test_every_fifth_frame_annotated_and_objects_that_come_later(tmp_path):
    ids = np.zeros((8, 10), np.uint8)
    ids[1:3, 1:3] = 4
    later = ids.copy()
    later[5:7, 5:7], later[7, 9] = 2, 255
    write_davis(tmp_path, "a", {0: ids, 5: later, 10: later * 0}, range(12))
    (video,) = open_vos(tmp_path)
    assert video.frames == 12 and video.annotated == [0, 5, 10] and video.objects == [2, 4]
    first, second, third = (video.masks(index) for index in video.annotated)
    assert (first[4] == (ids == 4)).all() and not first[2].any()
    assert (second[2] == (later == 2)).all() and second[2].sum() == 4, "255 is void, no object"
    assert second.keys() == third.keys() and not any(mask.any() for mask in third.values())
    with pytest.raises(KeyError):
        video.masks(1)


def test_frames_count_from_zero_whatever_their_names(tmp_path):
    ids = np.ones((8, 10), np.uint8)
    write_davis(tmp_path, "a", {20: ids}, [10, 15, 20])  # YouTube-VOS keeps every fifth frame, with its own number
    (video,) = open_vos(tmp_path)
    assert video.frames == 3 and video.annotated == [2] and video.masks(2)[1].all()
    assert abs(int(video.read([2])[0, 0, 0, 0]) - 20) < 4
    assert video.frame_names == ["00010", "00015", "00020"]
    write_davis(tmp_path / "lvos", "a", {6: ids}, [1, 6, 11], digits=8)  # LVOS counts from 1
    (video,) = open_vos(tmp_path / "lvos")
    assert video.annotated == [1] and video.frame_names == ["00000001", "00000006", "00000011"]
    assert (tmp_path / "lvos" / "Annotations" / "a" / f"{video.frame_names[1]}.png").is_file()


@pytest.mark.parametrize("numbers", [range(12), range(0, 60, 5), range(1, 13)])
def test_a_lost_frame_is_named_even_where_it_has_no_masks(tmp_path, numbers):
    write_davis(tmp_path, "whole", {numbers[0]: np.ones((8, 10), np.uint8)}, numbers)
    write_davis(tmp_path, "torn", {numbers[0]: np.ones((8, 10), np.uint8)}, [*numbers[:7], *numbers[8:]])
    torn, whole = open_vos(tmp_path)
    assert whole.frames == 12
    for call in (lambda: torn.frames, lambda: torn.annotated, lambda: torn.read([0]), lambda: torn.masks(0)):
        assert refused("torn", call, UnreadableVideo) == "missing_frame"
    with pytest.raises(UnreadableVideo, match=f"frame {numbers[7]} is not in .*torn"):
        torn.frame_names  # noqa: B018


def test_grey_masks_hold_ids_too(tmp_path):
    write_davis(tmp_path, "a", {}, [0])
    save(tmp_path / "Annotations" / "a" / "00000.png", Image.fromarray(np.full((8, 10), 7, np.uint8)))
    assert open_vos(tmp_path)[0].masks(0)[7].all()


def test_pngs_of_ids_are_decoded_once(tmp_path):
    """All of them before the first frame is asked for: what was read then is kept for one look at each frame."""
    ids = np.random.default_rng(0).choice([0, 1, 7, 254, 255], (8, 10)).astype(np.uint8)
    others = np.full((8, 10), 3, np.uint8)
    write_davis(tmp_path, "noise", {0: ids, 1: others}, range(2))
    (video,) = open_vos(tmp_path)
    assert video.objects == [1, 3, 7, 254]
    for png in (tmp_path / "Annotations").rglob("*.png"):
        png.write_bytes(b"changed since")
    for index, wanted in enumerate((ids, others)):
        for number, mask_HW in video.masks(index).items():
            np.testing.assert_array_equal(mask_HW, wanted == number)
        with pytest.raises(UnreadableAnnotations):
            video.masks(index)


def refused(video, call, kind=UnreadableAnnotations):
    with pytest.raises(kind, match=f"'{video}'") as caught:
        call()
    return caught.value.reason


def test_bad_masks_are_named(tmp_path):
    ids = np.ones((8, 10), np.uint8)
    for name in ("colour", "binary", "size", "corrupt", "frame", "words", "good"):
        write_davis(tmp_path, name, {0: ids}, range(3))
    masks = tmp_path / "Annotations"
    save(masks / "colour" / "00001.png", Image.new("RGB", (10, 8), (128, 0, 0)))
    save(masks / "binary" / "00000.png", Image.fromarray(ids * 255))
    save(masks / "size" / "00000.png", Image.fromarray(ids.T))
    (masks / "corrupt" / "00001.png").write_bytes((masks / "corrupt" / "00000.png").read_bytes()[:-30])
    save(masks / "frame" / "00003.png", Image.fromarray(ids))
    save(masks / "words" / "first.png", Image.fromarray(ids))
    (masks / "empty").mkdir()
    videos = {video.name: video for video in open_vos(tmp_path)}  # a bad video does not keep the others from opening
    assert refused("colour", lambda: videos["colour"].objects) == "colour_mask"
    assert refused("binary", lambda: videos["binary"].objects) == "no_ids"
    assert refused("size", lambda: videos["size"].masks(0)) == "size_mismatch"
    assert refused("corrupt", lambda: videos["corrupt"].masks(0)) == "corrupt"
    assert refused("frame", lambda: videos["frame"].annotated, UnreadableVideo) == "missing_frame"
    assert refused("words", lambda: videos["words"].annotated) == "names"
    assert refused("empty", lambda: videos["empty"].objects, (UnreadableAnnotations)) == "missing"
    assert refused("empty", lambda: videos["empty"].frames, UnreadableVideo) == "missing"
    assert videos["good"].masks(0)[1].all()


def test_masks_that_would_be_lost_or_changed_are_refused(tmp_path):
    ids = np.ones((8, 10), np.uint8)
    for name in ("twice", "lossy", "bomb", "capital"):
        write_davis(tmp_path, name, {0: ids}, range(3))
    masks = tmp_path / "Annotations"
    save(masks / "twice" / "0.png", Image.fromarray(ids))
    Image.fromarray(ids).save(masks / "lossy" / "00000.png", "JPEG")
    bomb = bytearray((masks / "bomb" / "00000.png").read_bytes())
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (masks / "bomb" / "00000.png").write_bytes(bomb)
    (masks / "capital" / "00000.png").rename(masks / "capital" / "00000.PNG")
    videos = {video.name: video for video in open_vos(tmp_path)}
    reasons = {"twice": "names", "lossy": "corrupt", "bomb": "huge"}
    for name, reason in reasons.items():
        assert refused(name, lambda name=name: videos[name].objects or videos[name].masks(0)) == reason
    assert videos["capital"].masks(0)[1].all()


def test_16_bit_masks_hold_ids_as_mots_writes_them(tmp_path):
    ids = np.zeros((8, 10), np.uint16)
    ids[:2], ids[2:4], ids[4:6] = 1007, 255, 10_000
    write_davis(tmp_path, "a", {}, range(2))
    save(tmp_path / "Annotations" / "a" / "00000.png", Image.fromarray(ids))
    (video,) = open_vos(tmp_path)
    assert video.objects == [255, 1007], "10000 is void"
    assert all((mask == (ids == number)).all() for number, mask in video.masks(0).items())


@pytest.mark.parametrize(
    ("frames", "masks"),
    [
        (["frame_000000", "frame_000001", "frame_000002"], ["frame_000001", "frame_000002"]),  # CVAT
        (["00000", "00001", "00002"], ["frame_000001", "frame_000002"]),
        (["clip_0_1080p", "clip_1_1080p", "clip_2_1080p"], ["clip_1_1080p"]),
        (["20261128_122000_700", "20261128_122001_400", "20261128_122002_100"], ["20261128_122001_400"]),
    ],
)
def test_masks_belong_to_frames_by_the_names_that_frames_are_read_by(tmp_path, frames, masks):
    for name in frames:
        save(tmp_path / "davis" / "JPEGImages" / "a" / f"{name}.jpg", Image.new("RGB", (10, 8)))
        save(tmp_path / "sav" / "JPEGImages_24fps" / "a" / f"{name}.jpg", Image.new("RGB", (10, 8)))
    for value, name in enumerate(masks, 1):
        image = Image.fromarray(np.full((8, 10), value, np.uint8))
        save(tmp_path / "davis" / "Annotations" / "a" / f"{name}.PNG", image)
        save(tmp_path / "sav" / "Annotations_6fps" / "a" / "000" / f"{name}.png", image)
    (davis,), (sav,) = open_vos(tmp_path / "davis"), open_vos(tmp_path / "sav")
    assert davis.annotated == sav.annotated == list(range(1, 1 + len(masks)))
    for value, index in enumerate(davis.annotated, 1):
        assert davis.masks(index)[value].all() and sav.masks(index)[0].all()


def test_two_folders_of_one_object_are_refused(tmp_path):
    save(tmp_path / "JPEGImages_24fps" / "v" / "00000.jpg", Image.new("RGB", (10, 8)))
    for name in ("001", "1"):
        save(tmp_path / "Annotations_6fps" / "v" / name / "00000.png", Image.new("L", (10, 8), 255))
    assert refused("v", lambda: open_vos(tmp_path)[0].objects) == "names"


def test_lists_and_names_that_would_lose_a_video(tmp_path):
    write_davis(tmp_path, "caf\u00e9", {0: np.ones((8, 10), np.uint8)}, range(3))
    (tmp_path / "val.txt").write_text("\ufeffcaf\u00e9\n", encoding="utf-8")
    assert [video.name for video in open_vos(tmp_path, split="val")] == ["caf\u00e9"]
    (tmp_path / "val.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="val.txt is not a text in UTF-8"):
        open_vos(tmp_path, split="val")
    for folder in ("a", "b"):
        (tmp_path / "sav" / folder).mkdir(parents=True)
        (tmp_path / "sav" / folder / "v_manual.json").write_text("{}")
    with pytest.raises(UserError, match="a/v_manual.json and .*b/v_manual.json are of one video"):
        open_vos(tmp_path / "sav")


# ---- SA-V


def test_an_object_without_a_mask_is_not_annotated_and_one_with_an_empty_mask_is_absent(tmp_path):
    for index in range(6):
        save(tmp_path / "JPEGImages_24fps" / "v" / f"{index:05d}.jpg", Image.new("RGB", (10, 8)))
    full = Image.fromarray(np.full((8, 10), 255, np.uint8))
    for path in ("000/00000.png", "000/00004.png", "002/00004.png"):
        save(tmp_path / "Annotations_6fps" / "v" / path, full)
    save(tmp_path / "Annotations_6fps" / "v" / "001/00000.png", Image.new("L", (10, 8)))
    (video,) = open_vos(tmp_path)
    assert video.objects == [0, 1, 2] and video.annotated == [0, 4]
    assert {name: mask.sum() for name, mask in video.masks(0).items()} == {0: 80, 1: 0}
    assert {name: mask.sum() for name, mask in video.masks(4).items()} == {0: 80, 2: 80}
    save(tmp_path / "Annotations_6fps" / "v" / "002/00000.png", Image.new("RGBA", (10, 8)))
    assert refused("v", lambda: open_vos(tmp_path)[0].masks(0)) == "colour_mask"


def test_sav_train_takes_manual_masks_first_and_frames_of_any_kind(tmp_path):
    masks = np.ones((9, 2, 8, 10), bool)
    for kind, count in (("manual", 2), ("auto", 1)):
        for name in ("both", "only"):
            if (kind, name) != ("manual", "only"):
                text = json.dumps(sav_record(name, masks[:, :count]))
                (tmp_path / f"{name}_{kind}.json").write_text(text)
    for index in (0, 4, 8):  # extracted at 6 per second, under the numbers of 24
        save(tmp_path / "both" / f"{index:05d}.jpg", Image.new("RGB", (10, 8)))
    both, only = open_vos(tmp_path)
    assert both.objects == [0, 1] and both.frames == 3 and both.annotated == [0, 1, 2] and both.masks(2)[1].all()
    assert only.objects == [0]
    assert refused("only.mp4", lambda: only.frames, UnreadableVideo) == "missing"


def test_a_bad_mask_in_a_json_is_named_before_anything_is_tracked(tmp_path):
    content = sav_record("v", np.ones((9, 2, 8, 10), bool))
    content["masklet"][2][1]["counts"] = "\u00e9"
    (tmp_path / "v_manual.json").write_text(json.dumps(content))
    assert refused("v_manual", lambda: open_vos(tmp_path)[0].objects) == "bad_mask"


def test_damaged_pngs_are_named_or_the_same(tmp_path):
    ids = np.zeros((20, 30), np.uint8)
    ids[2:9, 3:9] = 3
    write_davis(tmp_path, "v", {0: ids}, [0], size=ids.shape)
    file, rng = tmp_path / "Annotations" / "v" / "00000.png", np.random.default_rng(0)
    data, named = file.read_bytes(), 0
    for number in range(400):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 5)):
            damaged[place] ^= rng.integers(1, 256)
        file.write_bytes(damaged[: rng.integers(len(data))] if number % 4 == 0 else damaged)
        try:
            assert (open_vos(tmp_path)[0].masks(0)[3] == (ids == 3)).all()
        except UnreadableAnnotations as error:
            named += error.reason in ("corrupt", "huge", "colour_mask")
    assert named > 300
