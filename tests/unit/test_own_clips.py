# SPDX-License-Identifier: Apache-2.0
"""Clips of people's own videos: the right frames and masks, drawn from the seed alone, within a bound of memory."""

import numpy as np
import pytest
import torch
from own_videos import coco_video, moving, square, write_frames, write_json
from PIL import Image
from vos_folders import save

from effsam3.data.loader import loader
from effsam3.data.sampler import PADDING
from effsam3.data.synthetic.drawn_masks import synthetic_masks
from effsam3.data.synthetic.videos import make_synthetic_sav
from effsam3.data.videos.held_out import split_videos
from effsam3.data.videos.mask_cache import MaskCache
from effsam3.data.videos.own_clips import OwnClips
from effsam3.data.videos.vos import open_frames, open_vos
from effsam3.errors import UserError

SIDE = 24


def video(folder, masks_TNHW, name="walk"):
    size = masks_TNHW.shape[2:]
    write_frames(folder / name / "frames", [f"{k:05d}.png" for k in range(len(masks_TNHW))], size)
    for k, masks_NHW in enumerate(masks_TNHW):
        for n, mask_HW in enumerate(masks_NHW):
            save(Image.fromarray(mask_HW), folder / name / "masks" / f"{n + 1}" / f"{k:05d}.png")


def clips(folder, **options):
    settings = {"image_size": SIDE, "frames": 4, "objects": 2, "reverse": 0.5, "augment": False, "seed": 0}
    return OwnClips(open_vos(folder), **(settings | options))


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def three(frames=10, size=(SIDE, SIDE)):
    """One square all the time, one from frame 3 on, one up to frame 5."""
    found = [
        [square(2, k, size=size), square(9, k, size=size) & (k >= 3), square(16, k, size=size) & (k <= 5)]
        for k in range(frames)
    ]
    return np.array(found)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_clip_has_objects_that_are_visible_anywhere_in_it(tmp_path, stride):
    masks = three()
    video(tmp_path, masks)
    data, seen = clips(tmp_path, stride=stride), set()
    for number in range(60):
        clip = data[0, number]
        indexes = clip["frames"].tolist()
        step = indexes[1] - indexes[0]
        assert abs(step) == stride and indexes == [indexes[0] + step * time for time in range(4)]
        assert clip["inside"].all() and clip["keys"] == "walk" and clip["numbers"] == number
        assert clip["pixels"].float().mean((1, 2, 3)).tolist() == [10 + 20 * k for k in indexes]
        visible = [n for n in range(3) if masks[indexes, n].any()]
        found = []
        for slot in range(2):
            if clip["valid"][slot]:
                (match,) = [n for n in range(3) if (clip["masks"][:, slot].numpy() == masks[indexes, n]).all()]
                found.append(match)
            else:
                assert not clip["masks"][:, slot].any()
        assert len(found) == min(len(visible), 2) and set(found) <= set(visible)
        seen |= {(indexes[0], step, n) for n in found}
    assert {start for start, step, _ in seen if step > 0} == set(range(10 - 3 * stride)), "every start occurs"
    assert any(start < 3 and step > 0 and n == 1 for start, step, n in seen), "it comes later in the clip"
    assert {step for _, step, _ in seen} == {stride, -stride}


def test_a_short_video_is_padded_with_its_last_frame(tmp_path):
    video(tmp_path, three(3))
    for number in range(8):
        clip = clips(tmp_path, frames=5)[0, number]
        forwards = clip["frames"].tolist() == [0, 1, 2, 2, 2]
        assert forwards or clip["frames"].tolist() == [2, 1, 0, 0, 0]
        assert clip["inside"].tolist() == [True, True, True, False, False]
        assert torch.equal(clip["pixels"][3:], clip["pixels"][2:3].expand(2, -1, -1, -1))
    clip = clips(tmp_path, frames=3, stride=4, reverse=0.0)[0]
    assert clip["frames"].tolist() == [0, 0, 0] and clip["inside"].tolist() == [True, False, False]


