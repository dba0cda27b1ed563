# SPDX-License-Identifier: Apache-2.0
"""Masks, boxes and points as tools write them, against the masks they were drawn from; every wrong value is named."""

import copy
import json
import math
import re

import numpy as np
import pyarrow
import pytest
import torch
from pycocotools import mask as coco_mask

from effsam3.benchmarks.masks import choose_annotations, iou_each, size_of
from effsam3.data import coco
from effsam3.data.coco import Malformed, check_annotations, decode, middle_of, runs_of, runs_of_all, to_rle
from effsam3.data.images.sa1b import parse_annotations
from effsam3.data.indexing import arrow_schema
from effsam3.data.synthetic.images import sa1b_record
from effsam3.data.synthetic.videos import sav_record
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.index import _facts
from effsam3.data.videos.sav import COLUMNS, parse_sav

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 24, 32


def drawn(top=4, left=6, height=10, width=12):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def runs(mask):
    """The uncompressed counts, by walking down the columns."""
    found, value = [0], False
    for pixel in mask.T.flat:
        if bool(pixel) != value:
            found.append(0)
            value = not value
        found[-1] += 1
    return found


def rle(mask):
    counts = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    return {"size": list(mask.shape), "counts": counts}


# ---- masks


def test_both_kinds_of_rle_are_the_mask_they_were_made_from():
    for density in (0.0, 0.001, 0.1, 0.5, 0.999, 1.0):
        mask = RNG.random((61, 83)) < density
        both = rle(mask), {"size": [61.0, 83], "counts": runs(mask)}
        for segmentation in both:
            np.testing.assert_array_equal(decode(segmentation, 61, 83), mask)
            assert to_rle(segmentation, 61, 83) == both[0]
        assert runs_of(both[0]).tolist() == runs(mask)


def test_runs_of_many_masks_at_once_are_those_of_each():
    """Also where one of them is damaged in any place: then it is named, or all of them are as each for itself."""
    found = []
    for _ in range(200):
        rles = [rle(RNG.random((31, 17)) < RNG.random()) for _ in range(RNG.integers(1, 12))]
        if RNG.random() < 0.7:
            harmed = rles[RNG.integers(len(rles))]
            text = list(harmed["counts"])
            text[RNG.integers(len(text))] = chr(RNG.integers(40, 120))
            harmed["counts"] = "".join(text[: RNG.integers(len(text) + 1)] if RNG.random() < 0.3 else text)
        try:
            wanted = [runs_of(one).tolist() for one in rles]
        except Malformed as fault:
            with pytest.raises(Malformed, match=re.escape(str(fault))):
                runs_of_all(rles)
            found.append(fault.detail.split()[0])
        else:
            assert [one.tolist() for one in runs_of_all(rles)] == wanted
            found.append("whole")
    assert runs_of_all([]) == [] and len(set(found)) == 3  # damaged, not filling, whole


def test_polygons_are_filled_and_united():
    polygons = [[6, 4, 18, 4, 18, 14, 6, 14], [20.0, 4.0, 24.0, 4.0, 24.0, 8.0, 20.0, 8.0]]
    np.testing.assert_array_equal(decode(polygons, HEIGHT, WIDTH), drawn() | drawn(4, 20, 4, 4))


