# SPDX-License-Identifier: Apache-2.0
"""Run folders of students that never learned, merged by the real verb: all that comes after training needs no more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from effsam3 import merge
from effsam3.models.memory_slot import tracker_config
from effsam3.models.memory_tracker import EfficientTracker
from effsam3.models.sam3 import chassis_folder, read_config
from effsam3.models.text import text_student
from effsam3.models.tokens import PROCESSOR_LENGTH
from effsam3.models.tracker import PARTS
from effsam3.models.vision import StudentTrunk, StudentTrunkConfig
from effsam3.recipe import dump_recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def image_weights():
    config = StudentTrunkConfig(timm_name="test_convnext", hidden_size=64, image_size=224)
    return StudentTrunk(config).state_dict()


def text_weights():
    return text_student("tiny_text_plain", PROCESSOR_LENGTH, 128).state_dict()


def memory_weights():
    recipe = load_recipe(RECIPES / "smoke/memory.yaml")
    tracker = EfficientTracker(tracker_config(read_config(chassis_folder("tiny")).tracker_config, recipe.memory))
    prefixes = tuple(prefix for part in recipe.memory.trains for prefix in PARTS[part])
    return {name: tensor for name, tensor in tracker.state_dict().items() if name.startswith(prefixes)}


WEIGHTS = {"image": image_weights, "text": text_weights, "memory": memory_weights}
FEATURES = {
    "image": {"tap": "trunk", "channels": 64, "image_size": 224},
    "text": {"tap": "text", "channels": 128},
    "memory": {},
}


def trained_run(runs: Path, stage: str, *overrides: str):
    """Write a run folder as `train` leaves it, with random weights; returns the recipe."""
    recipe = load_recipe(RECIPES / f"smoke/{stage}.yaml", [f"train.runs={runs}", "sam3.checkpoint=tiny", *overrides])
    step = recipe.folder / "checkpoints/step-000001"
    step.mkdir(parents=True)
    torch.manual_seed(0)
    save_file({name: tensor.contiguous() for name, tensor in WEIGHTS[stage]().items()}, step / "student.safetensors")
    (step / "trainer.json").write_text(json.dumps({"step": 1, "best": {"step": 1, "val/cosine": 0.5}}))
    teacher = {"checkpoint": "tiny", "revision": None}
    (recipe.folder / "provenance.json").write_text(json.dumps({"features": {**FEATURES[stage], "teacher": teacher}}))
    (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe


def merged_run(runs: Path, *stages: str, overrides: tuple[str, ...] = ()):
    """Merge a run of one stage, or a release of several; returns the recipe of what was merged."""
    recipes = {stage: trained_run(runs, stage) for stage in stages}
    if len(stages) == 1:
        recipe = load_recipe(recipes[stages[0]].folder / "recipe.yaml", overrides)
    else:
        parts = [f"parts.{stage}={recipe.folder}" for stage, recipe in recipes.items()]
        base = (f"runs={runs}", "merge.formats=[transformers]", *parts)
        recipe = load_recipe(RECIPES / "smoke/release.yaml", [*base, *overrides])
    merge.run(recipe)
    return recipe
