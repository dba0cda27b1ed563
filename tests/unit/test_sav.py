# SPDX-License-Identifier: Apache-2.0
"""SA-V's JSON: the real files, what is wrong with bad ones, and annotated frame k on video frame 4k."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from effsam3.data.indexing import arrow_schema
from effsam3.data.synthetic.videos import mp4_bytes, sav_record
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.sav import COLUMNS, FRAME_STRIDE, load_index, parse_sav, read_annotated_frames, read_sav
from effsam3.errors import UserError

SAMPLES = Path(__file__).parents[3] / "shared" / "data"


def sample(kind):
    path = SAMPLES / f"sav_000001_{kind}.json"
    if not path.is_file():
        pytest.skip("SA-V's sample annotations are not in ../shared/data")
    return path.read_bytes()


@pytest.mark.parametrize(("kind", "objects", "absent"), [("manual", 5, [1, 0, 11, 113, 0]), ("auto", 9, None)])
def test_the_real_files(kind, objects, absent):
    data = sample(kind)
    found = parse_sav(data)
    found.check_masks()
    assert (found.video_id, found.frames, found.height, found.width) == ("sav_000001", 483, 848, 480)
    assert len(found.masklet) == 121 and found.objects == list(range(objects))
    visible = found.visible()
    content = json.loads(data)
    reference = [[coco_mask.decode(rle).any() for rle in rles] for rles in content["masklet"]]
    assert visible.shape == (121, objects) and (visible == np.array(reference)).all()
    if absent:
        assert (~visible).sum(0).tolist() == absent
        assert visible.argmax(0).tolist() == content["masklet_first_appeared_frame"]
    for frame, position in ((0, 0), (120, objects - 1)):
        expected = coco_mask.decode(content["masklet"][frame][position])
        assert (found.mask(frame, position) == expected).all() and found.mask(frame, position).dtype == bool


def test_objects_of_the_real_file_overlap():
    found = parse_sav(sample("manual"))
    covered = sum(found.mask(0, position).astype(int) for position in range(5))
    assert covered.max() > 1


def record(frames=10, objects=2, size=(12, 16)):
    masks = np.zeros((frames, objects, *size), bool)
    masks[:, :, 2:8, 3:9] = True
    return sav_record("sav_000007", masks)


def refused(content, check=False):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(UnreadableAnnotations, match="annotations of 'here'") as caught:
        found = parse_sav(data, "here")
        if check:
            found.check_masks()
    return caught.value.reason


def test_bad_files_are_named():
    assert refused(b"{") == "bad_json" and refused(b"[" * 100_000) == "bad_json" and refused(b"\xff") == "bad_json"
    for name in ("video_id", "video_frame_count", "video_height", "video_width", "masklet", "masklet_id"):
        content = record()
        del content[name]
        assert refused(content) == "not_sav"
    assert refused([]) == "not_sav" and refused(record() | {"masklet": 3}) == "not_sav"
    assert refused(record() | {"video_width": None}) == "not_sav"
    assert refused(record() | {"masklet_id": [0]}) == "not_sav"
    assert refused(record() | {"video_height": 13.0}) == "size_mismatch"
    other = record()
    other["masklet"][2][1]["size"] = [16, 12]
    assert refused(other) == "size_mismatch"
    for frames in (8, 13, 483):
        assert refused(record() | {"video_frame_count": float(frames)}) == "frame_count"
    for frames in (9, 10, 11, 12):  # every fourth of them is annotated: three
        assert parse_sav(json.dumps(record() | {"video_frame_count": float(frames)}).encode()).frames == frames
    short = record()
    short["masklet"][2][1]["counts"] = short["masklet"][2][1]["counts"][:-2]
    assert refused(short, check=True) == "bad_mask"
    with pytest.raises(UserError, match="does not fill"):
        parse_sav(json.dumps(short).encode()).mask(2, 1)


def test_a_frame_with_a_missing_mask_is_not_annotated():
    content = record(frames=12)
    content["masklet"][1][0] = None
    content["masklet"][2] = None
    found = parse_sav(json.dumps(content).encode())
    assert found.visible().tolist() == [[True, True], [False, False], [False, False]]
    found.check_masks()


def test_a_changed_file_is_noticed(tmp_path):
    file = tmp_path / "a_manual.json"
    file.write_text(json.dumps(record()))
    row = {"key": "a_manual", "annotation_file": file.name, "annotation_bytes": file.stat().st_size}
    assert read_sav(row, tmp_path).frames == 10
    with pytest.raises(UnreadableAnnotations, match="build the index again"):
        read_sav(row | {"annotation_bytes": 5}, tmp_path)
    with pytest.raises(UnreadableAnnotations, match="unreadable"):
        read_sav(row | {"annotation_file": "gone.json"}, tmp_path)


# ---- frames


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """The same 30 frames, frame k white up to column 4k + 2: as a video, and as folders of all and of every fourth."""
    folder = tmp_path_factory.mktemp("bars")
    frames = np.zeros((30, 32, 128, 3), np.uint8)
    for index, image in enumerate(frames):
        image[:, : 4 * index + 2] = 255
        for name, every in (("all", 1), ("fourth", 4)):
            if index % every == 0:
                (folder / name).mkdir(exist_ok=True)
                Image.fromarray(image).save(folder / name / f"{index:05d}.jpg", quality=95)
    (folder / "bars.mp4").write_bytes(mp4_bytes(frames))
    return folder


@pytest.mark.parametrize("name", ["bars.mp4", "all", "fourth"])
def test_annotated_frame_k_is_video_frame_4k(bars, name):
    assert FRAME_STRIDE == 4
    pixels = read_annotated_frames(bars / name, [7, 0, 3, 4], (32, 128))
    columns = (pixels[:, 0] > 128).sum(2).mean(1).round()
    assert ((columns - 2) / 4).round().tolist() == [28, 0, 12, 16]
    with pytest.raises(UnreadableVideo, match="short|missing_frame"):
        read_annotated_frames(bars / name, [8], (32, 128))
    with pytest.raises(UnreadableVideo, match="size_mismatch"):
        read_annotated_frames(bars / name, [0], (128, 32))


def test_a_missing_frame_is_named(bars, tmp_path):
    for path in (bars / "fourth").iterdir():
        if path.name != "00008.jpg":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert len(read_annotated_frames(tmp_path, [0, 1, 3], (32, 128))) == 3
    with pytest.raises(UnreadableVideo, match="missing_frame.*frame 8"):
        read_annotated_frames(tmp_path, [1, 2], (32, 128))


# ---- index


def test_other_files_are_no_index(tmp_path):
    path = tmp_path / "index.parquet"
    with pytest.raises(UserError, match="effsam3 index sav"):
        load_index(path)
    path.write_text("text")
    with pytest.raises(UserError, match="not a parquet"):
        load_index(path)
    parquet.write_table(pyarrow.table({"key": ["a"]}), path)
    with pytest.raises(UserError, match="not an SA-V index"):
        load_index(path)
    wrong = arrow_schema(COLUMNS).set(0, pyarrow.field("key", pyarrow.int64()))
    parquet.write_table(wrong.empty_table(), path)
    with pytest.raises(UserError, match="not an SA-V index"):
        load_index(path)
    parquet.write_table(arrow_schema(COLUMNS).empty_table(), path)
    assert len(load_index(path)) == 0
    with pytest.raises(UserError, match="no video in split val"):
        load_index(path, "val")
    with pytest.raises(UserError, match="'test' does not exist"):
        load_index(path, "test")


def test_more_objects_than_a_byte_counts():
    masks = np.zeros((1, 300, 8, 10), bool)
    masks[0, 299, 2, 3] = True
    found = parse_sav(json.dumps(sav_record("crowd", masks)).encode())
    assert found.visible().tolist() == [[False] * 299 + [True]]
