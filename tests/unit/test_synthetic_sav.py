# SPDX-License-Identifier: Apache-2.0
"""Synthetic SA-V: the released files, true masks, and videos that depend on (seed, number, settings) alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from effsam3.data.synthetic.videos import make_synthetic_sav, make_video, sav_record
from effsam3.data.videos.files import open_video
from effsam3.data.videos.sav import parse_sav

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "sav_000001_manual.json"
MANY = [make_video(number, 40, 64, 3) for number in range(1, 13)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_have_the_released_form(tmp_path):
    make_synthetic_sav(tmp_path, 2, frames=22, side_px=64, objects=4)
    for number in (1, 2):
        truth = make_video(number, 22, 64, 4)
        annotations = parse_sav((tmp_path / f"sav_{number:06d}_manual.json").read_bytes())
        annotations.check_masks()
        video = open_video(tmp_path / f"sav_{number:06d}.mp4")
        assert annotations.video_id == f"sav_{number:06d}" and max(video.size) == 64
        assert annotations.frames == video.frames == 22 and (annotations.height, annotations.width) == video.size
        assert len(annotations.masklet) == 6 and annotations.objects == [0, 1, 2, 3]
        for annotated in range(6):
            for position in range(4):
                assert (annotations.mask(annotated, position) == truth.masks[4 * annotated, position]).all()
        error = np.abs(video.read(range(22)).transpose(0, 2, 3, 1).astype(int) - truth.frames)
        assert error.mean() < 8, "the video shows the frames that were drawn, but for compression"
        assert error.mean() < 0.5 * np.abs(np.roll(truth.frames, 4, 0).astype(int) - truth.frames).mean()


@pytest.mark.parametrize("side_px", [32, 48, 72, 90])
def test_videos_of_every_size_can_be_read(tmp_path, side_px):
    make_synthetic_sav(tmp_path, 10, frames=2, side_px=side_px, objects=1)
    widths = set()
    for number in range(1, 11):
        truth = make_video(number, 2, side_px, 1).frames
        found = open_video(tmp_path / f"sav_{number:06d}.mp4").read([0, 1]).transpose(0, 2, 3, 1)
        assert found.shape == truth.shape and np.abs(found.astype(int) - truth).mean() < 10
        widths.add(found.shape[2])
    assert len(widths) > 1


def test_the_json_has_all_that_the_real_one_has():
    if not SAMPLE.is_file():
        pytest.skip("SA-V's sample annotations are not in ../shared/data")

    def form(value):
        return [form(item) for item in value[:1]] if isinstance(value, list) else type(value)

    real, ours = json.loads(SAMPLE.read_text()), sav_record("sav_000001", MANY[0].masks)
    assert list(real) == list(ours)
    assert {name: form(value) for name, value in real.items()} == {name: form(value) for name, value in ours.items()}
    assert ours["masklet_frame_count"] == [10] * 3 and ours["video_frame_count"] == 40.0


def test_numbers_in_the_json():
    masks = np.zeros((20, 2, 8, 10), bool)
    masks[4:, 0, :4, :5] = True  # from annotated frame 1 on
    masks[0:4, 1, 0, 0] = masks[12:, 1, 0, 0] = True  # on 0, 3 and 4
    found = sav_record("v", masks)
    assert found["masklet_size_abs"] == [20.0, 1.0] and found["masklet_size_rel"] == [0.25, 1 / 80]
    assert found["masklet_first_appeared_frame"] == [1.0, 0.0] and found["masklet_visibility_changes"] == [0, 2]


def test_what_a_tracker_has_to_cope_with_happens():
    left = returned = overlaps = 0
    for video in MANY:
        shown = video.masks.any((2, 3))
        assert shown[:, 0].all(), "the first object stays in view"
        assert shown[0].sum() >= 2 and video.masks.sum((2, 3))[shown].min() >= 12
        left += (~shown).any(0).sum()
        returned += sum((np.diff(object_T.astype(int)) == 1).any() for object_T in shown.T)
        overlaps += (video.masks.sum(1) > 1).any()
        centres = [np.argwhere(mask).mean(0) for mask in video.masks[:, 0]]
        assert np.linalg.norm(np.ptp(centres, axis=0)) > 4, "it moves"
        assert np.linalg.norm(np.diff(centres, axis=0), axis=1).max() < 6, "smoothly"
    assert left >= 6 and returned >= 2 and overlaps == 4
    assert len({video.frames.shape for video in MANY}) > 3


def test_a_video_begins_like_any_moment_of_it():
    def from_the_middle(index):
        shown = [np.argwhere(mask).mean(0) / mask.shape for video in MANY for mask in video.masks[index] if mask.any()]
        return np.linalg.norm(np.array(shown) - 0.5, axis=1).mean()

    later = np.mean([from_the_middle(index) for index in (10, 20, 30, 39)])
    # Objects once all began in a pile in the middle (0.73 of this), the hardest place to be told apart.
    assert from_the_middle(0) > 0.85 * later


def test_a_mask_is_where_the_object_looks_different():
    for video in MANY[:4]:
        steps = np.abs(np.diff(video.frames[::10].astype(float), axis=2)).sum(-1)
        masks = video.masks[::10]
        border = (masks[..., 1:] != masks[..., :-1]).any(1)
        assert steps[border].mean() > 2 * steps[~border].mean()


def test_more_videos_later_leave_the_first_as_they_are(tmp_path):
    small = {"frames": 9, "side_px": 32, "objects": 2, "seed": 5}
    make_synthetic_sav(tmp_path / "a", 2, **small)
    first = contents(tmp_path / "a")
    (tmp_path / "a" / "sav_000002_manual.json").unlink()
    kept = (tmp_path / "a" / "sav_000001.mp4").stat().st_mtime_ns
    make_synthetic_sav(tmp_path / "a", 3, **small)
    make_synthetic_sav(tmp_path / "b", 3, **small)
    later = contents(tmp_path / "a")
    assert later == contents(tmp_path / "b") and first.items() <= later.items() and len(later) == 6
    assert (tmp_path / "a" / "sav_000001.mp4").stat().st_mtime_ns == kept


def test_the_look_of_recipes_stays_as_it_was():
    """Smoke runs and the tiny teacher are measured on these videos: their bytes are known."""
    drawn = hashlib.sha256()
    for number in range(1, 7):
        for objects in (1, 3, 4):
            video = make_video(number, 9, 48, objects)
            drawn.update(video.frames.tobytes() + video.masks.tobytes())
    assert drawn.hexdigest() == "68781827fa4a420558a239a2d31fff7c586bd74bf43b288ed37887bca4983b93"


def test_outlines_are_grey_shapes_inside_a_black_line():
    for number in range(1, 5):
        video = make_video(number, 8, 96, 2, look="outlines")
        frames = video.frames.astype(int)
        assert np.abs(frames - frames.mean(-1, keepdims=True)).mean() < 5  # grey but for noise
        grey_HW, mask_HW, behind_HW = frames[0].mean(-1), video.masks[0, 0], ~video.masks[0].any(0)
        black_HW = grey_HW < 25
        assert 0.1 < black_HW[mask_HW].mean() < 0.6 and not black_HW[behind_HW].any()
        assert grey_HW[mask_HW & ~black_HW].mean() > grey_HW[behind_HW].mean() + 20