WRONG_MASKS = {
    "nothing": (None, ""),
    "a list of nothing": ([], ""),
    "no counts": ({"size": [24, 32]}, ""),
    "null": ({"size": [24, 32], "counts": None}, ""),
    "no size": ({"counts": "0"}, ""),
    "size of text": ({"size": "24", "counts": "0"}, ""),
    "turned": ({"size": [32, 24], "counts": runs(drawn())}, "size_mismatch"),
    "three sides": ({"size": [24, 32, 1], "counts": "0"}, "size_mismatch"),
    "not ASCII": ({"size": [24, 32], "counts": "é" + rle(drawn())["counts"]}, "bad_mask"),
    "no text": ({"size": [24, 32], "counts": ""}, "bad_mask"),
    "goes on": ({"size": [24, 32], "counts": "ooooooooo0"}, "bad_mask"),
    "ends early": ({"size": [24, 32], "counts": "o"}, "bad_mask"),
    "no code": ({"size": [24, 32], "counts": "~"}, "bad_mask"),
    "short text": ({"size": [24, 32], "counts": rle(drawn())["counts"][:-1]}, "bad_mask"),
    "short": ({"size": [24, 32], "counts": runs(drawn())[:-1]}, "bad_mask"),
    "long": ({"size": [24, 32], "counts": [*runs(drawn()), 1]}, "bad_mask"),
    "empty": ({"size": [24, 32], "counts": []}, "bad_mask"),
    "back": ({"size": [24, 32], "counts": [800, -32]}, ""),
    "half": ({"size": [24, 32], "counts": [767.5, 0.5]}, ""),
    "true": ({"size": [24, 32], "counts": [767, True]}, ""),
    "infinite": ({"size": [24, 32], "counts": [math.inf]}, ""),
    "text in a list": ({"size": [24, 32], "counts": ["768"]}, ""),
    "two points": ([[1, 1, 5, 5]], ""),
    "odd": ([[1, 1, 5, 5, 1, 5, 9]], ""),
    "polygon of text": ([["1", 1, 5, 5, 1, 5]], ""),
    "polygon of NaN": ([[math.nan, 1, 5, 5, 1, 5]], ""),
    "flat": ([1, 1, 5, 5, 1, 5], ""),
    "far away": ([[1, 1, 1e9, 5, 1, 5]], "bad_mask"),
}


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_wrong_masks_are_named(kind):
    segmentation, reason = WRONG_MASKS[kind]
    with pytest.raises(Malformed, match=r"must|has|does not fill|is damaged|in a frame of|is outside") as error:
        decode(segmentation, 24, 32)
    assert error.value.reason == reason


def test_a_run_that_would_overflow_32_bits_does_not_wrap_around():
    long = coco_mask.frPyObjects({"size": [24, 32], "counts": [2**32 - 1, 769]}, 24, 32)["counts"].decode()
    with pytest.raises(Malformed, match="damaged|does not fill"):
        runs_of({"size": [24, 32], "counts": long})


# ---- annotations


def annotations_of(*changes, record=None):
    record = record or sa1b_record(1, np.stack([drawn(), drawn(12, 20, 6, 5)]))
    record = copy.deepcopy(record)
    for change in changes:
        change(record["annotations"][0])
    return parse_annotations(json.dumps(record).encode(), HEIGHT, WIDTH, "sa_1")


def test_what_a_tool_left_out_is_made_from_the_mask():
    whole = annotations_of()
    for key in ("id", "area", "bbox", "predicted_iou", "stability_score", "crop_box"):
        for change in (lambda one, key=key: one.pop(key), lambda one, key=key: one.update({key: None})):
            (first, second) = annotations_of(change)
            assert second == whole[1]
            for name in ("segmentation", "area", "bbox", "point_coords"):
                assert first[name] == whole[0][name], (key, name)
    for change in (
        lambda one: one.pop("point_coords"), lambda one: one.update(point_coords=[]),
        lambda one: one.update(point_coords=None),
    ):  # fmt: skip
        assert annotations_of(change)[0]["point_coords"] == [[6.0, 9.0]], "half way down the first of its columns"
    assert annotations_of(lambda one: one.update(area=-5))[0]["area"] == 120, "the mask's own area counts"
    for segmentation in ({"size": [HEIGHT, WIDTH], "counts": runs(drawn())}, [[6, 4, 18, 4, 18, 14, 6, 14]]):
        found = annotations_of(lambda one, it=segmentation: one.update(segmentation=it))[0]
        assert found["segmentation"] == rle(drawn())


def test_the_list_that_sams_mask_generator_writes():
    record = sa1b_record(1, np.stack([drawn()]))
    bare = [{name: value for name, value in one.items() if name != "id"} for one in record["annotations"]]
    assert check_annotations(bare, HEIGHT, WIDTH) == bare
    assert check_annotations([], HEIGHT, WIDTH) == []
    del record["image"]
    assert annotations_of(record=record) == record["annotations"]