def test_the_number_alone_decides_in_any_worker(tmp_path):
    for name in ("a", "b", "c"):
        video(tmp_path, three(), name)
    data = clips(tmp_path, augment=True, seed=3)
    batches = [[(0, 0), (2, 1)], [(1, 2), (0, 3)]]
    alone = [data.__getitems__(batch) for batch in batches]
    for one, other in zip(
        alone, loader(clips(tmp_path, augment=True, seed=3), batches, workers=2, pin=False), strict=True
    ):
        same(one, other)
    same(data[1, 2], {name: value if name == "unreadable" else value[0] for name, value in alone[1].items()})
    frames = [tuple(data[0, number]["frames"].tolist()) for number in range(20)]
    other = clips(tmp_path, augment=True, seed=4)
    assert len(set(frames)) > 5 and frames != [tuple(other[0, number]["frames"].tolist()) for number in range(20)]
    same(data[1], data[1, 1])


def test_an_object_that_is_rarely_there_is_found(tmp_path):
    masks = np.zeros((60, 1, 12, 12), bool)
    masks[41, 0, 2:9, 2:9] = True
    video(tmp_path, masks)
    data = clips(tmp_path, image_size=12)
    for number in range(12):
        clip = data[0, number]
        assert 41 in clip["frames"].tolist() and clip["valid"].tolist() == [True, False]
    assert len({tuple(data[0, number]["frames"].tolist()) for number in range(12)}) > 3


def test_a_video_without_a_visible_object_is_replaced_and_named(tmp_path):
    video(tmp_path, np.zeros((5, 1, SIDE, SIDE), bool), "never")
    tiny = np.zeros((5, 1, 96, 96), bool)
    tiny[:, :, 50, 50] = True
    video(tmp_path, tiny, "tiny")
    data = clips(tmp_path)
    batch = data.__getitems__([0, 1, PADDING])
    assert not batch["valid"].any() and not batch["inside"].any() and batch["keys"] == ["", "", ""]
    assert [(key, text.split(":")[0]) for key, text in batch["unreadable"]] == [
        ("never", "no_object"),
        ("tiny", "no_object"),
    ]
    video(tmp_path, three(), "good")
    data = clips(tmp_path)
    assert [one.name for one in data.videos] == ["good", "never", "tiny"]
    for number in range(6):
        clip = data[1, number]
        assert (
            clip["keys"] == "good"
            and clip["valid"].any()
            and ("never", clip["unreadable"][0][1]) in clip["unreadable"]
        )
    (tmp_path / "good" / "frames" / "00004.png").unlink()
    assert {"good", "never", "tiny"} == {key for key, _ in data.__getitems__([0, 1, 2])["unreadable"]}
    with pytest.raises(UserError, match="no video to draw clips from"):
        OwnClips([], 24)


def test_an_object_that_is_not_annotated_on_every_frame_of_a_clip_is_not_drawn(tmp_path):
    content = coco_video(moving(6))
    for annotation in content["annotations"]:
        if annotation["track_id"] == 2 and annotation["image_id"] == 4:
            annotation |= {"segmentation": [], "bbox": [1, 2, 3, 4]}  # it is there, but nobody knows where
    write_frames(tmp_path / "walk", [f"{k:05d}.jpg" for k in range(6)])
    write_json(tmp_path / "videos.json", content)
    data = clips(tmp_path, frames=2, reverse=0.0)
    for number in range(30):
        clip = data[0, number]
        assert clip["valid"].sum() == (2 if clip["frames"].tolist() in ([1, 2], [4, 5]) else 1)


