# SPDX-License-Identifier: Apache-2.0
"""scripts/benchmark.py on its smallest sizes: everything runs, and the numbers are where it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts/benchmark.py"
sys.path.insert(0, str(SCRIPT.parent))
spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark
spec.loader.exec_module(benchmark)


@pytest.fixture(autouse=True)
def threads():
    """The script sets their number for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_benchmark_runs_and_is_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "benchmark.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiny", "--rounds", "2", "--out", str(out)])
    benchmark.main()
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["benchmarks"].keys() == benchmark.BENCHMARKS.keys() and found["rounds"] == 1 and found["tiny"]
    for name, one in found["benchmarks"].items():
        ours, naive = list(one["sides"].values())[:2]
        assert one["ratio"] == ours["cpu_s"] / naive["cpu_s"] and f"| {name} " in printed
        assert all(side in printed for side in one["sides"])


def test_another_file_gives_the_naive_side(tmp_path, monkeypatch):
    module, out, calls = tmp_path / "outside.py", tmp_path / "benchmark.json", tmp_path / "calls"
    module.write_text(
        "from benchmark_images import drawn_jpeg, naive_pixels\n"
        f"def pixels(device, tiny):\n    def run():\n        open({str(calls)!r}, 'a').write('x')\n"
        "        return naive_pixels(drawn_jpeg(tiny), 32)\n    return run\n"
    )
    asked = ["--tiny", "--rounds", "3", "--only", "pixels", "--out", str(out), "--baseline-module", str(module)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *asked])
    benchmark.main()
    assert calls.read_text() == "xxx" and list(json.loads(out.read_text())["benchmarks"]) == ["pixels"]


def test_sides_take_turns_and_the_first_round_is_dropped():
    calls = []
    times = benchmark.measure({side: lambda side=side: calls.append(side) for side in "ab"}, 3, torch.device("cpu"))
    assert calls == list("ababab") and times.keys() == set("ab")