def test_the_middle_of_a_mask_is_in_it():
    for _ in range(60):
        mask = RNG.random((17, 23)) < RNG.choice([0.02, 0.3, 0.9])
        mask[RNG.integers(17), RNG.integers(23)] = True
        x, y = middle_of(np.array(runs(mask)), 17)
        assert mask[int(y), int(x)]
    assert middle_of(np.array(runs(np.ones((17, 23), bool))), 17)[1] == 8, "a column's middle, not the image's border"
    tall = np.zeros((17, 23), bool)
    tall[2:13, 5] = tall[3:6, 6:20] = True
    assert middle_of(np.array(runs(tall)), 17) == [5.0, 7.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [math.nan] * 4}, "not_sa1b"),
        ({"bbox": [6, 4, math.inf, 10]}, "not_sa1b"),
        ({"bbox": [6, 4, 12]}, "not_sa1b"),
        ({"bbox": "6 4 12 10"}, "not_sa1b"),
        ({"bbox": [6, 4, 12, True]}, "not_sa1b"),
        ({"bbox": {}}, "not_sa1b"),
        ({"bbox": [18, 4, -12, 10]}, "bad_box"),
        ({"bbox": [25, 4, 12, 10]}, "bad_box"),
        ({"bbox": [6, -8, 12, 10]}, "bad_box"),
        ({"bbox": [0, 0, 0, 0]}, "bad_box"),
        ({"bbox": [6, 4, 18, 14]}, "bad_box"),  # left, top, right, bottom
        ({"bbox": [0.1, 0.1, 0.5, 0.5]}, "bad_box"),  # shares of the image's sides
        ({"point_coords": [[40, 5]]}, "bad_point"),
        ({"point_coords": [[5, math.nan]]}, "not_sa1b"),
        ({"point_coords": [5, 5]}, "not_sa1b"),
        ({"point_coords": {"x": 5}}, "not_sa1b"),
        ({"point_coords": [[5, 5, 1]]}, "not_sa1b"),
        ({"segmentation": rle(drawn() & False)}, "bad_mask"),
        ({"segmentation": None}, "not_sa1b"),
        ({"image_id": 7}, "not_sa1b"),  # not that of the other annotation
    ],
)  # fmt: skip
def test_what_evaluation_could_not_use_is_refused(change, reason):
    with pytest.raises(UnreadableAnnotations, match="annotations of 'sa_1'") as error:
        annotations_of(lambda one: one.update(change))
    assert error.value.reason == reason
    assert "annotation 0" in error.value.detail or "image_id" in change


def test_corners_in_place_of_a_box_are_told():
    for mask, box in ((drawn(), [6, 4, 18, 14]), (drawn(10, 20, 12, 10), [20, 10, 30, 22])):
        record = sa1b_record(1, mask[None])
        record["annotations"][0]["bbox"] = box
        with pytest.raises(UnreadableAnnotations, match="left, top, right, bottom"):
            annotations_of(record=record)


def test_boxes_by_other_conventions_are_fine():
    """SAM's own boxes end on the last pixel, others behind it; an amodal box is larger than what is seen."""
    for box in ([6, 4, 11, 9], [5.5, 3.5, 13, 11], [-0.5, -0.4, 32.9, 24.8], [18.5, 4, 3, 10]):
        assert annotations_of(lambda one, box=box: one.update(bbox=box))[0]["bbox"] == box
    corner = sa1b_record(1, drawn(0, 0, 10, 12)[None])
    assert annotations_of(record=corner)[0]["bbox"] == [0, 0, 12, 10], "both conventions say the same"
    line = sa1b_record(1, drawn(5, 5, 1, 9)[None])
    line["annotations"][0]["bbox"][3] = 0
    assert annotations_of(record=line)[0]["bbox"] == [5, 5, 9, 0]


# ---- every place of a file, with every kind of value

