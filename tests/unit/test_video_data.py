# SPDX-License-Identifier: Apache-2.0
"""The videos of stage video: which are learned from and held out, and what is refused before anything is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from own_videos import H, W, coco_video, moving, own_videos, walks, write_frames, write_json
from run_folders import RECIPES

from effsam3.data.videos.own_clips import OwnClips
from effsam3.errors import UserError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.video import measuring
from effsam3.stages.video.training import NEEDS, STAGE, videos_of
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/video.yaml"


@pytest.fixture
def overrides(tmp_path):
    return [*own_videos(walks(tmp_path / "own")), f"train.runs={tmp_path}/runs", "data.held_out=0.3"]


def ask(recipe):
    for need in NEEDS:
        need(recipe)


def test_videos_are_held_out_by_name_path_or_list(overrides, tmp_path):
    data = load_recipe(SMOKE, overrides).data
    train, val = videos_of(data)
    assert {one.name for one in train} | {one.name for one in val} == {f"walk{k}" for k in range(4)}
    assert val and not {one.name for one in train} & {one.name for one in val}
    train, val = videos_of(replace(data, val_path=data.path, limit=3))
    assert [one.name for one in train] == [one.name for one in val] == ["walk0", "walk1", "walk2"]


def test_what_a_list_holds_out_is_not_learned(overrides, tmp_path):
    data = load_recipe(SMOKE, overrides).data
    home = Path(data.path).parent
    (home / "val.txt").write_text("walk1\nwalk3\n")
    (home / "train.txt").write_text("walk0\nwalk1\n")
    (home / "all.txt").write_text("walk0\nwalk1\nwalk2\nwalk3\n")
    for split, learned in ((None, ["walk0", "walk2"]), ("train", ["walk0"])):
        train, val = videos_of(replace(data, split=split, val_split="val"))
        assert [one.name for one in train] == learned and [one.name for one in val] == ["walk1", "walk3"]
    with pytest.raises(UserError, match="data.val_split: 'all' leaves no video"):
        videos_of(replace(data, val_split="all"))


def test_masks_are_made_up_only_by_name(overrides, tmp_path):
    for number in range(2):
        write_frames(tmp_path / f"alone{number}", [f"{k:05d}.jpg" for k in range(4)])
    data = load_recipe(SMOKE, [*overrides, f"data.path={tmp_path}"]).data
    with pytest.raises(UserError, match=r"frames or videos without masks.*data.masks: synthetic"):
        videos_of(data)
    (train,), (val,) = videos_of(replace(data, masks="synthetic", held_out=0.5))
    clip = OwnClips([train], 64, frames=3, objects=2)[0]
    assert clip["masks"].any() and {train.name, val.name} == {"alone0", "alone1"}


def spoil(folder: Path, names) -> None:
    """Put frames of another size, than the masks', in the place of these videos'."""
    for name in names:
        write_frames(folder / name, [f"{k:05d}.jpg" for k in range(5)], (H, W + 2))


@pytest.mark.parametrize("part", ["held-out", "training"])
def test_videos_of_which_none_can_be_read_are_refused(overrides, tmp_path, part):
    recipe = load_recipe(SMOKE, overrides)
    train, val = videos_of(recipe.data)
    names = [video.name for video in (val if part == "held-out" else train)]
    spoil(tmp_path / "own", names[:-1])
    ask(recipe)  # one of them is enough
    spoil(tmp_path / "own", names)
    message = rf"data.path: none of the {len(names)} {part} videos can be read \(first: {names[0]}: size_mismatch: .*"
    message += f"run effsam3 data check {recipe.data.path}"
    with pytest.raises(UserError, match=message):
        ask(recipe)
    with pytest.raises(UserError, match=message):
        STAGE.from_recipe(recipe, Report(tmp_path), Accelerator(cpu=True))


def test_frames_that_are_nowhere_are_refused(overrides, tmp_path):
    path = write_json(tmp_path / "nowhere" / "instances.json", coco_video(moving()))
    whole = Path(load_recipe(SMOKE, overrides).data.path)
    with pytest.raises(UserError, match="data.val_path: none of the 1 held-out videos can be read .first: walk: "):
        ask(load_recipe(SMOKE, [*overrides, f"data.val_path={path}"]))
    path.with_name("many.json").write_text(whole.read_text())
    with pytest.raises(UserError, match="data.path: none of the [0-9] training videos can be read .first: walk"):
        ask(load_recipe(SMOKE, [*overrides, f"data.path={path.with_name('many.json')}"]))


def test_a_video_that_is_alone_and_cannot_be_read_is_refused(overrides, tmp_path):
    (tmp_path / "mine/frames").mkdir(parents=True)
    write_frames(tmp_path / "mine/masks/walk", [f"{k:05d}.png" for k in range(5)])
    with pytest.raises(UserError, match="data.path: its only video cannot be read .*'walk'.*; run effsam3 data check"):
        ask(load_recipe(SMOKE, [*overrides, f"data.path={tmp_path / 'mine'}"]))


def test_a_video_that_is_alone_is_described_and_refused_where_nothing_would_be_tracked(overrides, tmp_path):
    path = write_json(tmp_path / "alone.json", coco_video(moving(6)))
    write_frames(tmp_path / "walk", [f"{k:05d}.jpg" for k in range(6)])
    recipe = load_recipe(SMOKE, [*overrides, f"data.path={path}", "data.held_out=0.1"])
    with pytest.raises(UserError, match="data.held_out: 0.1 of the 6 annotated frames of walk.* is 1.* set 0.34 or"):
        ask(recipe)
    recipe = replace(recipe, data=replace(recipe.data, held_out=0.34))
    stage = STAGE.from_recipe(recipe, Report(tmp_path), Accelerator(cpu=True))
    expected = "1 video, divided in time: its last 2 of 6 annotated frames are held out"
    assert expected in stage.describe()["data"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.path", "/nowhere", "data.path: there is no folder or file /nowhere"),
        ("data.val_path", "/nowhere", "data.val_path: there is no folder or file /nowhere"),
        ("data.split", "other", "data.split: there is no other.txt in"),
        ("data.val_split", "other", "data.val_split: there is no other.txt in"),
        ("evaluate.videos", "/nowhere", "evaluate.videos: there is no folder or file /nowhere"),
    ],
)
def test_a_path_or_list_that_is_not_there_is_named_by_its_key(overrides, key, value, message):
    recipe = load_recipe(SMOKE, [*overrides, f"{key}={value}"])
    needs = measuring.NEEDS if key.startswith("evaluate") else NEEDS
    with pytest.raises(UserError, match=f"^{message}"):
        for need in needs:
            need(recipe)
