# SPDX-License-Identifier: Apache-2.0
"""Masks, boxes and points in COCO's form, checked before they are used.

pycocotools fills what a run-length encoding leaves out with whatever was in memory, and takes sizes, boxes and
polygons as they come. Everything here reports what is wrong instead, and fills in what other tools leave out.

An RLE is {"size": [height, width], "counts": ...}: the lengths of runs down the columns, background first, as a list
(uncompressed) or as a string.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Sequence

import numpy as np

from effsam3.errors import UserError

MOST = 2**31 - 1  # of any whole number or coordinate in a file: what the indexes' int32 holds
OUTSIDE = 1  # pixels that a box or polygon may stick out of its image or miss its mask: tools round differently


class Malformed(UserError):
    """A value that does not fit its place in the file; `reason` is one word for reports, or "" for its form."""

    def __init__(self, detail: str, reason: str = ""):
        super().__init__(detail, reason)
        self.detail, self.reason = detail, reason

    def __str__(self) -> str:
        return self.detail


# ---- values


def load_json(data: bytes):
    """Return the content of a JSON file. Raises Malformed (bad_json)."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise Malformed(str(fault), "bad_json") from fault


def mapping(value, name: str, keys: tuple[str, ...] = ()) -> dict:
    """Return the value if it is an object that has these keys. Raises Malformed."""
    if not isinstance(value, dict):
        raise Malformed(f"{name} is {reprlib.repr(value)}; it must be an object")
    missing = [key for key in keys if key not in value]
    if missing:
        raise Malformed(f"{name} has no {', '.join(missing)}")
    return value


def listed(value, name: str) -> list:
    """Return the value if it is a list. Raises Malformed."""
    if not isinstance(value, list):
        raise Malformed(f"{name} is {reprlib.repr(value)}; it must be a list")
    return value


def whole(value, name: str, least: int = 0) -> int:
    """Return a whole number from `least` to MOST; SA-V writes its sizes as floats. Raises Malformed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= MOST or value % 1:
        raise Malformed(f"{name} is {reprlib.repr(value)}; it must be a whole number from {least} to {MOST}")
    return int(value)


def numbers(value, name: str, count: int | None = None) -> list[float]:
    """Return a list of (`count`) finite numbers. Raises Malformed."""
    wrong = [one for one in listed(value, name) if isinstance(one, bool) or not isinstance(one, (int, float))]
    wrong = wrong or [one for one in value if not -MOST <= one <= MOST]  # NaN, too
    if wrong or len(value) != (len(value) if count is None else count):
        amount = "" if count is None else f"{count} "
        raise Malformed(f"{name} is {reprlib.repr(value)}; it must be a list of {amount}finite numbers")
    return value


# ---- masks


def to_rle(segmentation, height: int, width: int) -> dict:
    """Return a mask as a compressed RLE of this size. A string in it is passed on as it is: `runs_of` checks it.

    Args:
        segmentation: an RLE of either kind, or a list of polygons [x, y, x, y, ...], of which the union is taken.

    Raises:
        Malformed: size_mismatch; bad_mask (runs that do not fill the mask, a polygon outside of it); or "" when it is
            nothing of that kind.
    """
    from pycocotools import mask

    size = [height, width]
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(polygon, height, width) for polygon in segmentation]
        rle = mask.merge(mask.frPyObjects(polygons, height, width))
        return {"size": size, "counts": rle["counts"].decode("ascii")}
    found = mapping(segmentation, "a mask", ("size", "counts"))
    if found["size"] != size:
        other = [whole(side, "size") for side in listed(found["size"], "size")]
        raise Malformed(f"a mask of size {other} (height, width) in a frame of {size}", "size_mismatch")
    if isinstance(found["counts"], str):
        return {"size": size, "counts": found["counts"]}
    runs = [whole(run, "a run of a mask") for run in listed(found["counts"], "counts")]
    if sum(runs) != height * width:
        raise _unfilled(sum(runs), height, width)
    return {"size": size, "counts": mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"].decode("ascii")}


def runs_of(rle: dict, runs: np.ndarray | None = None) -> np.ndarray:
    """Return the lengths of a compressed RLE's runs, int64, background first; `runs` are they, where they are known.

    Six bits a character: 5 of a little-endian signed number, 1 for "continues"; from the fourth number on, each is the
    difference to the one two places earlier.

    Raises:
        Malformed: bad_mask: no such encoding, or the runs do not fill the mask.
    """
    (height, width), counts = rle["size"], rle["counts"]
    runs = _runs(counts) if runs is None else runs
    if runs is None:
        raise Malformed(f"the RLE {reprlib.repr(counts)} is damaged", "bad_mask")
    if runs.sum() != height * width:
        raise _unfilled(int(runs.sum()), height, width)
    return runs


def runs_of_all(rles: list[dict]) -> list[np.ndarray]:
    """Return `runs_of` each, in half of the time. Raises Malformed as it does."""
    known = _runs_of_all([rle["counts"] for rle in rles])
    return [runs_of(rle, runs) for rle, runs in zip(rles, known, strict=True)]


def _runs(counts: str) -> np.ndarray | None:
    found = _numbers(counts)
    if found is None:
        return None
    runs, _ = found
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs if runs.min() >= 0 else None


def _runs_of_all(texts: list[str]) -> Sequence[np.ndarray | None]:
    """Return the runs of each text, None for all if one is damaged: a hundred take as many steps as one."""
    damaged = [None] * len(texts)
    found = _numbers("".join(texts)) if all(texts) else None
    if found is None:
        return damaged
    values, ends = found
    lasts = np.cumsum([len(text) for text in texts]) - 1
    firsts = np.searchsorted(ends, np.concatenate([[0], lasts[:-1] + 1]))  # number at which each text begins
    if not np.isin(lasts, ends).all():  # a number goes on in the next text
        return damaged
    counts = np.diff(firsts, append=len(values))
    number = np.arange(len(values)) - np.repeat(firsts, counts)
    # Sums over the first number of a text, its odd ones, and its other even ones, each for itself.
    group = 3 * np.repeat(np.arange(len(texts)), counts) + np.where(number, 2 - number % 2, 0)
    order = np.argsort(group, kind="stable")
    sums, begins = np.cumsum(values[order]), np.flatnonzero(np.diff(group[order], prepend=-1))
    before = np.concatenate([[0], sums[begins[1:] - 1]])
    values[order] = sums - np.repeat(before, np.diff(begins, append=len(values)))
    return np.split(values, firsts[1:]) if values.min() >= 0 else damaged


def _numbers(counts: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the numbers that a text encodes and where each ends, int64; None for no such text."""
    if not counts or not counts.isascii():
        return None
    code = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(code & 32 == 0)
    if not len(ends) or ends[-1] != len(code) - 1 or code.min() < 0 or code.max() > 63:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(code)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # more than 35 bits
        return None
    values = np.add.reduceat((code & 31) << 5 * place, starts)
    values -= np.where(code[ends] & 16, 1 << 5 * (place[ends] + 1), 0)
    return values, ends


