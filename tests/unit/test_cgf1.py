# SPDX-License-Identifier: Apache-2.0
"""cgF1 against hand-made cases with the values that SAM 3's evaluator gives them, and against counting by hand."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from effsam3.benchmarks.concepts.cgf1 import COLUMNS, IOUS_T, count, intervals, metrics
from effsam3.benchmarks.concepts.scoring import Detection, Found, Scored
from effsam3.data.concepts.pairs import ConceptObject, ConceptPair

SIDE = 40


def square(y, x, rows=10, columns=10):
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + rows, x : x + columns] = 1
    return coco_mask.encode(mask)


def marked(rle, crowd=False):
    return ConceptObject(rle, coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle)), crowd)


def detected(rle, score=0.9):
    x, y, across, down = coco_mask.toBbox(rle).tolist()
    return Detection(score, (x, y, x + across, y + down), rle)


A, B, C = square(0, 0), square(20, 20), square(0, 25)
NINE = [square(row, column, 8, 8) for row in (0, 10, 20) for column in (0, 10, 20)]


@dataclass
class Pair:
    """Objects by annotator, and detections."""

    objects: list
    detections: list
    exhaustive: bool = True


def one(objects, detections=(), exhaustive=True):
    return Pair(
        [[item if isinstance(item, ConceptObject) else marked(item) for item in objects]], list(detections), exhaustive
    )


def several(annotators, detections=()):
    return Pair([[marked(item) for item in objects] for objects in annotators], list(detections))


CROWD = marked(B, crowd=True)
NEGATIVE, PERFECT, MISSED = one([]), one([A], [detected(A)]), one([A])
# IoU of n / 20 with a 20 x 1 column: a detection of the first n pixels of it
COLUMN = square(0, 0, 20, 1)
part = {share: detected(square(0, 0, round(20 * share), 1)) for share in (0.75, 0.5, 0.95)}
ROWS_10, ROWS_16, ROWS_12, ROWS_8 = (square(0, 0, rows, 10) for rows in (10, 16, 12, 8))

CASES = {  # pairs; cgF1, IL_MCC, pmF1 of SAM 3's evaluator
    "1 no negative": ([PERFECT], 0, 0, 0.999850),
    "2 perfect": ([PERFECT, NEGATIVE], 0.999849, 0.999999, 0.999850),
    "3 negative detected": ([PERFECT, one([], [detected(A)])], 0, 0, 0.999850),
    "4 one of two missed": ([PERFECT, MISSED, NEGATIVE, NEGATIVE], 0.384849, 0.577350, 0.666578),
    "5 three false ones": (
        [PERFECT, PERFECT, NEGATIVE, one([], [detected(A), detected(B), detected(C)])], 0.577292, 0.577350, 0.999900,
    ),
    "6 score exactly .5": ([one([A], [detected(A, 0.5)]), NEGATIVE], 0.999849, 0.999999, 0.999850),
    "6 score below": ([one([A], [detected(A, 0.4999)]), NEGATIVE], 0, 0, 0),
    "7 IoU .75": ([one([COLUMN], [part[0.75]]), NEGATIVE], 0.599909, 0.999999, 0.599910),
    "7 IoU .50": ([one([COLUMN], [part[0.5]]), NEGATIVE], 0.099985, 0.999999, 0.099985),
    "7 IoU .95": ([one([COLUMN], [part[0.95]]), NEGATIVE], 0.999849, 0.999999, 0.999850),
    "8 Hungarian": (
        [one([ROWS_10, ROWS_16], [detected(ROWS_12), detected(ROWS_8, 0.8)]), NEGATIVE], 0.649932, 0.999999, 0.649933,
    ),
    "9 twice the same": ([one([A], [detected(A), detected(A)]), NEGATIVE], 0.666577, 0.999999, 0.666578),
    "9 one of two": ([one([A, B], [detected(A)]), NEGATIVE], 0.666577, 0.999999, 0.666578),
    "10 best annotator": (
        [several([[A], [A, B]], [detected(A), detected(B)]), NEGATIVE], 0.999899, 0.999999, 0.999900,
    ),
    "11 tie, the first": (
        [several([[], [A]], [detected(B)]), PERFECT, NEGATIVE], 0.499925, 0.500000, 0.999850,
    ),
    "12 swapped": ([several([[A], []], [detected(B)]), PERFECT, NEGATIVE], 0.499925, 1.0, 0.499925),
    "13 true negative first": ([several([[], [A]]), PERFECT], 0.999849, 0.999999, 0.999850),
    "13 in either order": ([several([[A], []]), PERFECT], 0.999849, 0.999999, 0.999850),
    "14 not exhaustive": ([one([A], exhaustive=False), PERFECT, NEGATIVE], 0.999849, 0.999999, 0.999850),
    "15 crowd only, detected": (
        [one([CROWD], [detected(B)]), PERFECT, NEGATIVE], 0.499925, 0.5, 0.999850,
    ),
    "15 crowd only": ([one([CROWD]), PERFECT], 0.999849, 0.999999, 0.999850),
    "16 a detection on the crowd": (
        [one([A, CROWD], [detected(A), detected(B)]), NEGATIVE], 0.666577, 0.999999, 0.666578,
    ),
    "17 nothing found": ([MISSED, NEGATIVE], 0, 0, 0),
    "18 only negatives": ([NEGATIVE, NEGATIVE], 0, 0, 0),
    "19 micro": ([PERFECT, one(NINE, [detected(C)]), NEGATIVE], 0.166636, 1.0, 0.166636),
    "20 wrong masks": ([one([A], [detected(B)])] * 2 + [NEGATIVE] * 2, 0, 1.0, 0),
    "21 all wrong": ([MISSED, one([], [detected(A)])], 0, -0.999999, 0),
    "22 ten and ten": (
        [PERFECT] * 10 + [one([], [detected(A)] * 5)] + [NEGATIVE] * 9, 0.904480, 0.904534, 0.999940,
    ),
}  # fmt: skip


def rows_of(pairs, boxes=False):
    """The rows of the pairs that count, through what the benchmark scores them with."""
    scored = []
    for number, pair in enumerate(pairs):
        truth = ConceptPair(str(number), "a.jpg", (SIDE, SIDE), "a", tuple(map(tuple, pair.objects)), pair.exhaustive)
        scored.append(Scored(truth, Found(1.0, tuple(pair.detections))))
    return np.stack([one.counts(boxes=boxes).row_S for one in scored if one.pair.exhaustive])


@pytest.mark.parametrize("name", CASES)
def test_the_evaluators_values(name):
    pairs, cgf1, mcc, pmf1 = CASES[name]
    found = metrics(rows_of(pairs).sum(0))
    assert found["cgF1"] == pytest.approx(cgf1, abs=2e-6)
    assert found["IL_MCC"] == pytest.approx(mcc, abs=2e-6)
    assert found["pmF1"] == pytest.approx(pmf1, abs=2e-6)


def test_the_evaluators_other_values():
    assert metrics(rows_of(CASES["3 negative detected"][0]).sum(0)) == pytest.approx(
        {"F1": 0.66658, "IL_F1": 0.6667, "IL_FPR": 1, "cgF1": 0, "IL_MCC": 0, "pmF1": 0.99985, "macro_F1": 0.99985}
        | {"cgF1_50": 0, "cgF1_75": 0, "pmF1_50": 0.99985},
        abs=1e-4,
    )
    assert metrics(rows_of(CASES["4 one of two missed"][0]).sum(0))["macro_F1"] == pytest.approx(0.99985, abs=1e-6)
    assert metrics(rows_of(CASES["5 three false ones"][0]).sum(0))["F1"] == pytest.approx(0.57137, abs=1e-5)
    assert metrics(rows_of(CASES["17 nothing found"][0]).sum(0))["macro_F1"] == -1
    assert metrics(rows_of(CASES["19 micro"][0]).sum(0))["macro_F1"] == pytest.approx(0.49993, abs=1e-5)


def test_boxes_are_compared_like_masks():
    """A thin mask in a box that fits: perfect by its box, nothing by its mask."""
    thin = Detection(0.9, (0, 0, 10, 10), square(0, 0, 1, 10))
    pairs = [one([A], [thin]), NEGATIVE]
    assert metrics(rows_of(pairs, boxes=True).sum(0))["cgF1"] == pytest.approx(0.999849, abs=1e-6)
    assert metrics(rows_of(pairs).sum(0))["cgF1"] == 0


def by_counting(pairs):
    """cgF1 without epsilons, by five lines of counting: masks as sets of pixels, every way of matching tried."""
    pixels = lambda rle: {*np.flatnonzero(coco_mask.decode(rle))}  # noqa: E731
    tp, fp, fn, table = (
        np.zeros(10),
        np.zeros(10),
        np.zeros(10),
        dict.fromkeys([(g, d) for g in (0, 1) for d in (0, 1)], 0),
    )
    for pair in pairs:
        truth, found = [pixels(item.rle) for item in pair.objects[0]], [pixels(item.rle) for item in pair.detections]
        iou = [[len(a & b) / len(a | b) for b in truth] for a in found]
        wide = max(len(truth), len(found))
        square_iou = [
            [iou[d][g] if d < len(found) and g < len(truth) else 0.0 for g in range(wide)] for d in range(wide)
        ]
        best = max(permutations(range(wide)), key=lambda way: sum(square_iou[d][g] for d, g in enumerate(way)))
        hits = np.array([sum(square_iou[d][g] >= iou_t for d, g in enumerate(best)) for iou_t in IOUS_T])
        tp, fn = tp + hits, fn + len(truth) - hits
        fp = fp + (len(found) - hits if truth else 0)
        table[bool(truth), bool(found)] += 1
    f1 = (2 * tp / (2 * tp + fp + fn)).mean()
    (tn, false), (missed, true) = ((table[g, 0], table[g, 1]) for g in (0, 1))
    margins = (true + false) * (true + missed) * (tn + false) * (tn + missed)
    mcc = (true * tn - false * missed) / margins**0.5
    return f1 * mcc, mcc, f1


def test_many_pairs_against_counting():
    rng = np.random.default_rng(0)
    draw = lambda: square(*rng.integers(0, 30, 2), *rng.integers(2, 25, 2))  # noqa: E731
    pairs = []
    for _ in range(60):
        objects = [draw() for _ in range(rng.integers(0, 4))]
        found = [
            detected(objects[k] if k < len(objects) and rng.random() < 0.7 else draw())
            for k in range(len(objects) if rng.random() < 0.7 else rng.integers(0, 4))
        ]
        pairs.append(one(objects, found))
    found = metrics(rows_of(pairs).sum(0))
    cgf1, mcc, pmf1 = by_counting(pairs)
    assert 0.05 < cgf1 < 0.9
    assert [found["cgF1"], found["IL_MCC"], found["pmF1"]] == pytest.approx([cgf1, mcc, pmf1], abs=1e-4)


def test_500_objects_are_counted():
    rng = np.random.default_rng(0)
    iou = np.eye(200, 500) * 0.6 + rng.random((200, 500)) * 0.3
    counts = count(iou)
    assert counts.objects == 500 and counts.detections == 200 and counts.tp_T[0] == 200


# ---- intervals


def test_intervals_hold_the_value_narrow_with_more_images_and_draw_images_not_pairs():
    rng = np.random.default_rng(0)

    def subset(images, pairs_each):
        """Half of the images are seen well, the others badly: their pairs go together."""
        rows, names = [], []
        for image in range(images):
            good = rng.random() < 0.5
            for number in range(pairs_each):
                iou = np.array([[0.9 if good else 0.52]]) if number % 2 else np.zeros((0, 0))
                rows.append(count(iou).row_S)
                names.append(str(image))
        return np.stack(rows), names

    few, many = (subset(images, 4) for images in (25, 400))
    for rows, names in (few, many):
        low, high = intervals(rows, names, draws=200)["cgF1"]
        assert low < metrics(rows.sum(0))["cgF1"] < high
    width = [np.diff(intervals(*one, draws=200)["pmF1"])[0] for one in (few, many)]
    assert 2.5 < width[0] / width[1] < 6.5  # the square root of 16
    apart = np.diff(intervals(few[0], [str(n) for n in range(100)], draws=200)["pmF1"])[0]
    assert apart < 0.85 * width[0], "pairs drawn one by one look more certain than they are"
    assert intervals(*few, draws=50) == intervals(*few, draws=50)


def test_rows_add_up():
    pairs = CASES["22 ten and ten"][0]
    assert rows_of(pairs).shape == (20, COLUMNS)
    stacked = np.stack([rows_of(pairs).sum(0), rows_of(CASES["2 perfect"][0]).sum(0)])
    assert metrics(stacked)["cgF1"] == pytest.approx([0.904480, 0.999849], abs=1e-6)
