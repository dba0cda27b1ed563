# SPDX-License-Identifier: Apache-2.0
"""Adapters on the detector in stage concepts: what they reach, what stays, and what a merge makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from concept_students import student_folder
from run_folders import RECIPES

from effsam3.errors import RecipeError, UserError
from effsam3.extras import refuse_missing_extras
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, fingerprint, read_tensors
from effsam3.models.heads.detector import answer, detector_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.lora.adapter import PREFIX
from effsam3.models.merging.adapt import adapt
from effsam3.models.merging.slots import MergeError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.concepts.merging import adapted_of_run
from effsam3.stages.concepts.training import STAGE, untrained
from effsam3.stages.taught import load_sam3
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/concepts.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    return load_recipe(SMOKE, [
        "data.synthetic_images=8", "data.synthetic_held_out=4", f"data.path={folder}/data",
        f"train.runs={folder}/runs", f"sam3.checkpoint={student_folder(folder / 'student')}",
        "model.trainable=[vision_encoder.backbone]",
        "adapters={parts: [text, detr, detector_mask_decoder], rank: 4, alpha: 8, dropout: 0.1}",
    ])  # fmt: skip


def make(recipe, folder):
    return STAGE.from_recipe(recipe, Report(folder), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def learned(recipe, tmp_path_factory):
    """A stage after two steps, its first batch, and the whole model's tensors before them."""
    stage = make(recipe, tmp_path_factory.mktemp("stage"))
    batch = next(iter(stage.train_batches(0, 1, 2)))
    before = {name: tensor.clone() for name, tensor in stage.student.model.state_dict().items()}
    student = stage.student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        stage.loss(student, batch)["loss"].backward()
        optimizer.step()
    return stage, batch, before


def test_adapters_and_the_trunk_learn_and_nothing_else(learned):
    stage, _, before = learned
    model, student = stage.student.model, stage.student
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    low_rank = {name for name in before if ".lora_" in name}
    assert changed == low_rank | {f"{TRUNK}{name}" for name, _ in model.get_submodule(TRUNK[:-1]).named_parameters()}
    assert {name.split(".")[1] for name in low_rank} == {
        "text_encoder", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder",
    }  # fmt: skip
    # Phrases reach each of them: those that begin with zeros have moved.
    assert all(tensor.any() for name, tensor in student.state_dict().items() if ".lora_B." in name)
    assert stage.student_parameters == sum(tensor.numel() for tensor in student.parameters())
    assert f"LoRA r 4 on {len(student.modules_adapted)} layers of text, detr" in stage.describe()["learns"]


def test_only_the_adapters_drop_out(learned):
    stage, _, _ = learned
    student = stage.student.train()
    training = {name for name, module in student.model.named_modules() if module.training}
    heads = {name for name in training if not f"{name}.".startswith(TRUNK)}
    assert heads and all(".lora_dropout." in name for name in heads)
    student.eval()
    assert not any(module.training for name, module in student.model.named_modules() if ".lora_dropout." in name)


def test_what_is_merged_answers_as_what_was_adapted(recipe, learned):
    stage, batch, _ = learned
    folder = chassis_folder(recipe.sam3.checkpoint)
    weights = {name: tensor.detach().clone() for name, tensor in stage.student.state_dict().items()}
    found = adapted_of_run(recipe, stage.facts, weights, folder, {"name": "x", "origin": "x", "facts": {}})
    own = read_tensors(folder)
    assert found.made_on == fingerprint({name: own[name] for name in found.tensors})
    assert 0 < found.facts["bf16_keeps"] <= 1 and "bfloat16" in found.notes[0]
    tensors, _ = adapt(own, dict.fromkeys(own, "sam3"), [found])
    merged, plain = load_sam3(folder), load_sam3(folder)
    merged.load_state_dict(tensors)
    inputs = stage.inputs(batch)
    outputs = []
    with torch.no_grad():
        for model in (stage.student.eval().model, merged, plain):
            levels = detector_levels(model, trunk_features(model, inputs.pixels_B3SS))
            outputs.append(answer(model, levels, inputs.asked))
    for adapted, same, start in zip(*outputs, strict=True):
        assert torch.allclose(adapted, same, rtol=1e-4, atol=1e-4 * float(adapted.abs().max()))
        assert not torch.allclose(adapted, start, rtol=1e-2, atol=1e-2 * float(adapted.abs().max()))
    weights.pop(next(name for name in weights if name.startswith(PREFIX)))
    with pytest.raises(MergeError, match="its tensors are not those of"):
        adapted_of_run(recipe, stage.facts, weights, folder, {"name": "x", "origin": "x", "facts": {}})


def test_an_average_has_adapters_and_statistics_of_its_own(learned):
    stage, batch, _ = learned
    average, student = copy.deepcopy(stage.student), stage.student
    names = dict(student.named_parameters()) | dict(student.named_buffers())
    copies = dict(average.named_parameters()) | dict(average.named_buffers())
    assert names.keys() == copies.keys() and any("running_mean" in name for name in names)
    assert not [name for name in names if names[name].data_ptr() == copies[name].data_ptr()]
    # The copy is what its own model runs; the frozen heads are shared.
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
        other, own = (float(stage.loss(one.eval(), batch)["loss"]) for one in (average, student))
    assert other != own
    heads = [name for name, _ in student.model.named_parameters() if "dot_product_scoring" in name]
    assert all(student.model.get_parameter(name) is average.model.get_parameter(name) for name in heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["adapters.parts=[trunk]"], r"adapters.parts: \d+ layers, such as .* are trained themselves"),
        (["adapters.parts=[]", "model.trainable=[]"], "model.trainable: nothing would learn"),
        (["adapters.parts=[tracker_mask_decoder]"], "adapters.parts"),
    ],
)
def test_what_cannot_be_adapted(options, message):
    with pytest.raises((UserError, RecipeError), match=message):
        untrained(load_recipe(SMOKE, ["sam3.checkpoint=tiny_concepts", "model.trainable=[all]", *options]))


def test_peft_is_asked_for_only_where_there_are_adapters(recipe, monkeypatch):
    monkeypatch.setattr("effsam3.extras.find_spec", lambda name: None)
    refuse_missing_extras(load_recipe(SMOKE, []), ["train"])
    with pytest.raises(UserError, match=r"stage: concepts needs peft.*effsam3\[lora\]"):
        refuse_missing_extras(recipe, ["train"])
