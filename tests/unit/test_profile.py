# SPDX-License-Identifier: Apache-2.0
"""The verb `profile`: costs by hand, models in turn, names that do not exist."""

import json

import pytest
import torch
from torch import nn

from effsam3.benchmarks.parts import RUNTIMES, costs, quantile
from effsam3.cli import main
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.exporting.flow import Example
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.parts import Part, parts_of
from effsam3.models.inference.concepts import load_model
from effsam3.verbs import PARTS, PROFILED


class Network(nn.Module):
    """5 numbers to 7 to 3; a layer that nobody asks, and a parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(100, 100)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, pixels):
        hidden = self.first(pixels)
        found = self.second(hidden)
        del hidden
        return found * self.scale


def test_costs_are_those_counted_by_hand():
    part = Part("network", Network().requires_grad_(False), {"pixels": "2 5"}, {"features": "2 3"})
    found = costs(Example(part, {"pixels": torch.ones(2, 5)}, {}))
    assert found["parameters"] == 5 * 7 + 7 + 7 * 3 + 3
    assert found["gflop"] == pytest.approx(2 * 2 * (5 * 7 + 7 * 3) / 1e9)
    # 14 and 6 float32 at once; the hidden ones are gone when the last 6 come.
    assert found["peak_mb"] == pytest.approx(4 * (14 + 6) / 1e6)


def test_the_quantile_is_one_of_the_values():
    values = [float(value) for value in range(1, 11)]
    assert [quantile(values, share) for share in (0.5, 0.9, 0.91, 1.0)] == [5, 9, 10, 10]
    assert quantile([3.0], 0.9) == 3


def test_a_model_is_measured_next_to_its_teacher(tmp_path, capsys):
    options = ["--teacher", "tiny", "--parts", "trunk", "--runtimes", "eager,onnxruntime", "--rounds", "2"]
    assert main(["profile", "tiny", *options, "--out", str(tmp_path / "profile")]) == 0
    said = capsys.readouterr().out
    about = json.loads((tmp_path / "profile/profile.json").read_text())
    for model in ("model", "teacher"):
        trunk = about["parts"][model]["trunk"]
        assert trunk["parameters"] == 175_744 and trunk["gflop"] > 0.05 and trunk["peak_mb"] > 0.1
        assert set(trunk["ms"]) == {"eager", "onnxruntime"}
        assert all(0 < ms["median"] <= ms["p90"] for ms in trunk["ms"].values())
    assert (tmp_path / "profile/profile.md").read_text().strip() in said and "teacher: tiny" in said
    assert (tmp_path / "profile/profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtimes", "eagr"], "--runtimes: there is no 'eagr'; did you mean eager?"),
        (["--parts", "trunk,necks"], "--parts: there is no 'necks'"),
    ],
)
def test_names_that_do_not_exist(options, message, capsys):
    assert main(["profile", "tiny", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_names_of_parts_are_those_of_an_export():
    model = load_model(chassis_folder("tiny"))
    assert tuple(part.name for part in parts_of(model) + memory_parts(model)) == PARTS
    assert tuple(PROFILED) == RUNTIMES
