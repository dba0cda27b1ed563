# SPDX-License-Identifier: Apache-2.0
"""Learning rate and parameter groups."""

import pytest
import timm
import torch
from torch import nn

from effsam3.training.optim import adamw, lr_at, parameter_groups

RATES = dict(steps=110, warmup_steps=10, lr=1e-3, min_lr=1e-5, warmup_lr=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-6), (5, (1e-6 + 1e-3) / 2), (10, 1e-3), (109, 1e-5), (500, 1e-5)],
)
def test_learning_rate_at_the_turning_points(step, expected):
    assert lr_at(step, **RATES) == pytest.approx(expected)


def test_learning_rate_rises_then_falls():
    rates = [lr_at(step, **RATES) for step in range(110)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_cosine_equals_torch_scheduler():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99, eta_min=1e-5)
    for step in range(10, 110):
        assert lr_at(step, **RATES) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_no_warmup():
    assert lr_at(0, steps=10, warmup_steps=0, lr=1.0, min_lr=0.0, warmup_lr=0.5) == 1.0


def test_biases_norms_and_position_biases_do_not_decay():
    model = timm.create_model("tiny_vit_5m_224", features_only=True)
    decay, rest = parameter_groups(model, 0.05)
    assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    decays = {id(parameter) for parameter in decay["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decays) == (parameter.ndim > 1 and "attention_biases" not in name), name
    assert any("attention_biases" in name for name, _ in model.named_parameters())


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = adamw(model, 1e-3, 0.01, (0.9, 0.999), 1e-8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
