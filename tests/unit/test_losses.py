# SPDX-License-Identifier: Apache-2.0
"""The distillation losses against plain loops."""

import pytest
import torch
import torch.nn.functional as F

from effsam3.losses.features import agreement_sums, feature_loss, mean_over_images, relative_error, standardise
from effsam3.recipe.common import FeatureRecipe


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(3, 5, 4, 6, generator=generator) for _ in range(2))
    valid = (torch.rand(3, 1, 4, 6, generator=generator) > 0.3).float()
    return pred, target, valid


def loop(pred, target, valid, channels):
    """Sum over every valid position, divide per image, average over the images that have valid positions."""
    mse, cosine, images = 0.0, 0.0, 0
    for p, t, m in zip(pred, target, valid, strict=True):
        cells = [(p[:, y, x], t[:, y, x]) for y in range(4) for x in range(6) if m[0, y, x]]
        if not cells:
            continue
        images += 1
        squares = [((a - b) ** 2).sum() / (len(a) if channels == "mean" else 1) for a, b in cells]
        cosines = [1 - (a @ b) / (a.norm() * b.norm()) for a, b in cells]
        mse, cosine = mse + sum(squares) / len(cells), cosine + sum(cosines) / len(cells)
    return mse / images, cosine / images


@pytest.mark.parametrize("channels", ["mean", "sum"])
def test_equals_the_plain_loop(maps, channels):
    terms = feature_loss(*maps, channels)
    mse, cosine = loop(*maps, channels)
    torch.testing.assert_close(terms["mse"], mse)
    torch.testing.assert_close(terms["cosine"], cosine)


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_autograds(maps, compiled):
    """Of the formula for both, against torch's own functions; also where a prediction is zero."""
    pred, target, valid = maps
    pred[0, :, 0, 0] = 0
    statistics = target.mean((0, 2, 3)), target.std((0, 2, 3))
    own, plain = (pred.clone().requires_grad_() for _ in range(2))
    loss = torch.compile(feature_loss, fullgraph=True, backend="aot_eager") if compiled else feature_loss
    found = loss(own, target, valid, "mean", statistics)
    standard = [standardise(feat, *statistics) for feat in (plain, target)]
    expected = {
        "mse": mean_over_images((standard[0] - standard[1]).square().mean(1), valid),
        "cosine": mean_over_images(1 - F.cosine_similarity(*standard, dim=1), valid),
    }
    torch.testing.assert_close(dict(found), expected)
    gradients = [
        (terms["mse"] + 3 * terms["cosine"]).backward() or leaf.grad
        for terms, leaf in ((found, own), (expected, plain))
    ]
    torch.testing.assert_close(*gradients)


def test_sum_is_mean_times_channels(maps):
    summed, mean = (feature_loss(*maps, channels)["mse"] for channels in ("sum", "mean"))
    torch.testing.assert_close(summed, mean * 5)


def test_an_image_without_valid_positions_counts_nowhere(maps):
    pred, target, valid = maps
    valid[1] = 0
    kept = [0, 2]
    for name, value in feature_loss(pred, target, valid, "mean").items():
        torch.testing.assert_close(value, feature_loss(pred[kept], target[kept], valid[kept], "mean")[name])
    nothing = feature_loss(pred, target, torch.zeros_like(valid), "mean")
    assert nothing["mse"] == 0 and nothing["cosine"] == 0


def test_padding_gets_no_gradient(maps):
    pred, target, valid = maps
    pred.requires_grad_()
    sum(feature_loss(pred, target, valid, "mean").values()).backward()
    assert not pred.grad[(valid == 0).expand_as(pred)].any()
    assert pred.grad[(valid == 1).expand_as(pred)].all()


def test_standardised_features_have_mean_0_and_deviation_1(maps):
    target = maps[1] * torch.tensor([1.0, 100.0, 0.01, 3.0, 5.0])[:, None, None] + 7
    mean, deviation = target.mean((0, 2, 3)), target.std((0, 2, 3), correction=0)
    standard = standardise(target, mean, deviation)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_relative_error_is_1_for_zeros_and_0_for_the_target(maps):
    _, target, valid = maps
    assert relative_error(torch.zeros_like(target), target, valid) == 1
    assert relative_error(target, target, valid) == 0


def test_what_may_choose_the_best_checkpoint_is_measured(maps):
    sums = agreement_sums(*maps, torch.zeros(5), torch.ones(5))
    assert FeatureRecipe.metrics.keys() < {f"val/{name}" for name in sums}


def test_predicting_the_mean_scores_0_and_1(maps):
    _, target, _ = maps
    everywhere = torch.ones(3, 1, 4, 6)
    mean, deviation = target.mean((0, 2, 3)), target.std((0, 2, 3), correction=0)
    sums = agreement_sums(mean[:, None, None].expand_as(target), target, everywhere, mean, deviation)
    assert sums["positions"] == 72
    torch.testing.assert_close(sums["mse"] / 72, torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(sums["cosine"], sums["cosine_of_mean"])
