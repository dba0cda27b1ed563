# SPDX-License-Identifier: Apache-2.0
"""Prompts drawn from masks: frequencies, borders and signs."""

from collections import Counter

import numpy as np
import pytest
import torch

from effsam3.models.memory.prompts import draw_clicks, draw_kind, draw_prompt


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
