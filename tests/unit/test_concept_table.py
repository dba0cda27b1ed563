# SPDX-License-Identifier: Apache-2.0
"""scripts/concept_table.py: its wrong choices are what they say, its recipes are valid, what is done stays done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import concept_rows
import concept_table

from effsam3.files import write_json
from effsam3.losses.detection import Instances
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.image.student import LinearHead
from effsam3.stages.concepts import training as concepts
from effsam3.stages.image import training as image


def test_wrong_pixels_are_imagenets():
    grey = torch.tensor([[123.675, 116.28, 103.53]])[..., None, None] + torch.zeros(1, 3, 2, 2)
    right = image.normalise(grey)
    with concept_rows.imagenet_pixels():
        assert torch.equal(image.normalise(grey), torch.zeros_like(grey))
        torch.testing.assert_close(concepts.normalise(grey + 58.395)[:, 0], torch.ones(1, 2, 2))
    assert torch.equal(image.normalise(grey), right)


def test_one_instance_is_one_that_is_there():
    class Found(NamedTuple):
        instances: Instances

    valid_RN = torch.tensor([[False, True, True, True], [False, False, False, False], [True, False, False, False]])
    found = Found(Instances(torch.rand(3, 4, 4), torch.rand(3, 4, 8, 8), valid_RN))
    chosen = set()
    with mock.patch.object(concepts.ConceptsStage, "inputs", lambda self, batch: found), concept_rows.one_instance():
        for _ in range(30):
            one_RN = concepts.ConceptsStage.inputs(None, None).instances.valid_RN
            assert one_RN.sum(1).tolist() == [1, 0, 1] and not (one_RN & ~valid_RN).any()
            chosen.add(int(one_RN[0].int().argmax()))
    assert chosen == {1, 2, 3}


def test_the_wrong_level_is_the_last_one_that_the_detector_reads():
    folder = chassis_folder("tiny_concepts")
    model = load_whole(model_class(read_config(folder).model_type), folder)
    feat = torch.rand(1, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = concepts.detector_levels(model, feat)
        with concept_rows.coarsest_level():
            wrong = concepts.detector_levels(model, feat)
        maps, places = model.detector_model.vision_encoder.neck(feat)
    # transformers' detector leaves out the last level and reads the one before it.
    for levels, level in ((right, 2), (wrong, 3)):
        assert torch.equal(levels.top_BCGG, maps[level]) and torch.equal(levels.place_1CGG, places[level])
    assert [[share.shape[-1] for share in levels.shares] for levels in (right, wrong)] == [[16, 32], [8, 16, 32]]


def test_stride_32_reads_every_second_position():
    torch.manual_seed(0)
    head, grid = LinearHead((6,), 4), (8, 8)
    map_ = torch.randn(1, 6, 10, 10)
    with concept_rows.stride_32():
        found = head([map_], grid)
    assert torch.equal(found, head([map_[..., ::2, ::2]], grid)) and not torch.allclose(found, head([map_], grid))


@pytest.fixture
def bench(tmp_path):
    return concept_table.Bench("tiny_concepts", tmp_path / "data", tmp_path / "table", steps=50, pairs=24)


def done(cgf1, **more):
    own = {"cgF1": cgf1, "IL_MCC": 0.5, "pmF1": 0.4, "intervals": {"cgF1": [cgf1 - 0.1, cgf1 + 0.1]}}
    return {"student": own, "teacher": own, "pairs": 24, "steps": 50, "cpu_s": 2.0} | more


def finish(bench, name, seed, cgf1, **more):
    folder = bench.run(name, seed)
    folder.mkdir(parents=True)
    write_json(folder / "row.json", done(cgf1, row=name, **more))


@pytest.mark.parametrize("name", concept_rows.ROWS)
def test_every_row_is_a_recipe_that_can_be_read(name, bench):
    row = concept_rows.ROWS[name]
    for needed in filter(None, (row.after, row.as_long_as)):
        finish(bench, needed, 1, 0.1, cpu_s=6.0 if needed == row.as_long_as else 2.0)
    recipe = bench.recipe(name, 1)
    assert (recipe.train.seed, recipe.merge.checkpoint, recipe.name) == (1, "last", f"{name}-s1")
    # A control takes as long as its row: 6 s at 2 s for 50 steps.
    wanted = 150 if row.as_long_as else 100 if name == "early" else 1000 if row.after is None else 50
    assert recipe.train.steps == recipe.train.eval_every == wanted


def test_what_is_done_is_not_done_again_and_becomes_a_table(bench, tmp_path):
    for name, cgf1 in {"w4": 0.1, "w4-taught": 0.3, "ruined-sum": 0.05}.items():
        for seed in (0, 1):
            finish(bench, name, seed, cgf1)
    with mock.patch.object(concept_table.train, "run", side_effect=AssertionError):
        assert bench.result("w4-taught", 0)["student"]["cgF1"] == 0.3
    text = concept_table.report(bench, done(0.4), list(concept_rows.ROWS), [0, 1])
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert [line[3] for line in lines if line[1] == "W4, then concepts (b) teacher"] == ["30.0 (20-40) / 30.0 (20-40)"]
    assert [line[4] for line in lines if line[1] == "MSE summed over channels"] == ["12"]
    assert (tmp_path / "table/table.png").stat().st_size > 10_000