VALUES = (
    None, [], {}, "", "text", "\ud800", "é", [1, 2, 3, 4], [[]], [None], True, -1, 0, 1.7, -0.5, 10**400, 2**31, 1e300,
    math.nan, math.inf, {"size": [2, 2], "counts": [4]},
)  # fmt: skip
REASONS = {
    "bad_json", "not_sa1b", "not_sav", "size_mismatch", "bad_mask", "bad_box", "bad_point", "object_ids",
    "frame_count",
}  # fmt: skip


def places(node, path=()):
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


def with_value(record, path, value):
    if not path:
        return value
    record = copy.deepcopy(record)
    node = record
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return record


def mutations(record):
    """Each node of a JSON replaced by each of VALUES, and taken out."""
    for path in places(record):
        for value in VALUES:
            yield path, value, with_value(record, path, value)
        if path:
            less = copy.deepcopy(record)
            node = less
            for key in path[:-1]:
                node = node[key]
            del node[path[-1]]
            yield path, "taken out", less


def parsed(parse, record, context):
    """The content, or None where it was refused with a reason and a sentence."""
    try:
        return parse(json.dumps(record).encode())
    except UnreadableAnnotations as error:
        assert error.reason in REASONS and error.detail, context
        return None


def test_any_value_in_any_place_of_an_sa1b_file_is_used_or_named():
    record = sa1b_record(1, np.stack([drawn(), drawn(12, 20, 6, 5)]))
    record["annotations"][1]["segmentation"]["counts"] = runs(drawn(12, 20, 6, 5))
    used = refused = 0
    for *context, changed in mutations(record):
        found = parsed(lambda data: parse_annotations(data, HEIGHT, WIDTH, "sa_1"), changed, context)
        if found is None:
            refused += 1
            continue
        used += 1
        for one in choose_annotations(found, 8):  # all that evaluation takes from it
            mask = decode(one["segmentation"], HEIGHT, WIDTH)
            assert iou_each(torch.from_numpy(mask[None]), [one["segmentation"]]) == [1.0], context
            assert size_of(one, HEIGHT, WIDTH, 16) and one["area"] == mask.sum() > 0, context
            assert torch.isfinite(torch.tensor([one["bbox"], [*one["point_coords"][0], 0, 0]])).all(), context
    assert used > 200 and refused > 400


def test_any_value_in_any_place_of_an_sav_file_is_used_or_named():
    masks = np.zeros((9, 2, HEIGHT, WIDTH), bool)
    masks[:, 0], masks[:, 1] = drawn(), drawn(12, 20, 6, 5)
    record = sav_record("sav_7", masks)
    record["masklet"][1][1]["counts"] = runs(masks[4, 1])
    used = refused = 0
    for *context, changed in mutations(record):

        def parse(data):
            found = parse_sav(data, "sav_7_manual")
            found.check_masks()
            return found

        found = parsed(parse, changed, context)
        if found is None:
            refused += 1
            continue
        used += 1
        row = _facts(found)
        pyarrow.Table.from_pylist([row], arrow_schema({name: COLUMNS[name] for name in row}))
        assert len(set(found.objects)) == len(found.objects), context
        for annotated, rles in enumerate(found.masklet):
            for position in range(len(rles or ())):
                if context[0][:1] != ("masklet",):
                    assert (found.mask(annotated, position) == masks[4 * annotated, position]).all(), context
    assert used > 200 and refused > 400


def test_random_texts_and_damaged_bytes_are_named():
    rng = np.random.default_rng(1)
    masks = np.stack([drawn()] * 9)[:, None]
    files = [
        (json.dumps(sa1b_record(1, masks[0])).encode(), lambda data: parse_annotations(data, HEIGHT, WIDTH)),
        (json.dumps(sav_record("v", masks)).encode(), lambda data: parse_sav(data).check_masks()),
    ]
    for data, parse in files:
        for _ in range(600):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
            try:
                parse(bytes(damaged))
            except UnreadableAnnotations as error:
                assert error.reason in REASONS
    assert coco.MOST == 2**31 - 1
