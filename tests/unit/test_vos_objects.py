# SPDX-License-Identifier: Apache-2.0
"""Ids of objects in predictions and scores: none is lost, and no numbering changes a score."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from disc_videos import SIZE, Video, sure_tracker
from PIL import Image
from vos_folders import write_vos_trees

from effsam3.benchmarks.jaccard import DavisScorer
from effsam3.benchmarks.tracking import TrackedFrame
from effsam3.benchmarks.vos import PredictionFolder, vos
from effsam3.data.synthetic.videos import mp4_bytes, sav_record
from effsam3.data.videos.vos import open_vos
from effsam3.data.videos.vos_video import FromOne
from effsam3.errors import UserError


@pytest.fixture(scope="module")
def tracker():
    return sure_tracker()


def test_davis_numbers_the_objects_of_sav_from_one(tracker, tmp_path):
    """SA-V's first object is 0, which is background in DAVIS' PNGs."""
    write_vos_trees(tmp_path, 1, frames=13, side_px=64, objects=2)
    (video,) = open_vos(tmp_path / "sav_val")
    assert video.objects == [0, 1] and all(mask.any() for mask in video.masks(0).values())
    result = vos({"it": tracker}, [video], "davis", predictions=tmp_path / "predictions")
    assert [row["object"] for row in result["objects"]] == [1, 2] and not result["failed"]
    first = np.array(Image.open(tmp_path / "predictions" / "it" / video.name / "00000.png"))
    alone = video.masks(0)[0] & ~video.masks(0)[1]
    assert set(np.unique(first)) == {0, 1, 2} and (first[alone] == 1).all()


def renamed(video, ids):
    """The same video with other ids for its objects, ascending."""
    found = copy.copy(video)
    place = dict(zip(ids, video.objects, strict=True))
    found.objects, found.masks = tuple(ids), lambda index: {one: video.masks(index)[place[one]] for one in ids}
    found.read = lambda indexes: video.read(indexes)
    found.numbered_from_one = lambda: video
    return found


KEPT = [(7, 12), (100, 254)]
RENUMBERED = [(0, 5), (3, 255), (9, 70_000), (-1, 4)]


@pytest.mark.parametrize(("ids", "written"), [*((ids, ids) for ids in KEPT), *((ids, (1, 2)) for ids in RENUMBERED)])
def test_ids_are_kept_where_a_png_can_hold_them_and_never_change_scores(tracker, tmp_path, ids, written):
    plain = vos({"it": tracker}, [Video()], "davis", predictions=tmp_path / "plain")
    found = vos({"it": tracker}, [renamed(Video(), ids)], "davis", predictions=tmp_path / "found")
    assert found["trackers"]["it"]["J&F"] == plain["trackers"]["it"]["J&F"] < 1 and not found["failed"]
    assert [row["object"] for row in found["objects"]] == list(written)
    for file in (tmp_path / "plain/it/discs").iterdir():
        expected = np.array([0, *written])[np.array(Image.open(file))]
        assert (np.array(Image.open(tmp_path / "found/it/discs" / file.name)) == expected).all()


def test_more_objects_than_a_png_can_hold(tracker, tmp_path):
    """They are scored, and refused where they would have to be written as one byte."""
    masks = np.zeros((9, 300, 20, 30), bool)
    for number in range(300):
        masks[:, number].reshape(9, -1)[:, 2 * number : 2 * number + 2] = True
    (tmp_path / "v_manual.json").write_text(json.dumps(sav_record("v", masks)))
    (tmp_path / "v.mp4").write_bytes(mp4_bytes(np.zeros((9, 20, 30, 3), np.uint8)))
    video = open_vos(tmp_path)[0].numbered_from_one()
    scorer = DavisScorer(video.name)
    for index in video.annotated:
        scorer.add(video.masks(index), video.masks(index))
    assert [score.J for score in scorer.scores().values()] == [1.0] * 300, "255 is an object like any other"
    folder = PredictionFolder(tmp_path, video, "it", per_object=False)
    frame = TrackedFrame(0, np.zeros((20, 30, 3), np.uint8), None, {"it": video.masks(0)}, frozenset())
    with pytest.raises(UserError, match="v: 300 objects do not fit into PNGs of ids, which end at 254; set evaluate"):
        folder.add(frame)
    (tmp_path / "each").mkdir()
    PredictionFolder(tmp_path / "each", video, "it", per_object=True).add(frame)
    assert len(list((tmp_path / "each").rglob("*.png"))) == 300


def test_davis_numbers_what_the_first_frame_shows_first():
    """It takes objects up to the first frame's highest id, so one that comes later must not stand between."""
    seen = {0: (0, 5), 4: (0, 3, 5)}  # object 3 comes on frame 4

    def masks(number):
        return {name: np.full(SIZE, name in seen[number]) for name in (0, 3, 5)}

    video = FromOne(SimpleNamespace(objects=[0, 3, 5], numbers=[0, 4], masks=masks))
    assert video.objects == [1, 2, 3]
    assert [mask.any() for _, mask in sorted(video.masks(0).items())] == [True, True, False]
