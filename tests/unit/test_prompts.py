# SPDX-License-Identifier: Apache-2.0
"""Prompts drawn from masks: frequencies, borders and signs."""

from collections import Counter

import numpy as np
import pytest
import torch

from effsam3.models.memory.prompts import PromptStyle, draw_clicks, draw_kind, draw_prompt


@pytest.fixture
def mask():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 40:60] = True
    return mask


def test_kinds_come_by_their_shares():
    rng = np.random.default_rng(0)
    counts = Counter(draw_kind({"mask": 0.5, "point": 0.25, "box": 0.25}, rng) for _ in range(4000))
    assert counts["mask"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert counts["point"] / 4000 == pytest.approx(0.25, abs=0.03)


def test_points_lie_inside_and_everywhere(mask):
    rng = np.random.default_rng(0)
    found = {tuple(draw_prompt(mask, "point", rng)[0][0].int().tolist()) for _ in range(3000)}
    assert all(mask[y, x] for x, y in found) and len(found) > 390  # of 400 pixels
    labels = draw_prompt(mask, "point", rng)[1]
    assert labels.tolist() == [1, -1]


def test_boxes_are_loose_by_a_tenth_at_most(mask):
    rng = np.random.default_rng(0)
    boxes = torch.stack([draw_prompt(mask, "box", rng)[0].flatten() for _ in range(500)])
    tight = torch.tensor([40.0, 10.0, 59.0, 29.0])
    assert (boxes - tight).abs().max() <= 1.9 + 1e-5 and (boxes - tight).abs().max() > 1.5
    assert draw_prompt(mask, "box", rng)[1].tolist() == [2, 3]


def test_boxes_stay_in_the_image():
    mask = torch.ones(32, 32, dtype=torch.bool)
    boxes = torch.stack([draw_prompt(mask, "box", np.random.default_rng(seed))[0] for seed in range(50)])
    assert boxes.min() >= 0 and boxes.max() <= 31


def test_same_generator_same_prompt(mask):
    first, second = (draw_prompt(mask, "point", np.random.default_rng([1, 2]))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_clicks_fall_where_the_prediction_is_wrong(mask):
    missed, excess = torch.zeros_like(mask), mask.clone()
    excess[0:5, 0:5] = True
    full = torch.ones_like(mask)
    pred, truth = torch.stack([missed, excess, mask, full]), torch.stack([mask, mask, mask, full])
    for _ in range(20):
        points, labels = draw_clicks(pred, truth, torch.rand(4))
        assert points.shape == (4, 1, 2) and labels[:, 0].tolist() == [1, 0, 0, 1]
        x, y = points[:, 0].long().unbind(1)
        assert mask[y[0], x[0]]  # missed: inside the object
        assert y[1] < 5 and x[1] < 5  # too much: in the excess
        assert not mask[y[2], x[2]]  # perfect: outside


def test_every_wrong_pixel_can_be_clicked_and_the_batch_does_not_matter(mask):
    truth, pred = mask[None].expand(400, -1, -1), torch.zeros(400, 64, 64, dtype=torch.bool)
    chance_N = (torch.arange(400) + 0.5) / 400
    points, _ = draw_clicks(pred, truth, chance_N)
    found = {tuple(point) for point in points[:, 0].int().tolist()}
    assert found == {(x, y) for y, x in mask.nonzero().tolist()}
    alone, _ = draw_clicks(pred[:1], truth[:1], chance_N[7:8])
    assert torch.equal(alone[0], points[7])
    for chance in (0.0, 1.0):  # the ends, too, are pixels of the mask
        x, y = draw_clicks(pred[:1], truth[:1], torch.tensor([chance]))[0][0, 0].long()
        assert mask[y, x]


# ---- styles


def drawn(mask, kind, seed=0, **style):
    points, labels = draw_prompt(mask, kind, np.random.default_rng(seed), PromptStyle(**style))
    return [tuple(point) for point in points.tolist()], labels.tolist()


def test_the_numbers_of_recipes_before_styles(mask):
    """What a run of an earlier version drew: the same points and boxes from the same generator."""
    rng = np.random.default_rng(7)
    rows, columns = (axis.tolist() for axis in mask.nonzero(as_tuple=True))
    chosen = rng.integers(len(rows))
    assert drawn(mask, "point", 7) == ([(columns[chosen], rows[chosen]), (0, 0)], [1, -1])
    box = np.array([[40.0, 10.0], [59.0, 29.0]]) + np.random.default_rng(7).uniform(-1, 1, (2, 2)) * 1.9
    assert drawn(mask, "box", 7)[0] == [tuple(corner) for corner in np.float32(box).tolist()]


def test_several_points_are_distinct_and_uniform(mask):
    small = torch.zeros(8, 8, dtype=torch.bool)
    small[2, 1:5] = True
    counts = Counter()
    for seed in range(600):
        points, labels = drawn(small, "point", seed, points=3)
        assert len(set(points)) == 3 and labels == [1] * 3 and all(small[int(y), int(x)] for x, y in points)
        counts.update([frozenset(points)])
    assert len(counts) == 4 and min(counts.values()) > 110  # of 150 each
    points, labels = drawn(small, "point", points=9)  # more than there are pixels
    assert sorted(points) == [(x, 2) for x in range(1, 5)] and labels == [1] * 4


def test_centre_is_one_of_the_points_where_it_is_inside(mask):
    # The mean of rows 10..29 is 19.5, of columns 40..59 it is 49.5.
    assert drawn(mask, "point", centre=True) == ([(49, 19), (0, 0)], [1, -1])
    points, labels = drawn(mask, "point", centre=True, points=4)
    assert points[0] == (49, 19) and len(set(points)) == 4 and labels == [1] * 4
    ring = mask.clone()
    ring[15:25, 45:55] = False
    points, labels = drawn(ring, "point", centre=True, points=2)
    assert labels == [1, 1] and all(ring[int(y), int(x)] for x, y in points) and (49, 19) not in points


def test_negatives_come_from_all_of_the_background(mask):
    points, labels = drawn(mask, "point", points=2, negatives=300)
    assert labels == [1] * 2 + [0] * 300 and len(set(points)) == 302
    outside = points[2:]
    assert not any(mask[int(y), int(x)] for x, y in outside)
    assert {(x < 32, y < 32) for x, y in outside} == {(True, True), (True, False), (False, True), (False, False)}
    full = torch.ones(4, 4, dtype=torch.bool)  # no background
    assert drawn(full, "point", negatives=2)[1] == [1, -1]


def test_mixed_is_a_box_and_points(mask):
    points, labels = drawn(mask, "mixed", negatives=1, jitter=0.0)
    assert labels == [2, 3, 1, 0] and points[:2] == [(40, 10), (59, 29)]
    assert drawn(mask, "box", jitter=1.0, jitter_px=0.0)[0] == points[:2]
    loose = [drawn(mask, "box", seed, jitter=1.0, jitter_px=3.0)[0] for seed in range(50)]
    assert 2.5 < max(abs(x - 40) for (x, _), _ in loose) <= 3


@pytest.mark.parametrize("kind", ["mask", "point", "box", "mixed"])
def test_an_empty_mask_gives_an_empty_prompt(kind):
    points, labels = drawn(torch.zeros(16, 16, dtype=torch.bool), kind, points=3, negatives=3, centre=True)
    assert labels == [-1, -1] and points == [(0, 0)] * 2


def test_kinds_without_a_share_are_not_drawn():
    rng = np.random.default_rng(0)
    assert {draw_kind({"mixed": 0.5, "box": 0.5}, rng) for _ in range(50)} == {"mixed", "box"}
