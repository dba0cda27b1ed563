# SPDX-License-Identifier: Apache-2.0
"""Clips for training: the right frames and masks, drawn from the seed alone, and never fewer than asked for."""

import json

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from effsam3.data.indexing import arrow_schema
from effsam3.data.loader import loader
from effsam3.data.sampler import PADDING
from effsam3.data.synthetic.videos import make_synthetic_sav, sav_record
from effsam3.data.videos.clips import Augmentation, VideoClips
from effsam3.data.videos.index import build_index
from effsam3.data.videos.sav import COLUMNS, SavAnnotations, load_index
from effsam3.errors import UserError

SIDE = 24
ANNOTATED = 10


def square(left, top=4, side=6):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def write(folder, name, masks_ANHW, frames_AHW3=None):
    """Write a video of annotated frames only: frame k is of brightness 10 + 20k unless given. Returns the row."""
    count, objects, height, width = masks_ANHW.shape
    (folder / name).mkdir(parents=True)
    for index in range(count):
        flat = np.full((height, width, 3), 10 + 20 * index, np.uint8)
        image = Image.fromarray(flat if frames_AHW3 is None else frames_AHW3[index])
        image.save(folder / name / f"{4 * index:05d}.png")
    file = folder / f"{name}_manual.json"
    file.write_text(json.dumps(sav_record(name, masks_ANHW.repeat(4, 0))))
    shown = masks_ANHW.any((2, 3))
    return {
        "key": f"{name}_manual", "split": "train", "video_id": name, "kind": "manual", "video_file": name,
        "annotation_file": file.name, "annotation_bytes": file.stat().st_size, "frames": 4 * count, "annotated": count,
        "gaps": [], "height": height, "width": width, "objects": objects,
        "visible": [np.flatnonzero(np.diff(np.r_[0, row, 0])).tolist() for row in shown.T],
    }  # fmt: skip


