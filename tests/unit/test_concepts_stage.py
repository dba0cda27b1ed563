# SPDX-License-Identifier: Apache-2.0
"""Stage concepts without a loop: what learns and what stays, what a step costs, how sources of truth mix."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from concept_students import student_folder
from run_folders import RECIPES
from torch.nn.modules.batchnorm import _BatchNorm

from effsam3.errors import RecipeError, UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, fingerprint, read_config, read_tensors
from effsam3.models.merging.slots import MergeError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.concepts.facts import SOURCES
from effsam3.stages.concepts.merging import adapted_of_run
from effsam3.stages.concepts.training import DETECTOR, STAGE, untrained
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/concepts.yaml"
ALL = "loss={annotations: 1, teacher: 1, features: 1}"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    return [
        "data.synthetic_images=8", "data.synthetic_held_out=4", f"data.path={folder}/data",
        f"train.runs={folder}/runs",
        f"sam3.checkpoint={student_folder(folder / 'student')}", "model.trainable=[vision_encoder.backbone]", ALL,
    ]  # fmt: skip


def make(overrides, folder, *more):
    return STAGE.from_recipe(load_recipe(SMOKE, [*overrides, *more]), Report(folder), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def stage(overrides, tmp_path_factory):
    return make(overrides, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def batch(stage):
    """Two images of the first step, of four phrases each."""
    return next(iter(stage.train_batches(0, 1, 2)))


def part(batch, image, phrases=4):
    """The batch of one of its images alone."""
    rows = slice(phrases * image, phrases * (image + 1))
    alone = {name: batch[name][rows] for name in ("phrases", "counted", "boxes", "masks", "valid", "annotated")}
    alone |= {name: batch[name][image : image + 1] for name in ("positions", "pixels", "sizes")}
    return alone | {"image_R": torch.zeros(phrases, dtype=torch.int64), "unreadable": []}


# ---- what learns, and what stays as it is


def test_the_header_counts_what_learns(stage):
    line = stage.describe()["learns"]
    trunk = stage.student.model.detector_model.vision_encoder.backbone
    count = sum(parameter.numel() for parameter in trunk.parameters())
    assert stage.student_parameters == count and f"({count / stage.whole:.1%})" in line
    assert "vision_encoder.backbone 0.00 M" in line and stage.lr_scales["vision_encoder."] == 1


def test_all_and_parts_of_it(overrides, tmp_path):
    stage = make(overrides, tmp_path, "model.trainable=[all]", "optim.text_scale=0.5")
    assert "(100.0%)" in stage.describe()["learns"] and stage.student_parameters == stage.whole
    assert stage.lr_scales["text_encoder."] == 0.5
    names = {name for name, one in stage.student.named_parameters() if one.requires_grad}
    assert not [name for name in names if "boxes_" in name or "fpn_layers.3" in name]
    loss = stage.loss(stage.student.train(), next(iter(stage.train_batches(0, 1, 2))))["loss"]
    loss.backward()
    silent = [name for name, one in stage.student.named_parameters() if one.requires_grad and not one.grad.any()]
    assert not silent  # each of them learns from phrases


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_encodr", "nothing in the detector is called 'text_encodr'; did you mean text_encoder; its modules are"),
        ("fpn_layers.3", "the detector never uses 'fpn_layers.3', by phrases"),
    ],
)
def test_a_name_that_means_nothing(overrides, name, message):
    with pytest.raises(UserError, match=f"model.trainable: {message}"):
        untrained(load_recipe(SMOKE, [*overrides, f"model.trainable=[{name}]"]))


def test_what_is_frozen_stays_bit_for_bit_and_in_eval_mode(overrides, tmp_path, batch):
    stage = make(overrides, tmp_path)
    model, student = stage.student.model, stage.student.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(2):
        stage.loss(student, batch)["loss"].backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    learned = {f"{TRUNK}{name}" for name, _ in model.get_submodule(TRUNK[:-1]).named_parameters()}
    assert changed == learned  # not the statistics of BatchNorm, though it is in what learns
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    assert norms and not any(module.training for module in norms)
    assert model.get_submodule(TRUNK[:-1]).training
    heads = [module for name, module in model.named_modules() if not f"{name}.".startswith(TRUNK)]
    assert not any(module.training for module in heads[1:])


# ---- one pass of the trunk


def test_phrases_of_an_image_share_its_trunk_and_neck(stage, batch):
    seen = []
    hooks = [
        part.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[0])))
        for model in (stage.student.model, stage.teacher)
        for part in (model.detector_model.vision_encoder.backbone, model.detector_model.vision_encoder.neck)
    ]
    stage.loss(stage.student, batch)
    for hook in hooks:
        hook.remove()
    assert len(batch["phrases"]) == 8 and seen == [2, 2, 2, 2]


def test_recomputing_gives_the_same_gradients(overrides, tmp_path, batch):
    found = []
    for recompute in ("false", "true"):
        own = [f"train.recompute={recompute}", "sam3.checkpoint=tiny_concepts", "loss={teacher: 0, features: 0}"]
        stage = make(overrides, tmp_path, *own)
        stage.loss(stage.student.train(), batch)["loss"].backward()
        found.append({name: one.grad for name, one in stage.student.named_parameters()})
    assert len(stage.student.recomputed) == 4
    for name, gradient in found[0].items():
        assert gradient.any() and torch.allclose(gradient, found[1][name], atol=1e-4 * float(gradient.abs().max())), (
            name
        )


# ---- sources of truth


def test_sources_are_mixed_by_weight(stage, batch, overrides, tmp_path):
    with torch.no_grad():
        terms = stage.loss(stage.student.eval(), batch)
        weights = stage.recipe.loss
        for source, own in (("annotations", weights.annotated), ("teacher", weights.taught)):
            total = sum(weight * terms[f"{source}_{name}"] for name, weight in vars(own).items())
            assert total == pytest.approx(float(terms[source]), rel=1e-5)
        mixed = make(overrides, tmp_path, "loss={annotations: 0.5, teacher: 2, features: 3}")
        found = mixed.loss(mixed.student.eval(), batch)["loss"]
    wanted = sum(weight * terms[source] for source, weight in zip(SOURCES, (0.5, 2, 3), strict=True))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_dividing_a_batch_changes_nothing(stage, batch):
    with torch.no_grad():
        whole = stage.loss(stage.student.eval(), batch)
        parts = [stage.loss(stage.student, part(batch, image)) for image in (0, 1)]
    for name, value in whole.items():
        assert float(value) == pytest.approx(float(sum(one[name] for one in parts)) / 2, rel=1e-4, abs=1e-5), name


def test_who_is_their_own_teacher_has_nothing_to_learn(overrides, tmp_path, batch):
    own = next(one.split("=")[1] for one in overrides if one.startswith("sam3.checkpoint="))
    stage = make(overrides, tmp_path, f"teacher.checkpoint={own}", "loss={annotations: 0, teacher: 1, features: 1}")
    stage.student.recompute = True  # one phrase after the other, as the teacher: several at once round differently
    terms = stage.loss(stage.student.train(), batch)
    terms["loss"].backward()
    assert float(terms["features_mse"]) == 0 and float(terms["teacher_box"]) == 0
    assert all(float(one.grad.abs().max()) < 1e-4 for one in stage.student.parameters() if one.requires_grad)


def test_what_is_not_annotated_or_not_read_adds_nothing(stage, batch):
    silent = batch | {"annotated": torch.zeros_like(batch["annotated"])}
    unseen = batch | {"sizes": torch.zeros_like(batch["sizes"])}
    with torch.no_grad():
        own = stage.loss(stage.student.eval(), batch)
        without, nothing = stage.loss(stage.student, silent), stage.loss(stage.student, unseen)
    assert float(without["annotations"]) == 0 and without["teacher"] == own["teacher"] > 0
    assert all(float(nothing[name]) == 0 for name in ("loss", *SOURCES))


def test_features_need_a_trunk_that_knows_their_deviations(overrides, tmp_path):
    with pytest.raises(UserError, match=r"loss.features: .* tiny_concepts has SAM 3's own; set loss.features=0"):
        make(overrides, tmp_path, "sam3.checkpoint=tiny_concepts")
    with pytest.raises(RecipeError, match="annotations, teacher, features are all 0"):
        load_recipe(SMOKE, [*overrides, "loss={annotations: 0, teacher: 0, features: 0}"])


# ---- merging


def test_only_what_the_recipe_trains_is_merged(overrides, stage, tmp_path):
    recipe = load_recipe(SMOKE, overrides)
    folder = chassis_folder(recipe.sam3.checkpoint)
    about = {"name": "x", "origin": "x", "facts": {}}
    weights = {name: tensor.clone() for name, tensor in stage.student.state_dict().items()}
    found = adapted_of_run(recipe, stage.facts, weights, folder, about)
    own = read_tensors(folder)
    assert found.tensors.keys() == {name for name in own if name.startswith(TRUNK)}
    assert found.made_on == fingerprint({name: own[name] for name in found.tensors})
    weights.popitem()
    with pytest.raises(MergeError, match="are not those of vision_encoder.backbone in"):
        adapted_of_run(recipe, stage.facts, weights, folder, about)
    assert untrained(recipe, read_config(folder)).state_dict().keys() == {
        one.removeprefix(DETECTOR) for one in found.tensors
    }