def _unfilled(pixels: int, height: int, width: int) -> Malformed:
    return Malformed(
        f"an RLE of {pixels} pixels does not fill a mask of height {height} and width {width}", "bad_mask"
    )


def _polygon(value, height: int, width: int) -> list[float]:
    polygon = numbers(value, "a polygon")
    if len(polygon) < 6 or len(polygon) % 2:
        raise Malformed(f"a polygon has {len(polygon)} numbers; it must have x and y of three points or more")
    _check_inside("a polygon", polygon[::2], polygon[1::2], height, width, "bad_mask")
    return polygon


def decode(segmentation, height: int, width: int) -> np.ndarray:
    """Return a mask as bool [height, width]. Raises Malformed as `to_rle` and `runs_of`."""
    from pycocotools import mask

    rle = to_rle(segmentation, height, width)
    runs_of(rle)
    return mask.decode(rle).astype(bool)


def rles_of(masks_OHW: np.ndarray) -> list[dict]:
    """Return masks as compressed RLEs, whose counts are bytes."""
    from pycocotools import mask

    return mask.encode(np.asfortranarray(np.asarray(masks_OHW, np.uint8).transpose(1, 2, 0)))


def areas_of(rles: list[dict]) -> np.ndarray:
    """Return the pixels of each compressed RLE, int64."""
    from pycocotools import mask

    # One by one: pycocotools 2.0.11 counts those of a list in 8 bits, and fails from 256 on.
    return np.array([mask.area(rle) for rle in rles], np.int64)


def text_rles(masks: Iterable[np.ndarray]) -> list[dict]:
    """Return masks as compressed RLEs that JSON can hold."""
    rles = rles_of(np.stack(found)) if (found := list(masks)) else []
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


# ---- annotations


