# SPDX-License-Identifier: Apache-2.0
"""Clips of indexed videos show the frames that their masks belong to: after seeks, and when a file was replaced."""

import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
from numbered_videos import shown, write_video

from effsam3.data.synthetic.videos import sav_record
from effsam3.data.videos.clips import VideoClips
from effsam3.data.videos.index import build_index, summary
from effsam3.data.videos.sav import LATER, load_index


def build(source, out, **options):
    return build_index([source], out, **({"workers": 1, "progress": False} | options))


SEEKS = {  # label: codec, options, whether seeks agree
    "hevc": ("libx265", {"x265-params": "keyint=24:log-level=none:pools=none"}, True),
    "open_gop": ("libx264", {"x264-params": "keyint=24:bframes=3:open-gop=1"}, True),
    "b_frames": ("mpeg4", {"g": "12", "bf": "2"}, True),
    "no_key_frames": ("mpeg4", {"g": "12", "bf": "0"}, False),
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    masks = np.zeros((60, 1, 64, 128), bool)
    masks[:, 0, 40:60, 40:90] = True
    for name, (codec, options, agree) in SEEKS.items():
        write_video(folder / f"{name}.mp4", 60, codec, options)
        if not agree:  # without a list of its key frames, it says that all frames are
            data = (folder / f"{name}.mp4").read_bytes()
            (folder / f"{name}.mp4").write_bytes(data.replace(b"stss", b"free"))
        (folder / f"{name}_manual.json").write_text(json.dumps(sav_record(name, masks)))
    return folder


@pytest.mark.parametrize("check", ["decode", "header"])
def test_clips_show_the_frames_that_their_masks_belong_to(numbered, tmp_path, check):
    report = build(numbered, tmp_path / "index.parquet", check=check)
    index = load_index(tmp_path / "index.parquet")
    agree = {name: check == "decode" and SEEKS[name][2] for name in SEEKS}
    assert dict(zip(index["video_id"], index["seekable"], strict=True)) == agree
    assert report["unseekable"] == sum(not value for value in agree.values())
    assert ("seeks" in summary(report)) == (report["unseekable"] > 0)
    data = VideoClips(index, tmp_path, image_size=128, frames=4, objects=1, augment=False)
    assert data.unseekable == report["unseekable"]
    for position in range(len(data)):
        for number in range(4):  # forwards and backwards
            clip = data[position, number]
            assert shown(clip["pixels"].numpy()) == clip["frames"].tolist() and clip["unreadable"] == []


def test_an_older_index_still_gives_the_right_frames(numbered, tmp_path):
    build(numbered, tmp_path / "index.parquet")
    table = parquet.read_table(tmp_path / "index.parquet")
    parquet.write_table(table.drop_columns(list(LATER)), tmp_path / "index.parquet")
    data = VideoClips(load_index(tmp_path / "index.parquet"), tmp_path, image_size=128, frames=4, augment=False)
    assert data.unseekable == len(data) == 4
    clip = data[0, 1]
    assert shown(clip["pixels"].numpy()) == clip["frames"].tolist()


def test_a_video_replaced_under_its_name_is_noticed(numbered, tmp_path):
    shutil.copytree(numbered, tmp_path / "videos")
    build(tmp_path / "videos", tmp_path / "index.parquet")
    first, second = (tmp_path / "videos" / f"{name}.mp4" for name in list(SEEKS)[:2])
    data = VideoClips(load_index(tmp_path / "index.parquet"), tmp_path, image_size=128, frames=4, augment=False)
    first.write_bytes(second.read_bytes())
    position = list(data.index["video_id"]).index(first.stem)
    clip = data[position]
    assert not clip["valid"].any() and "changed" in clip["unreadable"][0][1]
