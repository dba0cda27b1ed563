# SPDX-License-Identifier: Apache-2.0
"""Losses on masks, against loops over pixels and against what they must do at the edges."""

import math

import pytest
import torch

from effsam3.losses.masks import (
    at_side,
    bce,
    dice,
    focal,
    frame_weights,
    iou,
    mask_losses,
    object_weights,
    soft_iou,
    temporal,
)

WEIGHTS = {"focal": 20.0, "dice": 1.0}


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 5, 4, generator=generator) * 3
    target = (torch.rand(3, 5, 4, generator=generator) > 0.6).float()
    return logits, target


def test_focal_equals_a_loop(case):
    logits, target = case
    found = focal(logits, target)
    for n in range(3):
        for m in range(2):
            total = 0.0
            for value, truth in zip(logits[n, m].flatten().tolist(), target[n].flatten().tolist(), strict=True):
                p = 1 / (1 + math.exp(-value))
                right, alpha = (p, 0.25) if truth else (1 - p, 0.75)
                total += -alpha * (1 - right) ** 2 * math.log(right)
            assert found[n, m].item() == pytest.approx(total / 20, rel=1e-5)


def test_dice_equals_a_loop(case):
    logits, target = case
    found = dice(logits, target)
    for n in range(3):
        for m in range(2):
            p, t = logits[n, m].sigmoid().flatten().tolist(), target[n].flatten().tolist()
            both = sum(a * b for a, b in zip(p, t, strict=True))
            assert found[n, m].item() == pytest.approx(1 - (2 * both + 1) / (sum(p) + sum(t) + 1), rel=1e-5)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def pairs(logits_HW, target_HW):
    """(probability, truth) of every pixel."""
    return [(sigmoid(x), y) for x, y in zip(logits_HW.flatten().tolist(), target_HW.flatten().tolist(), strict=True)]


@pytest.mark.parametrize("smooth", [1e-6, 1.0])
def test_bce_dice_and_soft_iou_equal_loops(case, smooth):
    logits, target = case
    for n in range(3):
        for m in range(2):
            pixels = pairs(logits[n, m], target[n])
            both, p_sum, y_sum = (sum(values) for values in zip(*((p * y, p, y) for p, y in pixels), strict=True))
            cross = sum(-math.log(p if y else 1 - p) for p, y in pixels) / len(pixels)
            assert bce(logits, target)[n, m].item() == pytest.approx(cross, rel=1e-5)
            wanted = 1 - (2 * both + smooth) / (p_sum + y_sum + smooth)
            assert dice(logits, target, smooth)[n, m].item() == pytest.approx(wanted, rel=1e-5)
            wanted = 1 - (both + smooth) / (p_sum + y_sum - both + smooth)
            assert soft_iou(logits, target, smooth)[n, m].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("of_logits", [False, True])
def test_temporal_equals_a_loop_over_valid_pairs(of_logits):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 3, 5, generator=generator, requires_grad=True)
    target = (torch.rand(2, 4, 3, 5, generator=generator) > 0.5).float()
    valid = torch.tensor([[True, True, True, True], [False, True, True, False]])
    found = temporal(logits, target, valid, of_logits)
    for n in range(2):
        errors = []
        for t in range(3):
            if valid[n, t] and valid[n, t + 1]:
                now, then = (
                    [x if of_logits else sigmoid(x) for x in logits[n, s].flatten().tolist()] for s in (t + 1, t)
                )
                changes = (target[n, t + 1] - target[n, t]).abs().flatten().tolist()
                errors.append(sum((abs(a - b) - c) ** 2 for a, b, c in zip(now, then, changes, strict=True)) / 15)
        assert found[n].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    found.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0].any() and not logits.grad[1, [0, 3]].any()


def test_temporal_is_zero_for_one_frame_and_for_what_does_not_change():
    one = torch.randn(2, 1, 4, 4)
    assert temporal(one, one, torch.ones(2, 1, dtype=torch.bool)).tolist() == [0, 0]
    still = one.expand(2, 5, 4, 4)
    target = (still > 0).float()
    assert temporal(still, target, torch.ones(2, 5, dtype=torch.bool)).tolist() == [0, 0]
    assert temporal(still, target, torch.zeros(2, 5, dtype=torch.bool)).tolist() == [0, 0]


def test_terms_without_a_weight_are_left_out_and_all_choose_the_candidate(case):
    logits, target = case
    weights = {"bce": 1.0, "soft_iou": 0.5, "temporal": 0.1}
    parts = mask_losses(logits, torch.zeros(3, 2), torch.zeros(3), target, weights, smooth=1e-6)
    assert list(parts) == ["bce", "soft_iou", "iou", "presence"]
    each = torch.arange(3)
    best = (bce(logits, target) + 0.5 * soft_iou(logits, target, 1e-6)).argmin(1)
    torch.testing.assert_close(parts["bce"], bce(logits, target)[each, best])
    torch.testing.assert_close(parts["soft_iou"], soft_iou(logits, target, 1e-6)[each, best])