def check_annotations(content, height: int, width: int) -> list[dict]:
    """Return the annotations of one image with `segmentation` (compressed RLE), `area` (of the mask), `bbox`
    ([x, y, width, height]) and `point_coords` ([[x, y], ...]) in pixels; other keys stay as they are.

    Boxes and points that are not there are made from the mask. `id` is not needed.

    Args:
        content: of an SA-1B JSON, or the bare list that SAM's automatic mask generator writes.

    Raises:
        Malformed: size_mismatch, bad_mask, bad_box, bad_point, or "" for another form.
    """
    if isinstance(content, list):
        content = {"annotations": content}
    found = listed(mapping(content, "the file", ("annotations",))["annotations"], "annotations")
    if content.get("image") is not None:
        image = mapping(content["image"], "image", ("height", "width"))
        size = whole(image["height"], "image.height"), whole(image["width"], "image.width")
        if size != (height, width):
            raise Malformed(f"(height, width) {size}, the image has {(height, width)}", "size_mismatch")
    checked = []
    texts = [text for text in map(_text_of, found) if text is not None]
    known = _runs_of_all(texts) if len(texts) == len(found) else [None] * len(found)
    for number, (annotation, runs) in enumerate(zip(found, known, strict=True)):
        try:
            checked.append(_check_annotation(mapping(annotation, "it"), height, width, runs))
        except Malformed as fault:
            raise Malformed(f"annotation {number}: {fault}", fault.reason) from fault
    images = {str(annotation.get("image_id")) for annotation in checked}
    if len(images) > 1:
        raise Malformed(f"annotations of {len(images)} images in one file; each image needs a file of its own")
    return checked


def _text_of(annotation) -> str | None:
    """Return the text of an annotation's compressed RLE, None where it has none."""
    segmentation = annotation.get("segmentation") if isinstance(annotation, dict) else None
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    return counts if isinstance(counts, str) else None


def _check_annotation(annotation: dict, height: int, width: int, runs: np.ndarray | None) -> dict:
    from pycocotools import mask

    rle = to_rle(annotation.get("segmentation"), height, width)
    runs = runs_of(rle, runs)
    area = int(runs[1::2].sum())
    if not area:
        raise Malformed("its mask is empty", "bad_mask")
    around = mask.toBbox(rle).tolist()
    box, points = annotation.get("bbox"), annotation.get("point_coords")
    if box is None:
        box = around
    else:
        check_box(box, around, height, width)
    if points is None or points == []:
        points = [middle_of(runs, height)]
    for point in listed(points, "point_coords"):
        x, y = numbers(point, "a point of point_coords", 2)
        _check_inside("a point of point_coords", [x], [y], height, width, "bad_point")
    return annotation | {"segmentation": rle, "area": area, "bbox": box, "point_coords": points}


def check_box(box, around: list[float], height: int, width: int) -> None:
    """Refuse a box [x, y, width, height] in pixels that is not its mask's.

    `around` is the mask's own box: another one may be larger or smaller, but not elsewhere. Raises
    Malformed (bad_box).
    """
    x, y, across, down = numbers(box, "bbox", 4)
    if across < 0 or down < 0:
        raise Malformed(f"bbox {box} has a negative side; it must be [x, y, width, height]", "bad_box")
    corners = [around[0], around[1], around[0] + around[2], around[1] + around[3]]
    if _near(box, corners) and not _near(box, around):
        raise Malformed(f"bbox {box} is [left, top, right, bottom]; it must be [x, y, width, height]", "bad_box")
    _check_inside("bbox", [x, x + across], [y, y + down], height, width, "bad_box")
    apart = [
        max(start, other) - min(start + side, other + length)
        for start, side, other, length in ((x, across, around[0], around[2]), (y, down, around[1], around[3]))
    ]
    if max(apart) > OUTSIDE:
        raise Malformed(f"bbox {box} does not touch its mask, which is within {around}", "bad_box")


def _near(box: list[float], other: list[float]) -> bool:
    return max(abs(one - two) for one, two in zip(box, other, strict=True)) <= 2 * OUTSIDE


def _check_inside(name: str, xs: list[float], ys: list[float], height: int, width: int, reason: str) -> None:
    if min(*xs, *ys) < -OUTSIDE or max(xs) > width + OUTSIDE or max(ys) > height + OUTSIDE:
        spans = f"x {min(xs)} to {max(xs)}, y {min(ys)} to {max(ys)}"
        raise Malformed(f"{name} ({spans} pixels) is outside of an image {width} wide and {height} high", reason)


def middle_of(runs: np.ndarray, height: int) -> list[float]:
    """Return [x, y] of a pixel of a mask, given as by `runs_of`: the middle of its longest vertical stretch."""
    ends = np.cumsum(runs)
    cuts = np.union1d(ends, np.arange(0, ends[-1] + 1, height))  # a run may continue in the next column
    lengths = np.diff(cuts)
    inside = np.searchsorted(ends, cuts[:-1], side="right") % 2 == 1
    longest = np.argmax(lengths * inside)
    x, y = divmod(int(cuts[longest] + lengths[longest] // 2), height)
    return [float(x), float(y)]
