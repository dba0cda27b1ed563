# SPDX-License-Identifier: Apache-2.0
"""Numbers of frames from the names that tools give them: in their order, or refused with two names."""

import hashlib
import random

import numpy as np
import pytest
from PIL import Image

from effsam3.data.videos.frame_folder import FrameFolder
from effsam3.data.videos.frame_numbers import UnclearNames, match_names, missing_numbers, number_names
from effsam3.errors import UserError


def md5(number):
    return hashlib.md5(str(number).encode()).hexdigest()


COUNTED = {  # label: (a name for each number, numbers)
    "plain": (lambda i: f"{i}", [0, 1, 2, 9, 10, 11, 100]),
    "padded": (lambda i: f"{i:05d}", range(12)),
    "prefix": (lambda i: f"cam3_frame{i}", [2, 10]),
    "resolution behind it": (lambda i: f"frame_{i:04d}_1080p", range(12)),
    "size behind it": (lambda i: f"{i}-x264-1280x720", range(12)),
    "copy": (lambda i: f"walk {i} (1)", range(3, 15)),
    "count": (lambda i: f"{i:03d}-of-120", range(12)),
    "version": (lambda i: f"shot.{i}.v2", range(8, 13)),
    "rate": (lambda i: f"walk-{i}@24fps", range(0, 60, 5)),
    "label": (lambda i: f"{i:04d}_{'cat' if i % 2 else 'dog'}", range(12)),
    "roboflow": (lambda i: f"walk_mp4-{i:04d}_jpg.rf.{md5(i)}", range(12)),
    "roboflow, some frames": (lambda i: f"walk_mp4-{i:04d}_jpg.rf.{md5(i)}", [3, 7, 8, 30, 31, 99]),
    "two of roboflow": (lambda i: f"walk_mp4-{i:04d}_jpg.rf.{md5(i)}", [7, 9]),
    "hash first": (lambda i: f"{md5(i)}_{i}", range(12)),
    "number and time": (lambda i: f"f{i}_t{i * 33.37:.0f}", range(1, 13)),
    "number and decimal time": (lambda i: f"f{i:03d}_{i / 24:.4f}", range(30)),
    "behind a point": (lambda i: f"clip1.{i}", range(1, 13)),
    "shot and number": (lambda i: f"shot{1 + i // 5}_{i}", range(12)),
    "one alone": (lambda i: f"frame_{i:06d}", [7]),
}


@pytest.mark.parametrize("label", COUNTED)
def test_the_number_that_differs_and_counts(label):
    name, numbers = COUNTED[label]
    names = [name(number) for number in numbers]
    assert list(number_names(random.Random(0).sample(names, len(names))).items()) == list(
        zip(names, numbers, strict=True)
    )


def clock(tick):
    seconds, milliseconds = divmod(tick * 700, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"20261128_{12 + minutes // 60:02d}{minutes % 60:02d}{seconds:02d}_{milliseconds:03d}"


PLACED = {  # label: names in order, of which no number counts alone
    "clock": [clock(tick) for tick in range(8)],
    "clock over a minute": [clock(tick) for tick in range(80, 95)],
    "clock with dashes": [f"12-{30 + (57 + i) // 60}-{(57 + i) % 60:02d}" for i in range(8)],
    "seconds since 1970": [f"{1732800007 + i * 7 // 10}_{i * 700 % 1000:03d}" for i in range(8)],
    "days": [f"2026-{11 + (27 + i) // 30}-{(27 + i) % 30 + 1:02d}" for i in range(6)],
    "numbers begin again": [f"shot{shot}_{i}" for shot in (1, 2, 10) for i in range(12)],
}


@pytest.mark.parametrize("label", PLACED)
def test_natural_order_where_no_number_counts_alone(label):
    names = PLACED[label]
    assert list(number_names(random.Random(0).sample(names, len(names)))) == names


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cam2_frame7", "cam1_frame8"], r"cam1_frame8 .*before cam2_frame7 by \(1, 8\) < \(2, 7\), but .* 8 > 7"),
        ([f"cam{1 + i % 2}_{i}" for i in range(8)], "cam1_6 comes before cam2_1 by"),
        ([f"f_{i / 8}" for i in range(8)], "f_0.5 comes before f_0.25 by .* but after it by 0.5 > 0.25"),
        (["first", "second"], "first has no number"),
        (["00000", "00001", "thumb"], "thumb has no number"),
        ([md5(i) for i in range(5)], "has no number"),
        (["1", "01"], "01 and 1 both are frame 1"),
        (["1a", "1b"], "1a and 1b differ in more than one number"),
        (["a", "7"], "a has no number"),
    ],
)  # fmt: skip
def test_names_that_can_be_read_in_two_ways_are_refused(names, said):
    with pytest.raises(UnclearNames, match=said):
        number_names(names)


def test_masks_have_the_numbers_of_frames_of_their_names_and_else_their_own():
    frames = {name: place for place, name in enumerate(PLACED["clock"])}
    assert match_names([clock(5), clock(2)], frames) == {clock(2): 2, clock(5): 5}
    assert match_names([clock(3)], frames) == {clock(3): 3}
    assert match_names(["frame_000004", "frame_000002"], frames) == {"frame_000002": 2, "frame_000004": 4}


def test_a_folder_reads_its_images_in_that_order(tmp_path):
    for tick in range(8):
        Image.fromarray(np.full((6, 8, 3), 30 * tick, np.uint8)).save(tmp_path / f"{clock(tick)}.png")
    folder = FrameFolder(tmp_path)
    assert folder.names == [clock(tick) for tick in range(8)] and folder.numbers == list(range(8))
    assert folder.read(range(8))[:, 0, 0, 0].tolist() == [30 * tick for tick in range(8)]
    (tmp_path / "cover.jpg").write_bytes((tmp_path / f"{clock(0)}.png").read_bytes())
    with pytest.raises(UserError, match=f"{tmp_path}: cover has no number; .* such as 00012.jpg"):
        FrameFolder(tmp_path)


# ---- lost frames


@pytest.mark.parametrize("first", [0, 1, 700])
@pytest.mark.parametrize("stride", [1, 4, 5])
def test_any_one_number_lost_from_a_stride_is_found(first, stride):
    whole = list(range(first, first + 9 * stride, stride))
    for complete in (whole, whole[1:], whole[:-1]):
        assert not list(missing_numbers(complete))
    for lost in whole[1:-1]:
        assert list(missing_numbers([number for number in whole if number != lost])) == [lost]
    assert list(missing_numbers([number for number in whole if number not in whole[2:5]])) == whole[2:5]


def test_numbers_without_a_stride_have_no_gap():
    for numbers in ([3], [3, 90], [0, 33, 67, 100, 133], [1, 40, 41, 300, 17_000], [0, 5, 10, 12, 20]):
        assert not list(missing_numbers(numbers))
    assert list(missing_numbers([0, 1, 3])) == [2] and next(missing_numbers([0, 1, 10**15])) == 2
