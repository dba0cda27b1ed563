# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_rates.py on its smallest sizes: every row is measured and written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from effsam3.errors import UserError

spec = importlib.util.spec_from_file_location("gpu_rates", Path(__file__).parents[2] / "scripts/gpu_rates.py")
gpu_rates = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu_rates
spec.loader.exec_module(gpu_rates)


def test_every_rate_is_measured_and_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rates.json"
    monkeypatch.setattr(gpu_rates, "STUDENTS", ("es_tv_m",))  # each costs seconds
    monkeypatch.setattr(sys, "argv", ["gpu_rates.py", "--tiny", "--out", str(out)])
    gpu_rates.main()
    rows, printed = json.loads(out.read_text())["rates"], capsys.readouterr().out
    assert len(rows) == 3 + len(gpu_rates.STUDENTS) and all(row["per_s"] > 0 for row in rows)
    assert all(f"| {row['what']} " in printed for row in rows)
    steps = [row for row in rows if "images" in row["what"] and "step" in row["what"]]
    assert all(row["tflops"] > 0 for row in steps)


@pytest.mark.skipif(gpu_rates.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_rates.py"])
    with pytest.raises(UserError, match="no GPU here; --tiny"):
        gpu_rates.main()