def test_frames_of_a_clip_weigh_alike_and_clips_too():
    counts = torch.tensor([[True, True, False], [False, True, False], [True, False, False], [False] * 3])
    weights = frame_weights(counts, torch.tensor([0, 0, 1, 2]), 3)
    assert weights.tolist() == [
        pytest.approx(row) for row in [[1 / 9, 1 / 9, 0], [0, 1 / 9, 0], [1 / 3, 0, 0], [0] * 3]
    ]


def test_iou_counts_pixels_and_is_zero_for_nothing(case):
    logits, target = case
    for n in range(3):
        for m in range(2):
            a, b = (logits[n, m] > 0).flatten().tolist(), (target[n] > 0.5).flatten().tolist()
            both, either = (sum(f(x, y) for x, y in zip(a, b, strict=True)) for f in (min, max))
            assert iou(logits, target)[n, m].item() == pytest.approx(both / either)
    assert iou(torch.full((1, 1, 2, 2), -1.0), torch.zeros(1, 2, 2)).item() == 0


def test_best_candidate_is_the_one_that_counts(case):
    logits, target = case
    good = torch.where(target[:, None] > 0, 8.0, -8.0)
    parts = mask_losses(torch.cat([logits, good], 1), torch.zeros(3, 3), torch.zeros(3), target, WEIGHTS)
    torch.testing.assert_close(parts["dice"], dice(good, target)[:, 0])
    # Predicted IoU of 0: the error is the true IoU, of all candidates.
    wanted = iou(torch.cat([logits, good], 1), target).mean(1)
    torch.testing.assert_close(parts["iou"], wanted)
    squared = mask_losses(
        torch.cat([logits, good], 1), torch.zeros(3, 3), torch.zeros(3), target, WEIGHTS, squared_iou=True
    )
    torch.testing.assert_close(squared["iou"], iou(torch.cat([logits, good], 1), target).square().mean(1))


@pytest.mark.parametrize(("weight", "best"), [((1, 0), 0), ((20, 1), 0), ((1, 1), 1), ((0, 1), 1)])
def test_the_weights_decide_which_candidate_is_best(weight, best):
    """An undecided candidate has the lower focal loss, one that is sure and has four pixels wrong the lower dice."""
    target = torch.zeros(1, 8, 8)
    target[:, :4] = 1
    sure = torch.where(target > 0, 8.0, -8.0)
    sure[:, 0, :4] *= -1
    logits = torch.stack([torch.zeros(1, 8, 8), sure], 1)
    weights = dict(zip(("focal", "dice"), weight, strict=True))
    parts = mask_losses(logits, torch.zeros(1, 2), torch.zeros(1), target, weights)
    assert parts["focal"] == focal(logits, target)[0, best] and parts["dice"] == dice(logits, target)[0, best]


def test_absent_object_has_the_presence_term_alone():
    parts = mask_losses(torch.randn(1, 3, 4, 4), torch.rand(1, 3), torch.tensor([2.0]), torch.zeros(1, 4, 4), WEIGHTS)
    assert parts["focal"].item() == parts["dice"].item() == parts["iou"].item() == 0
    assert parts["presence"].item() == pytest.approx(math.log(1 + math.exp(2.0)), rel=1e-6)


def test_visible_object_scored_absent_is_finite_and_bounded_and_learns():
    """SAM 2's loss is 0.25 * 1024 * area there and has no gradient, because it is taken on gated logits."""
    target = torch.zeros(1, 8, 8)
    target[:, :4] = 1
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    presence = torch.tensor([-30.0], requires_grad=True)
    parts = mask_losses(logits, torch.zeros(1, 1), presence, target, WEIGHTS)
    total = 20 * parts["focal"] + parts["dice"] + parts["presence"]
    total.sum().backward()
    assert total.item() < 40 and logits.grad.abs().sum() > 0 and presence.grad.item() == pytest.approx(-1.0, abs=1e-4)


def test_masks_shrink_by_averaging_and_logits_grow_bilinearly():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2, :1] = True
    logits, target = at_side(torch.zeros(1, 1, 2, 2), mask, 2)
    assert target.tolist() == [[[0.5, 0.0], [0.0, 0.0]]] and logits.shape == (1, 1, 2, 2)
    logits, target = at_side(torch.tensor([[[[0.0, 4.0]] * 2]]), mask, 4)
    assert logits[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0] and target.sum() == 2


def test_object_weights_are_a_mean_over_clips_whatever_the_micro_batch():
    clip = torch.tensor([0, 0, 0, 1])
    weights = object_weights(clip, 2)
    assert weights.tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    apart = [
        (values[clip == c] * object_weights(torch.zeros(int((clip == c).sum()), dtype=int), 1)).sum() for c in (0, 1)
    ]
    assert (values * weights).sum().item() == pytest.approx(sum(apart).item() / 2)
