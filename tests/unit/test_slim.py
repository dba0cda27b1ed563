# SPDX-License-Identifier: Apache-2.0
"""A SAM 3 with every second layer of its fusion encoder: which layers stay, what it answers, where it is refused."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from run_folders import RECIPES
from transformers import Sam3VideoModel

from effsam3.benchmarks.flops import config_of, part_gflop
from effsam3.errors import RecipeError, UserError
from effsam3.models.chassis import slim
from effsam3.models.chassis.classes import empty_model
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.heads.detector import answer, ask, detector_levels
from effsam3.models.merging.adapt import Adapted
from effsam3.models.merging.combine import combine, slot_table
from effsam3.models.merging.formats import write_model
from effsam3.models.merging.slots import MergeError, owners_card
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.recipe.reader import load_recipe
from effsam3.stages.concepts.training import STAGE, untrained
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/concepts.yaml"


@pytest.fixture(scope="module")
def six():
    """The config and the tensors of a small SAM 3 with six layers, as SAM 3 has."""
    config = read_config(chassis_folder("tiny_concepts"))
    config.detector_config.detr_encoder_config.num_layers = 6
    torch.manual_seed(0)
    return config, Sam3VideoModel(config).state_dict()


@torch.no_grad()
def answers(model):
    feat = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    asked = ask(["a dog", "red circle"], torch.zeros(2).long(), PromptTokenizer())
    return answer(model.eval(), detector_levels(model, feat), asked)


@pytest.mark.parametrize(
    ("layers", "kept"), [(3, [0, 2, 4]), (2, [0, 3]), (4, [0, 1, 3, 4]), (1, [0]), (6, [*range(6)])]
)
def test_every_second_layer_stays(six, layers, kept):
    config, own = six
    fewer, left = slim.slim_config(config, layers), slim.slim_tensors(config, own, layers)
    assert slim.encoder_layers(fewer) == layers and slim.encoder_layers(config) == 6
    assert {name: tensor.shape for name, tensor in left.items()} == {
        name: tensor.shape for name, tensor in empty_model(fewer).state_dict().items()
    }
    for name, tensor in left.items():
        before = name
        if name.startswith("detector_model.detr_encoder.layers."):
            place = int(name.split(".")[3])
            before = name.replace(f"layers.{place}.", f"layers.{kept[place]}.", 1)
        assert tensor is own[before], name


def test_what_is_taken_out_in_place_answers_as_what_is_written(six):
    config, own = six
    whole, built = Sam3VideoModel(config), Sam3VideoModel(slim.slim_config(config, 3))
    whole.load_state_dict(own)
    built.load_state_dict(slim.slim_tensors(config, own, 3))
    before = answers(whole)
    found, same = answers(slim.slim_model(whole, 3)), answers(built)
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))
    assert not torch.allclose(found.pixels_RCMM, before.pixels_RCMM)


def test_more_layers_than_there_are(six):
    with pytest.raises(UserError, match="model.encoder_layers: 7, but the fusion encoder of sam3.checkpoint has 6"):
        slim.slim_config(six[0], 7)
    assert slim.slim_config(six[0], None) is six[0]


def test_a_phrase_costs_less_by_what_the_layers_take():
    recipe = load_recipe(RECIPES / "concepts/slim_sam3.yaml", ["sam3.checkpoint=random"])
    assert slim.encoder_layers(config_of(recipe)) == recipe.encoder_layers == 3
    small = partial(load_recipe, SMOKE)
    fewer, all_ = (part_gflop(config_of(small(own))) for own in (["model.encoder_layers=1"], []))
    S, C, P = 64, 64, 34  # positions, channels, tokens of a phrase, an example box and the image
    layer = 2 * (S * (4 * C**2 + 2 * S * C) + S * (2 * C**2 + 2 * P * C) + P * 2 * C**2 + S * 8 * C**2)
    assert all_.pop("detector") - fewer.pop("detector") == pytest.approx(layer / 1e9, rel=1e-6) and fewer == all_


def test_learned_merged_and_loaded_by_transformers_alone(tmp_path):
    own = [
        "data.synthetic_images=8",
        "data.synthetic_held_out=4",
        f"data.path={tmp_path}/data",
        "model.encoder_layers=1",
    ]
    recipe = load_recipe(SMOKE, own)
    stage = STAGE.from_recipe(recipe, Report(tmp_path), Accelerator(cpu=True))
    student = stage.student.train()
    assert student.state_dict().keys() == untrained(recipe).state_dict().keys()
    stage.loss(student, next(iter(stage.train_batches(0, 1, 2))))["loss"].backward()
    torch.optim.SGD(student.parameters(), lr=1e-4).step()
    weights = {f"detector_model.{name}": tensor.detach().clone() for name, tensor in student.state_dict().items()}

    chassis = chassis_folder("tiny_concepts")
    config, tensors = read_config(chassis), read_tensors(chassis)
    made_on = stage.facts["teacher"]["fingerprint"]
    changed = Adapted(name="slim", origin="slim/1", tensors=weights, made_on=made_on, encoder_layers=1)
    merged = combine(config, {"chassis": tensors}, [], [changed])
    gone = [tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{slim.ENCODER}1.")]
    row = rf"\| dropped +\| layers of the detector's fusion encoder +\| +{len(gone)} \| +-{sum(gone) / 1e6:.2f} M"
    assert re.search(row, slot_table(merged, {}))
    card = owners_card(chassis, [], [changed.card()]) | {"chassis": "tiny_concepts", "revision": None}
    write_model(merged, tmp_path / "merged", card, chassis, {})
    loaded, info = Sam3VideoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.detector_config.detr_encoder_config.num_layers == 1
    for found, wanted in zip(answers(loaded), answers(student.model.eval()), strict=True):
        torch.testing.assert_close(found, wanted)
    # The card says so, also of what is merged into this model later; other formats are refused.
    assert owners_card(tmp_path / "merged", [])["encoder_layers"] == 1
    for name in ("sam3", "efficientsam3"):
        with pytest.raises(MergeError, match=rf"who reads {name}.pt builds all layers of SAM 3's fusion encoder"):
            write_model(merged, tmp_path / "other", card, chassis, {}, ("transformers", name))
        with pytest.raises(RecipeError, match=rf"merge.formats: {name} has all layers"):
            load_recipe(SMOKE, [*own, f"merge.formats=[transformers, {name}]"])
    assert not (tmp_path / "other").exists()


def test_changed_tensors_of_different_encoders_do_not_go_together(tmp_path):
    chassis = chassis_folder("tiny_concepts")
    parts = [
        Adapted(name=name, origin=name, tensors={}, made_on="", encoder_layers=layers)
        for name, layers in (("one", 1), ("two", 2))
    ]
    with pytest.raises(MergeError, match="one for 1, two for 2"):
        combine(read_config(chassis), {"chassis": read_tensors(chassis)}, [], parts)
