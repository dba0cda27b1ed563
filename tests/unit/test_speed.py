# SPDX-License-Identifier: Apache-2.0
"""Timing: models in turn, and the first calls of a shape do not count."""

import torch

from effsam3.benchmarks import speed


def test_models_take_turns_and_warm_up(monkeypatch):
    taken = {"teacher": [900, 800, 5, 7, 6, 9, 6, 60], "student": [700, 2, 2, 1, 1, 3, 3, 30]}
    now, called = 0.0, []

    def call(name):
        nonlocal now
        now += taken[name][called.count(name)] / 1000
        called.append(name)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    calls = {name: lambda name=name: call(name) for name in taken}
    found = speed.alternate(calls, torch.device("cpu"))
    assert {name: round(ms, 6) for name, ms in found.items()} == {"teacher": 6.5, "student": 2.5}
    assert called == ["teacher", "student"] * 8