def clips(rows, folder, **options):
    index = Dataset(pyarrow.Table.from_pylist(rows, arrow_schema(COLUMNS)))
    settings = {"image_size": SIDE, "frames": 4, "objects": 2, "reverse": 0.5, "augment": False, "seed": 0}
    return VideoClips(index, folder, **(settings | options))


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Three objects: one goes right, one comes at annotated frame 3, one leaves after 5. Returns (folder, masks)."""
    folder = tmp_path_factory.mktemp("moving")
    masks = np.zeros((ANNOTATED, 3, SIDE, SIDE), bool)
    for index in range(ANNOTATED):
        masks[index, 0] = square(left=index, top=2)
        masks[index, 1] = square(left=index, top=9) & (index >= 3)
        masks[index, 2] = square(left=index, top=16) & (index <= 5)
    row = write(folder, "v", masks)
    assert row["visible"] == [[0, 10], [3, 10], [0, 6]]
    return folder, row, masks


def test_a_clip_is_consecutive_frames_with_their_masks(moving):
    folder, row, masks = moving
    data = clips([row], folder, objects=2)
    seen, directions = set(), []
    for number in range(60):
        clip = data[0, number]
        assert clip["pixels"].dtype == torch.uint8 and clip["pixels"].shape == (4, 3, SIDE, SIDE)
        assert clip["masks"].dtype == torch.bool and clip["masks"].shape == (4, 2, SIDE, SIDE)
        assert clip["keys"] == "v_manual" and clip["numbers"] == number and not clip["unreadable"]
        annotated = (clip["frames"] // 4).tolist()
        step = annotated[1] - annotated[0]
        assert clip["frames"].dtype == torch.int64 and (clip["frames"] % 4 == 0).all() and abs(step) == 1
        assert annotated == [annotated[0] + step * time for time in range(4)]
        brightness = clip["pixels"].float().mean((1, 2, 3)).tolist()
        assert brightness == [10 + 20 * index for index in annotated], "the pixels are those frames"
        visible = [position for position in range(3) if masks[annotated[0], position].any()]
        assert clip["valid"].tolist() == [True] * min(len(visible), 2) + [False] * (2 - min(len(visible), 2))
        found = []
        for slot in range(2):
            truths = [masks[annotated, position] for position in range(3)]
            if clip["valid"][slot]:
                matches = [p for p in range(3) if (clip["masks"][:, slot].numpy() == truths[p]).all()]
                found += matches
                assert len(matches) == 1 and matches[0] in visible
            else:
                assert not clip["masks"][:, slot].any()
        assert len(set(found)) == len(found)
        directions.append(step)
        seen |= {(annotated[0], step, tuple(sorted(found)))}
    assert {start for start, step, _ in seen if step == 1} == set(range(7)), "every start occurs"
    assert {start for start, step, _ in seen if step == -1} == set(range(3, 10))
    assert {pair for _, _, pair in seen} >= {(0, 1), (0, 2), (1, 2)}, "objects are drawn, not the first taken"
    assert 15 < directions.count(-1) < 45


@pytest.mark.parametrize(("reverse", "step"), [(0.0, 4), (1.0, -4)])
def test_direction(moving, reverse, step):
    folder, row, _ = moving
    data = clips([row], folder, reverse=reverse)
    assert {int(data[0, number]["frames"].diff()[0]) for number in range(20)} == {step}


def test_the_number_alone_decides(moving):
    folder, row, _ = moving
    other = dict(row, key="w_manual")
    data, again = (clips([row, other], folder, augment=True, seed=3) for _ in range(2))
    batch = data.__getitems__([(0, 7), (1, 8), (0, 9)])
    assert batch["pixels"].shape == (3, 4, 3, SIDE, SIDE) and batch["masks"].shape == (3, 4, 2, SIDE, SIDE)
    assert batch["valid"].shape == (3, 2) and batch["keys"] == ["v_manual", "w_manual", "v_manual"]
    for place, item in ((2, (0, 9)), (0, (0, 7)), (1, (1, 8))):
        np.random.seed(place)
        torch.manual_seed(place)
        single = again[item]
        same(single, {name: value if name == "unreadable" else value[place] for name, value in batch.items()})
    frames = [tuple(data[0, number]["frames"].tolist()) for number in range(30)]
    assert len(set(frames)) > 5
    differs = [tuple(clips([row], folder, seed=4)[0, number]["frames"].tolist()) for number in range(30)]
    assert frames != differs
    same(data[1], data[1, 1])


def test_workers_give_the_same_clips(tmp_path):
    make_synthetic_sav(tmp_path / "videos", 4, frames=24, side_px=48, objects=3)
    build_index([tmp_path / "videos"], tmp_path / "index.parquet", 0.0, workers=1, progress=False)
    data = VideoClips(load_index(tmp_path / "index.parquet"), tmp_path, image_size=32, frames=3, objects=2, seed=1)
    batches = [[(0, 0), (3, 1)], [(2, 2), (1, 3)]]
    alone = list(loader(data, batches, workers=0, pin=False))  # opens videos in this process, before the fork
    loaded = DataLoader(data, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=2, timeout=60)
    for one, other in zip(alone, loaded, strict=True):
        same(one, other)
    assert all(batch["valid"][:, 0].all() for batch in alone)


# ---- clips that cannot be had


def test_rows_without_a_clip_are_left_out(tmp_path):
    masks = np.broadcast_to(square(4), (6, 1, SIDE, SIDE))
    never = np.zeros((6, 1, SIDE, SIDE), bool)
    at_end = never.copy()
    at_end[5] = square(3)
    rows = [
        write(tmp_path, "short", masks[:3]), write(tmp_path, "good", masks), write(tmp_path, "never", never),
        write(tmp_path, "end", at_end),
    ]  # fmt: skip
    data = clips(rows, tmp_path)
    assert list(data.index["video_id"]) == ["good", "end"] and set(data.left_out) == {"short_manual", "never_manual"}
    assert "3 annotated frames, clips have 4" in data.left_out["short_manual"]
    assert "no object is visible" in data.left_out["never_manual"]
    for number in range(10):  # only backwards: forwards no clip begins where there is an object
        assert data[1, number]["frames"].tolist() == [20, 16, 12, 8] and data[1, number]["valid"].tolist() == [
            True,
            False,
        ]
    assert list(clips(rows, tmp_path, reverse=0.0).index["video_id"]) == ["good"]
    with pytest.raises(UserError, match="none of 2 videos has a clip of 4.*short_manual: 3 annotated"):
        clips([rows[0], rows[2]], tmp_path)


def test_a_gap_is_in_no_clip(tmp_path):
    row = write(tmp_path, "gap", np.broadcast_to(square(4), (12, 1, SIDE, SIDE))) | {"gaps": [4, 10]}
    data = clips([row], tmp_path)
    starts = {min(data[0, number]["frames"].tolist()) // 4 for number in range(60)}
    assert starts == {0, 5, 6}


def test_a_video_that_cannot_be_read_is_replaced_and_named(tmp_path):
    masks = np.broadcast_to(square(4), (6, 1, SIDE, SIDE))
    rows = [write(tmp_path, f"v{number}", masks) for number in range(3)]
    data = clips(rows, tmp_path)
    (tmp_path / "v1" / "00008.png").unlink()  # in the middle: every clip of 4 of 6 frames has it
    (tmp_path / "v2_manual.json").write_text("{}")
    batch = data.__getitems__([(0, 0), (1, 1), (2, 2)])
    assert batch["keys"][0] == "v0_manual" and set(batch["keys"]) == {"v0_manual"} and batch["valid"][:, 0].all()
    assert batch["masks"][:, :, 0].any((2, 3)).all()
    reasons = dict(batch["unreadable"])
    assert set(reasons) == {"v1_manual", "v2_manual"}
    assert "missing_frame" in reasons["v1_manual"] and "changed" in reasons["v2_manual"]
    same(batch, clips(rows, tmp_path).__getitems__([(0, 0), (1, 1), (2, 2)]))

    # Validation asks for this very video.
    batch = data.__getitems__([0, 1, PADDING])
    assert (
        batch["keys"] == ["v0_manual", "", ""]
        and batch["numbers"] == [0, 1, 0]
        and batch["valid"][:, 0].tolist() == [True, False, False]
    )
    assert not batch["masks"][1:].any() and [key for key, _ in batch["unreadable"]] == ["v1_manual"]

    (tmp_path / "v0_manual.json").unlink()
    batch = data.__getitems__([(0, 0), (0, 1)])  # nothing can be read: still a batch, which counts for nothing
    assert batch["keys"] == ["", ""] and not batch["valid"].any() and batch["pixels"].shape == (2, 4, 3, SIDE, SIDE)
    assert {key for key, _ in batch["unreadable"]} >= {"v0_manual"} and len(batch["unreadable"]) > 8


def test_a_truncated_mp4_is_replaced_and_named(tmp_path):
    make_synthetic_sav(tmp_path, 2, frames=24, side_px=32, objects=2)
    build_index([tmp_path], tmp_path / "index.parquet", 0.0, workers=1, progress=False)
    data = VideoClips(load_index(tmp_path / "index.parquet"), tmp_path, SIDE, frames=3, objects=1, augment=False)
    whole = (tmp_path / "sav_000001.mp4").read_bytes()
    (tmp_path / "sav_000001.mp4").write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    clip = data[0, 5]
    assert clip["keys"] == "sav_000002_manual" and clip["valid"].all()
    assert clip["unreadable"][0][0] == "sav_000001_manual" and "corrupt" in clip["unreadable"][0][1]


def test_another_size_than_the_masks_is_named(tmp_path):
    row = write(tmp_path, "v", np.broadcast_to(square(4), (6, 1, SIDE, SIDE)), np.zeros((6, 20, 30, 3), np.uint8))
    clip = clips([row], tmp_path)[0]
    assert not clip["valid"].any() and "size_mismatch" in clip["unreadable"][0][1]


def test_of_a_thousand_objects_only_a_few_are_decoded(tmp_path, monkeypatch):
    masks = np.zeros((4, 1000, SIDE, SIDE), bool)
    masks[..., 3:9, 3:9] = True
    row = write(tmp_path, "crowd", masks)
    decoded, decode = [], SavAnnotations.mask
    monkeypatch.setattr(SavAnnotations, "mask", lambda *asked: decoded.append(asked[1:]) or decode(*asked))
    batch = clips([row], tmp_path, objects=3).__getitems__([(0, 0), (0, 1)])
    assert batch["masks"].shape == (2, 4, 3, SIDE, SIDE) and batch["valid"].all()
    assert len({position for _, position in decoded}) == 6 and len(decoded) <= 2 * (3 + 3 * 4)


# ---- sizes


def test_frames_and_masks_are_resized_to_a_square(tmp_path):
    masks = np.zeros((4, 2, 48, 96), bool)
    masks[:, 0, 12:36, 24:72] = True
    masks[:, 1, 0, 0] = True  # a pixel of 4 x 2 that become one: less than half is covered
    frames = np.zeros((4, 48, 96, 3), np.uint8)
    frames[:, 12:36, 24:72] = 255
    data = clips([write(tmp_path, "v", masks, frames)], tmp_path)
    for number in range(5):
        clip = data[0, number]
        assert clip["valid"].tolist() == [True, False] and not clip["masks"][:, 1].any()
        truth = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        truth[6:18, 6:18] = True
        assert (clip["masks"][:, 0] == truth).all() and ((clip["pixels"] > 127) == truth).all()


def test_a_first_frame_of_too_small_objects_gives_no_clip(tmp_path):
    masks = np.zeros((4, 1, 96, 96), bool)
    masks[:, :, 50, 50] = True
    clip = clips([write(tmp_path, "v", masks)], tmp_path)[0]
    assert not clip["valid"].any() and clip["unreadable"][0][1].startswith("too_small: at 24 px")


# ---- augmentation


def test_augmentation_is_alike_over_a_clip_and_for_masks(tmp_path):
    size = (40, 64)
    masks = np.zeros((4, 2, *size), bool)
    masks[:, 0, 8:22, 10:30], masks[:, 1, 24:36, 40:60] = True, True
    frames = np.full((4, *size, 3), (40, 60, 50), np.uint8)
    frames[masks[:, 0]], frames[masks[:, 1]] = (230, 40, 30), (30, 60, 240)
    row = write(tmp_path, "still", masks, frames)
    data = clips([row], tmp_path, augment=True, image_size=64, reverse=0.0)
    plain = clips([row], tmp_path, augment=False, image_size=64, reverse=0.0)[0]
    flicker, grey, mirrored = [], 0, 0
    for number in range(40):
        clip = data[0, number]
        pixels = clip["pixels"].float()
        assert clip["valid"].all() and (clip["masks"] == clip["masks"][:1]).all(), "one geometry for all frames"
        masks_NSS = clip["masks"][0]
        behind = pixels[0][:, ~masks_NSS.any(0)].median(1).values
        for slot in range(2):
            inside = pixels[0][:, masks_NSS[slot]].median(1).values
            far, near = ((pixels[0] - colour[:, None, None]).norm(dim=0) for colour in (behind, inside))
            looks = (near < far) & ~masks_NSS[1 - slot]
            assert (looks & masks_NSS[slot]).sum() > 0.85 * masks_NSS[slot].sum(), "the mask is where its object is"
        is_grey = bool((clip["pixels"][:, 0] == clip["pixels"][:, 2]).all())
        grey += is_grey
        brightness = pixels.mean((1, 2, 3))
        flicker.append(float(brightness.max() - brightness.min()))
        red, blue = ((pixels[0, c] - pixels[0, 2 - c]).argmax() % 64 for c in (0, 2))
        mirrored += bool(red > blue) and not is_grey
    assert 8 < mirrored < 32 and 0 < grey < 10 and 2 < max(flicker) < 60
    assert not torch.equal(plain["pixels"], clip["pixels"])


def test_no_object_is_moved_out_of_the_first_frame(tmp_path):
    masks = np.zeros((4, 1, SIDE, SIDE), bool)
    masks[:, :, :2, :2] = True  # in the corner: most turns move it out
    data = clips([write(tmp_path, "corner", masks)], tmp_path, augment=True)
    lost = 0
    for number in range(40):
        clip = data[0, number]
        assert clip["valid"].tolist() == [True, False] and clip["masks"][:, 0].flatten(1).any(1).all()
        augmentation = Augmentation.draw(np.random.default_rng(number))
        lost += not augmentation.move_masks(torch.from_numpy(masks[0])).any()
    assert lost > 10, "the draws do move it out"