def test_no_object_is_moved_out_of_the_frame_that_shows_it(tmp_path):
    masks = np.zeros((4, 2, SIDE, SIDE), bool)
    masks[:, 0, 8:16, 8:16] = True
    masks[2, 1, :2, :2] = True  # in the corner, on one frame only: most turns move it out
    video(tmp_path, masks)
    data = clips(tmp_path, augment=True)
    for number in range(30):
        clip = data[0, number]
        assert clip["masks"].flatten(2).any(2).any(0).all() and clip["valid"].all()


def test_a_clip_is_turned_although_an_object_comes_later(tmp_path):
    masks = np.zeros((4, 1, SIDE, SIDE), bool)
    masks[2, 0, 10:14, 4:20] = True
    video(tmp_path, masks)
    upright = [torch.from_numpy(masks[2, 0]), torch.from_numpy(masks[2, 0]).flip(1)]
    data = clips(tmp_path, augment=True)
    found = [data[0, number]["masks"].any(0)[0] for number in range(20)]
    assert sum(not any(torch.equal(mask, plain) for plain in upright) for mask in found) > 10


def test_masks_are_cached_within_a_bound(tmp_path):
    video(tmp_path, three(10, (64, 64)))
    plenty, little = clips(tmp_path), clips(tmp_path, cache_bytes=4000)
    for number in range(40):
        same(plenty[0, number], little[0, number])
        assert little.cache.held_bytes <= 4000
    assert plenty.cache.decoded == 10 and 10 < little.cache.decoded <= 160
    assert plenty.cache.held_bytes == 10 * 200 + three().any((2, 3)).sum() * (200 + 64 * 64 // 8)
    video_of = plenty.videos[0]
    for index in range(10):
        found, masks = plenty.cache.read(0, video_of, index).masks, video_of.masks(index)
        assert set(found) == {name for name in masks if masks[name].any()}
        assert all((found[name].mask() == masks[name]).all() for name in found)
    cache = MaskCache(5000)  # two frames of this video
    for index in (3, 4, 3, 5, 3):
        cache.read(0, video_of, index)
    assert cache.decoded == 3, "the frame that was read longest ago goes first"


def test_a_clip_only_reads_its_own_masks(tmp_path):
    """A PNG of ids tells of all objects of its frame: the others are not looked at for it."""
    masks = three(12)
    write_frames(tmp_path / "frames" / "walk", [f"{k:05d}.png" for k in range(12)], (SIDE, SIDE))
    for k in range(12):
        ids = (masks[k] * np.array([[[3]], [[4]], [[5]]], np.uint8)).max(0)
        ids[0, 0] = 255  # void
        save(Image.fromarray(ids), tmp_path / "masks" / "walk" / f"{k:05d}.png")
    (tmp_path / "masks" / "walk" / "00011.png").write_bytes(b"torn")
    data = clips(tmp_path, frames=2, objects=3, reverse=0.0)
    assert not data.videos[0].notes
    torn = 0
    for number in range(30):
        clip = data[0, number]
        indexes = clip["frames"].tolist()
        visible = [n for n in range(3) if masks[indexes, n].any()]
        found = clip["masks"].transpose(0, 1)[clip["valid"]].any(3).any(2).tolist()
        assert sorted(found) == sorted(masks[indexes, n].any((1, 2)).tolist() for n in visible)
        assert 11 not in indexes, "it is replaced by another clip"
        torn += any(text.startswith("corrupt") for _, text in clip["unreadable"])
    assert 0 < torn < 10
    with pytest.raises(UserError, match="00011.png"):
        data.videos[0].objects  # noqa: B018


# ---- held out


def test_videos_are_divided_by_their_names(tmp_path):
    for k in range(12):
        video(tmp_path, three(1), f"v{k:02d}")
    videos = open_vos(tmp_path)
    names = [{one.name for one in side} for side in split_videos(videos, 0.3)]
    assert names[0] | names[1] == {one.name for one in videos} and not names[0] & names[1] and 1 <= len(names[1]) <= 7
    fewer = [{one.name for one in side} for side in split_videos(videos[3:][::-1], 0.3)]
    assert fewer[0] <= names[0] and fewer[1] <= names[1], "a video's side does not depend on the others"
    assert any({one.name for one in split_videos(videos, 0.3, seed)[1]} != names[1] for seed in (1, 2, 3))
    for fraction in (1e-9, 1 - 1e-9):
        train, val = split_videos(videos, fraction)
        assert min(len(train), len(val)) == 1
    with pytest.raises(UserError, match="no video"):
        split_videos([], 0.5)


def test_a_video_that_is_alone_is_divided_in_time(tmp_path):
    video(tmp_path, three())
    (train,), (val,) = split_videos(open_vos(tmp_path), 0.3)
    assert (train.name, val.name) == ("walk_train", "walk_val") and (train.frames, val.frames) == (7, 3)
    assert train.frame_names + val.frame_names == [f"{k:05d}" for k in range(10)]
    assert train.annotated == list(range(7)) and val.annotated == [0, 1, 2]
    for index in range(3):
        assert (val.masks(index)[2] == three()[7 + index, 1]).all()
        assert val.read([index]).mean() == 10 + 20 * (7 + index)
    with pytest.raises(UserError, match="frame 7 of frames 0 to 6 of walk"):
        train.read([7])
    with pytest.raises(UserError, match="frame -1"):
        val.read([-1])
    assert OwnClips([val], SIDE, frames=3, augment=False)[0]["frames"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="data.held_out: 0.1 of the 10 annotated frames of walk, .* is 1, .* 0.2 or"):
        split_videos(open_vos(tmp_path), 0.1)
    assert [len(part.annotated) for (part,) in split_videos(open_vos(tmp_path), 0.2)] == [8, 2]
    assert [len(part.annotated) for (part,) in split_videos(open_vos(tmp_path), 0.99)] == [2, 8]
    video(tmp_path / "few", three(3))
    with pytest.raises(UserError, match="has 3 annotated frames; 4 are needed"):
        split_videos(open_vos(tmp_path / "few"), 0.5)


# ---- synthetic masks


def test_shapes_are_drawn_over_frames_only_where_asked_for(tmp_path):
    make_synthetic_sav(tmp_path / "made", 1, frames=12, side_px=64, objects=1)
    (tmp_path / "alone").mkdir()
    (tmp_path / "made" / "sav_000001.mp4").rename(tmp_path / "alone" / "a.mp4")
    write_frames(tmp_path / "alone" / "b", [f"{k}.png" for k in range(12)], (40, 64))
    with pytest.raises(UserError, match="without masks.*data.masks: synthetic"):
        open_vos(tmp_path / "alone")
    plain = open_frames(tmp_path / "alone")
    assert [one.name for one in plain] == ["a", "b"] and plain[0].frames == 12 and plain[0].annotated == []
    drawn = synthetic_masks(plain, seed=1)
    for before, after in zip(plain, drawn, strict=True):
        assert after.annotated == list(range(12)) and after.objects == [1, 2, 3] and after.size == before.size
        assert after.notes[0].reason == "synthetic"
        frames, painted = before.read([0, 5]), after.read([0, 5])
        for index, old, new in zip((0, 5), frames, painted, strict=True):
            masks = np.array(list(after.masks(index).values()))
            changed = (old != new).any(0)
            assert masks.any() and not (masks.sum(0) > 1).any() and changed.sum() > 0.9 * masks.any(0).sum()
            assert masks.any(0)[changed].mean() > 0.99, "only the shapes are painted"
        assert any((after.masks(0)[1] != after.masks(11)[1]).ravel()), "they move"
    again, other = synthetic_masks(plain, seed=1), synthetic_masks(plain, seed=2)
    assert (again[1].read([3]) == drawn[1].read([3])).all() and (other[1].read([3]) != drawn[1].read([3])).any()
    batch = OwnClips(drawn, SIDE, frames=4)[1, 5]
    assert batch["valid"].any() and batch["masks"].any()
