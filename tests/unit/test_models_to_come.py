# SPDX-License-Identifier: Apache-2.0
"""Recipes that start from a run which is not there yet: its sizes are those of the shipped recipe of its name."""

from __future__ import annotations

import pytest
import torch

from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.hardware.budget.dry_run import DryPlace
from effsam3.recipe.reader import load_recipe
from effsam3.stages.prompted.training import PromptedStage
from effsam3.stages.taught import config_to_come, trunk_config


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_to_come_has_the_student_and_the_chassis_of_its_recipe():
    config = config_to_come("runs/stage1-image-es_rv_m")
    for trunk in (trunk_config(config), config.tracker_config.vision_config.backbone_config):
        assert (trunk.model_type, trunk.timm_name) == ("effsam3_student_trunk", "repvit_m1_1")
        assert (trunk.hidden_size, trunk.image_size) == (1024, 1008)
    assert config.detector_config.detr_encoder_config.num_layers == 6
    for unknown in ("runs/nobodys", "runs/stage1-text-es_mc_s"):
        with pytest.raises(UserError, match=f"the sizes of '{unknown}' are not known"):
            config_to_come(unknown)


def test_what_is_there_counts_more_than_a_recipe(tmp_path):
    config = config_to_come("tiny")
    assert trunk_config(config).model_type == "sam3_vit_model"
    config.save_pretrained(tmp_path / "runs/stage1-image-es_rv_m/merged")
    assert trunk_config(config_to_come("runs/stage1-image-es_rv_m")).image_size == 224


SMALL = ["sam3.checkpoint=runs/smoke-image", "teacher.checkpoint=tiny", "hardware=gpu", "train.micro_batch_size=1"]


def test_a_budget_needs_no_model(capsys):
    """Small: tests/e2e/test_full_size_budget.py has SAM 3's own sizes."""
    asked = [*SMALL, "train.recompute=false", "data.phrases=1", "--device-gib", "24"]
    assert main(["show", "concepts/concepts_es_rv_m", *asked]) == 0
    printed = capsys.readouterr().out
    assert "# verdict   fits 24.0 GiB" in printed and "unknown yet: sam3.checkpoint" not in printed


def test_stage_prompted_is_built_without_a_model():
    with torch.device("meta"):
        stage = PromptedStage.from_shapes(load_recipe("concepts/prompted_es_rv_m", SMALL), DryPlace("fp32"))
    assert trunk_config(stage.student.model.config).timm_name == "test_convnext"
    assert trunk_config(stage.student.teacher.config).model_type == "sam3_vit_model"
