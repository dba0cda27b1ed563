# SPDX-License-Identifier: Apache-2.0
"""J, F and the two protocols, against loops over pixels, all distances between boundary pixels, and by hand."""

import math

import numpy as np
import pytest

from effsam3.benchmarks.jaccard import (
    DavisScorer,
    ObjectScore,
    SavScorer,
    ScoreError,
    boundary,
    boundary_measure,
    mean_scores,
    region_similarity,
    statistics,
)


def slow_j(predicted, truth):
    both = either = 0
    for one, other in zip(predicted.flat, truth.flat, strict=True):
        both += bool(one and other)
        either += bool(one or other)
    return both / either if either else 1.0


def slow_edges(mask):
    """Boundary pixels as a list of (row, column)."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            steps = [(0, 1), (1, 0), (1, 1)]
            if y == height - 1:
                steps = [(0, 1)]
            if x == width - 1:
                steps = [(1, 0)]
            if y == height - 1 and x == width - 1:
                steps = []
            if any(mask[y, x] != mask[y + dy, x + dx] for dy, dx in steps):
                found.append((y, x))
    return found


def slow_f(predicted, truth):
    """F from the distance of every boundary pixel to every one of the other mask."""
    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    edges = [np.array(slow_edges(mask)).reshape(-1, 2) for mask in (predicted, truth)]
    if not len(edges[0]) or not len(edges[1]):
        return float(len(edges[0]) == len(edges[1]))
    squared = ((edges[0][:, None] - edges[1][None]) ** 2).sum(-1)
    precision = (squared.min(1) <= radius**2).mean()
    recall = (squared.min(0) <= radius**2).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def ellipses(rng, height, width, count):
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(count):
        cy, cx = rng.uniform(-0.1, 1.1, 2) * (height, width)
        ry, rx = rng.uniform(0.05, 0.3, 2) * (height, width)
        mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return mask


@pytest.mark.parametrize("size", [(13, 9), (48, 64), (120, 230)])  # tolerances of 1, 1 and 3 pixels
def test_measures_equal_slow_ones(size):
    rng = np.random.default_rng(0)
    for round_ in range(3):
        truth = ellipses(rng, *size, 1 + round_)
        moved = np.roll(truth, rng.integers(-5, 6, 2), (0, 1))
        for predicted in (moved, ellipses(rng, *size, 2), rng.random(size) > 0.95):
            assert region_similarity(predicted, truth) == pytest.approx(slow_j(predicted, truth), abs=1e-12)
            assert boundary_measure(predicted, truth) == pytest.approx(slow_f(predicted, truth), abs=1e-12)


def test_tolerance_at_the_size_of_davis_is_eight_pixels():
    truth = np.zeros((480, 854), bool)
    truth[100:200, 100:300] = True
    assert boundary_measure(np.roll(truth, 8, 0), truth) == 1.0
    assert boundary_measure(np.roll(truth, 9, 0), truth) < 0.6


def special_masks():
    empty, corner, pixel = (np.zeros((20, 30), bool) for _ in range(3))
    corner[-1, -1] = pixel[5, 7] = True
    return {"empty": empty, "full": ~empty, "corner": corner, "pixel": pixel}


@pytest.mark.parametrize("one", special_masks())
@pytest.mark.parametrize("other", special_masks())
def test_empty_full_and_single_pixels(one, other):
    predicted, truth = special_masks()[one], special_masks()[other]
    assert region_similarity(predicted, truth) == slow_j(predicted, truth)
    assert boundary_measure(predicted, truth) == slow_f(predicted, truth)


def test_values_known_by_hand():
    masks = special_masks()
    assert region_similarity(masks["empty"], masks["empty"]) == 1.0
    # Neither an empty nor a full mask has a boundary: for F they agree, for J not at all.
    assert boundary_measure(masks["full"], masks["empty"]) == 1.0
    assert region_similarity(masks["full"], masks["empty"]) == 0.0
    assert boundary_measure(masks["pixel"], masks["empty"]) == 0.0
    # A pixel's boundary: itself and its western, northern and north-western neighbours; a corner's: two of those.
    assert slow_edges(masks["pixel"]) == [(4, 6), (4, 7), (5, 6), (5, 7)]
    assert np.argwhere(boundary(masks["pixel"])).tolist() == [[4, 6], [4, 7], [5, 6], [5, 7]]
    assert np.argwhere(boundary(masks["corner"])).tolist() == [[18, 28], [18, 29], [19, 28]]


def test_statistics_by_hand():
    # Nine values: bounds at 0, 2, 4, 6, 8, which both quarters hold.
    mean, recall, decay = statistics(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]))
    assert mean == pytest.approx(0.5) and recall == pytest.approx(4 / 9)
    assert decay == pytest.approx((0.9 + 0.8 + 0.7) / 3 - (0.3 + 0.2 + 0.1) / 3)
    # Six: 1, 2.25, 3.5, 4.75, 6 round to 1, 2, 4, 5, 6.
    assert statistics(np.array([1, 0.5, 0, 0, 0.5, 0]))[2] == pytest.approx(0.75 - 0.25)
    assert statistics(np.array([0.3])) == (0.3, 0.0, 0.0)
    long = np.linspace(1, 0, 401)
    assert statistics(long)[2] == pytest.approx(long[:101].mean() - long[300:].mean())


def square(at, side=4):
    mask = np.zeros((24, 32), bool)
    mask[at : at + side, at : at + side] = True
    return mask


EMPTY = np.zeros((24, 32), bool)


def scored(scorer, truths, predictions):
    for truth, predicted in zip(truths, predictions, strict=True):
        scorer.add(truth, predicted)
    return scorer.scores()


def test_davis_skips_the_first_and_the_last_frame():
    truths = [{1: square(3)}] * 5
    right, wrong = {1: square(3)}, {1: square(15)}
    ends_wrong = scored(DavisScorer("v"), truths, [wrong, right, right, right, wrong])
    assert ends_wrong == {
        1: ObjectScore(J=1, F=1, J_recall=1, F_recall=1, J_decay=0, F_decay=0, frames=3),
    }
    later_wrong = scored(DavisScorer("v"), truths, [right, right, right, wrong, right])
    assert later_wrong[1].J == pytest.approx(2 / 3) and later_wrong[1].J_recall == pytest.approx(2 / 3)


def test_davis_objects_are_those_of_the_first_frame_whatever_their_ids():
    # 2 and 4 come later.
    truths = [{1: square(3), 3: square(9), 2: EMPTY}] + [{2: square(1), 3: square(9), 4: square(15)}] * 3
    predictions = [{}, {3: square(9)}, {3: square(9), 2: EMPTY}, {}]
    scores = scored(DavisScorer("v"), truths, predictions)
    assert list(scores) == [1, 3]
    # 1 is absent from truth and predictions, also where it was left out: both count as agreement.
    assert scores[1].J == scores[1].F == 1.0 and scores[3].J == 1.0
    assert {score.frames for score in scores.values()} == {2}


@pytest.mark.parametrize("ids", [(7, 12), (100, 200), (0, 5), (1, 255), (-3, 70_000), (1, 2)])
def test_ids_with_gaps_do_not_change_a_score(ids):
    """By hand: one object is missed on all frames, the other found on one of the two that count."""
    first, second = ids
    truths = [{first: square(3), second: square(15)}] * 4
    missed = scored(DavisScorer("v"), truths, [{}] * 4)
    assert list(missed) == [first, second] and mean_scores(missed.values())["J&F"] == 0.0
    half = scored(DavisScorer("v"), truths, [{}, {second: square(15)}, {}, {}])
    assert mean_scores(half.values()) == pytest.approx(
        {"J&F": 0.25, "J": 0.25, "F": 0.25, "J_recall": 0.25, "F_recall": 0.25, "J_decay": 0.5, "F_decay": 0.5,
         "objects": 2}
    )  # fmt: skip


def test_davis_equals_a_walk_over_id_maps():
    """As PNGs hold them: every id of the first map is an object, scored on all maps but the first and the last."""
    rng = np.random.default_rng(4)
    for ids in ((1, 2, 3), (7, 12, 40)):
        truths, predictions = (
            [np.where(rng.random((6, 8)) > 0.5, rng.choice([0, *ids]), 0) for _ in range(7)] for _ in range(2)
        )
        truths[0].flat[:3] = ids
        pairs = list(zip(predictions[1:-1], truths[1:-1], strict=True))
        expected = {
            number: tuple(np.mean([slow(p == number, t == number) for p, t in pairs]) for slow in (slow_j, slow_f))
            for number in ids
        }
        maps = ([{number: one == number for number in ids} for one in some] for some in (truths, predictions))
        found = {number: (score.J, score.F) for number, score in scored(DavisScorer("v"), *maps).items()}
        assert found == {number: pytest.approx(values) for number, values in expected.items()}


def test_davis_refuses_what_its_toolkit_quits_over():
    good, more = {1: square(3)}, {1: square(3), 2: square(9)}
    with pytest.raises(ScoreError, match="bear: predicted object 2, which the first annotated frame does not show"):
        scored(DavisScorer("bear"), [good] * 3, [good, more, {}])
    # The toolkit does not read the first and the last frame.
    assert scored(DavisScorer("bear"), [good] * 3, [more, good, more])[1].J == 1.0
    # An empty mask is what a PNG without that id says.
    scored(DavisScorer("bear"), [good] * 3, [{1: square(3), 2: EMPTY}] * 3)
    with pytest.raises(ScoreError, match="bear: the first annotated frame shows no object"):
        scored(DavisScorer("bear"), [{1: EMPTY}, good], [{}, {}])
    assert scored(DavisScorer("bear"), [good] * 2, [{}] * 2) == {1: None}, "no frame that counts"


def test_masks_of_another_size_are_refused():
    for scorer in (DavisScorer("bear"), SavScorer("bear")):
        with pytest.raises(ScoreError, match=r"bear, object 1: the predicted mask is \(24, 31\), .* \(24, 32\)"):
            scorer.add({1: square(3)}, {1: square(3)[:, 1:]})


def test_sav_does_not_score_leading_frames_where_both_are_empty():
    truths = [{7: mask} for mask in (EMPTY, EMPTY, EMPTY, square(3), EMPTY, square(3))]
    right = [{7: mask} for mask in (EMPTY, EMPTY, EMPTY, square(15), EMPTY, square(3))]
    # Of frames 1 to 4, the first two do not count; the third is wrong; on the fourth both are empty again: right.
    sav = scored(SavScorer("v"), truths, right)
    assert sav[7].J == 0.5 and sav[7].frames == 2
    # A prediction on the second of those frames starts the count there.
    early = [right[0], right[1], {7: square(15)}, *right[3:]]
    assert scored(SavScorer("v"), truths, early)[7].J == pytest.approx(1 / 3)
    # DAVIS counts all four; it takes an object of the first frame.
    truths[0] = {1: square(3)}
    davis = scored(DavisScorer("v"), [{1: next(iter(t.values()))} for t in truths],
                   [{1: next(iter(p.values()))} for p in right])  # fmt: skip
    assert davis[1].J == 0.75


def test_sav_skips_first_and_last_of_the_frames_on_which_the_object_itself_is_annotated():
    truths = [{1: square(3)}, {1: square(3), 2: square(9)}, {1: square(3), 2: square(9)}, {2: square(9)},
              {1: square(3)}]  # fmt: skip
    wrong, right = square(15), {1: square(3), 2: square(9)}
    predictions = [right, right | {2: wrong}, right | {1: wrong}, right | {2: wrong}, right]
    scores = scored(SavScorer("v"), truths, predictions)
    # 1: frames 1 and 2 of 0, 1, 2, 4; 2: frame 2 of 1, 2, 3.
    assert scores[1].J == 0.5 and scores[1].frames == 2
    assert scores[2].J == 1.0 and scores[2].frames == 1


def test_sav_object_absent_from_all_frames_that_count_has_no_score():
    truths = [
        {1: square(3), 2: square(9)},
        {1: square(3), 2: EMPTY},
        {1: square(3), 2: EMPTY},
        {1: EMPTY, 2: square(9)},
    ]
    predictions = [{1: square(3), 2: square(9)}] * 4
    scores = scored(SavScorer("v"), truths, predictions)
    assert scores[1].J == 1.0 and scores[2] is None
    assert scored(SavScorer("v"), truths[:2], predictions[:2]) == {1: None, 2: None}


def test_sav_refuses_a_missing_prediction():
    with pytest.raises(ScoreError, match="v: object 2 is annotated but has no predicted mask"):
        SavScorer("v").add({1: square(3), 2: square(9)}, {1: square(3)})


def test_sav_equals_a_walk_over_id_maps_with_the_set_of_objects_seen_so_far():
    """One id map per frame, as the official evaluator reads DAVIS-like folders; objects that come and go."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        truths, predictions = (
            [np.where(rng.random((6, 8)) > 0.5, rng.choice([0, 0, 1, 2, 3]), 0) for _ in range(9)] for _ in range(2)
        )
        seen, in_truth, values = set(), set(), {number: [] for number in (1, 2, 3)}
        for truth, predicted in zip(truths[1:-1], predictions[1:-1], strict=True):
            in_truth |= set(truth.flat) - {0}
            seen |= (set(truth.flat) | set(predicted.flat)) - {0}
            for number in seen:
                values[number].append(slow_j(predicted == number, truth == number))
        expected = {number: np.mean(values[number]) if number in in_truth else None for number in values}
        truth_masks, predicted_masks = (
            [{number: ids == number for number in (1, 2, 3)} for ids in maps] for maps in (truths, predictions)
        )
        scores = scored(SavScorer("v"), truth_masks, predicted_masks)
        assert {number: score and pytest.approx(score.J) for number, score in scores.items()} == expected


def test_means_are_over_objects_whatever_the_video():
    scores = [
        ObjectScore(J=0.2, F=0.4, J_recall=0, F_recall=0, J_decay=0.1, F_decay=0, frames=90),
        ObjectScore(J=0.8, F=0.8, J_recall=1, F_recall=1, J_decay=0.3, F_decay=0, frames=3),
    ]
    means = mean_scores(scores)
    assert means["J"] == pytest.approx(0.5) and means["F"] == pytest.approx(0.6)
    assert means["J&F"] == pytest.approx(0.55) and means["J_decay"] == pytest.approx(0.2)
    assert means["objects"] == 2 and "frames" not in means
    with pytest.raises(ScoreError, match="no object"):
        mean_scores([])
