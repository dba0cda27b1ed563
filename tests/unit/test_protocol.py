# SPDX-License-Identifier: Apache-2.0
"""Stages fit the protocol of the training loop, and built from shapes they are what they are with weights."""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate import Accelerator
from run_folders import RECIPES

from effsam3 import stages
from effsam3.hardware.budget.dry_run import DryPlace
from effsam3.recipe.reader import load_recipe
from effsam3.stages.protocol import Stage
from effsam3.training.report import Report

FEW = {
    "image": ["data.synthetic_images=12", "teacher=online", "loss.neck=0.1"],
    "text": ["data.synthetic_captions=60"],
    "concepts": ["data.synthetic_images=4", "data.synthetic_held_out=2"],
    "memory": ["sam3.checkpoint=tiny", "data.synthetic_videos=6", "data.synthetic_frames=12", "data.frames=2"],
}
MADE_WHEN_READ = {"train_size", "val_data"}  # of the data


@pytest.fixture(params=sorted(FEW))
def recipe(request, tmp_path):
    """A smoke recipe of little data in a folder of its own."""
    stage, keys = request.param, list(FEW[request.param])
    if stage == "text":
        keys += [f"data.captions={tmp_path}/recap", f"data.phrases=[{tmp_path}/phrases.txt]"]
    else:
        keys += [f"data.path={tmp_path}/data" if stage == "concepts" else f"data.index={tmp_path}/index.parquet"]
    return load_recipe(RECIPES / f"smoke/{stage}.yaml", [*keys, f"train.runs={tmp_path}"])


def from_shapes(recipe):
    with torch.device("meta"):
        return stages.training(recipe.stage).STAGE.from_shapes(recipe, DryPlace(recipe.train.precision))


def members():
    """What the protocol asks for: names of methods, properties and attributes."""
    return {name for name in {**vars(Stage), **Stage.__annotations__} if not name.startswith("_")}


def test_a_stage_has_what_the_loop_needs(recipe):
    stage = from_shapes(recipe)
    assert {"student", "loss", "train_batches", "from_recipe", "facts"} <= members()
    assert {name for name in members() - MADE_WHEN_READ if not hasattr(stage, name)} == set()
    for name in members():
        if inspect.isroutine(asked := getattr(Stage, name, None)):
            has = inspect.signature(getattr(type(stage), name))
            assert list(has.parameters) == list(inspect.signature(asked).parameters), name


def test_shapes_alone_make_the_modules_that_weights_make(recipe, tmp_path):
    dry = from_shapes(recipe)
    real = stages.training(recipe.stage).STAGE.from_recipe(recipe, Report(tmp_path), Accelerator(cpu=True))

    def shapes(stage):
        whole = (stage.student, *stage.frozen)
        return [{name: tensor.shape for name, tensor in part.state_dict().items()} for part in whole]

    assert shapes(dry) == shapes(real)
    assert dry.student_parameters == real.student_parameters
    assert all(tensor.is_meta for part in (dry.student, *dry.frozen) for tensor in part.parameters())
    assert {name for name in members() if not hasattr(real, name)} == set()

    batch = next(iter(real.train_batches(0, 1, 2)))
    example = dry.example(2)
    assert set(example) <= set(batch) | {"features"}  # those that a store would have are counted for a teacher, too
    for name in set(example) & set(batch):
        if isinstance(batch[name], torch.Tensor):
            assert example[name].dtype == batch[name].dtype, name
            assert all(most >= some for most, some in zip(example[name].shape, batch[name].shape, strict=True)), name
