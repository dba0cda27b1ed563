# SPDX-License-Identifier: Apache-2.0
"""The formats of a merged model: what SAM 3's own file keeps, what EfficientSAM3's holds and what it cannot."""

import json

import pytest
import torch
from run_folders import image_run, text_run
from safetensors.torch import load_file

from effsam3 import merge
from effsam3.cli import main
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import EXTRAS_FILE, TRUNK, read_config, read_tensors
from effsam3.models.keymaps import KeyMapError
from effsam3.models.keymaps.sam3 import CLASS_ROW, POINTS, to_original
from effsam3.models.merging.formats import BUILDER_NAMES, save_pickled, verify
from effsam3.models.merging.slots import MergeError
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.recipe.reader import load_recipe

SAM3_TRUNK = "detector.backbone.vision_backbone.trunk."
LANGUAGE = "detector.backbone.language_backbone."


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A sam3.pt in SAM 3's own format, made of the tiny chassis with numbers in what transformers cannot hold."""
    folder = chassis_folder("tiny")
    config, tensors = read_config(folder), read_tensors(folder)
    trunk = config.detector_config.vision_config.backbone_config
    own = to_original(tensors, {}, trunk)
    torch.manual_seed(5)
    own |= {name: torch.randn_like(own[name]) for name in POINTS}
    own[SAM3_TRUNK + "pos_embed"] = own[SAM3_TRUNK + "pos_embed"].clone()
    own[SAM3_TRUNK + "pos_embed"][:, 0] = torch.randn(trunk.hidden_size)
    path = tmp_path_factory.mktemp("original") / "sam3.pt"
    torch.save({"model": own, "effsam3": json.dumps({"config": config.to_dict(), "slots": {}})}, path)
    return path


def on(folder, chassis, *overrides):
    """The recipe of a run, moved to another chassis."""
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("checkpoint: tiny", f"checkpoint: {chassis}"))
    return load_recipe(file, overrides)


def read(path):
    return torch.load(path, weights_only=True)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---- SAM 3's own format


def test_all_but_the_students_part_is_that_of_the_file_it_came_from(original, tmp_path, capsys):
    folder = image_run(tmp_path)
    merged = merge.run(on(folder, original, "merge.formats=[sam3]"))
    before, after = read(original)["model"], read(merged / "sam3.pt")["model"]
    kept = {name for name in before if not name.startswith(SAM3_TRUNK)}
    assert {name for name in after if not name.startswith(SAM3_TRUNK)} == kept
    assert all(same_bits(before[name], after[name]) for name in kept)
    student = load_file(folder / "checkpoints/best-step-000007/student.safetensors")
    found = {name for name in after if name.startswith(SAM3_TRUNK)}
    assert found == {f"{SAM3_TRUNK}model.{name}" for name in student}
    assert all(same_bits(tensor, after[f"{SAM3_TRUNK}model.{name}"]) for name, tensor in student.items())
    assert "zeros" not in capsys.readouterr().out


def test_a_text_student_leaves_the_trunk_as_it_was_with_its_rotary_tables(original, tmp_path):
    merged = merge.run(on(text_run(tmp_path), original, "merge.formats=[sam3]"))
    before, after = read(original)["model"], read(merged / "sam3.pt")["model"]
    kept = {name for name in before if not name.startswith(LANGUAGE)}
    assert sum("freqs_cis" in name for name in kept) == 4
    assert {name for name in after if not name.startswith(LANGUAGE)} == kept
    assert all(same_bits(before[name], after[name]) for name in kept)
    extra = load_file(merged / EXTRAS_FILE)
    assert extra.keys() == {CLASS_ROW, *POINTS}
    assert torch.equal(extra[CLASS_ROW], before[SAM3_TRUNK + "pos_embed"][:, :1])


def test_what_the_chassis_does_not_bring_is_said(tmp_path, capsys):
    merge.run(load_recipe(image_run(tmp_path) / "recipe.yaml", ["merge.formats=[sam3]"]))
    assert f"zeros in 6 tensors that transformers has no use for and the chassis no copy of (from {POINTS[0]} on)" in (
        capsys.readouterr().out
    )
    merge.run(load_recipe(text_run(tmp_path) / "recipe.yaml", ["merge.formats=[sam3]"]))
    assert f"zeros in 7 tensors that transformers has no use for and the chassis no copy of (from {CLASS_ROW} on)" in (
        capsys.readouterr().out
    )


def test_sam3_pt_as_a_chassis_is_the_same_model(tmp_path):
    merged = merge.run(load_recipe(image_run(tmp_path) / "recipe.yaml", ["merge.formats=[sam3]"]))
    back = chassis_folder(str(merged / "sam3.pt"))
    before, after = read_tensors(merged), read_tensors(back)
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    assert read_config(back).to_dict() == read_config(merged).to_dict()


def test_a_second_student_joins_the_one_that_sam3_pt_has(tmp_path):
    first = merge.run(load_recipe(image_run(tmp_path) / "recipe.yaml", ["merge.formats=[sam3]"]))
    second = merge.run(on(text_run(tmp_path), first / "sam3.pt"))
    slots = json.loads((second / CARD).read_text())["slots"]
    assert {slot: card["from"].split("/")[0] for slot, card in slots.items()} == {"image": "image", "text": "text"}
    before, after = read_tensors(first), read_tensors(second)
    assert all(same_bits(before[name], after[name]) for name in before if ".text_" not in name)


def test_a_file_has_its_own_tensors_bytes_and_no_others(tmp_path):
    """Slices and memory-mapped tensors are views of more, which torch would write along."""
    whole = torch.arange(10_000.0)
    tensors = {"slice": whole[10:20], "transposed": whole[:6].view(2, 3).T, "whole": torch.ones(3)}
    save_pickled(tmp_path / "x.pt", tensors, {"about": "text"})
    written = read(tmp_path / "x.pt")
    assert written["about"] == "text"
    assert all(torch.equal(written["model"][name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "x.pt").stat().st_size < 4000


def test_a_single_wrong_bit_is_noticed():
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    verify("x.pt", dict(tensors), tensors)
    for wrong in (
        {**tensors, "a": torch.nextafter(tensors["a"], torch.tensor(9.0))},
        {**tensors, "a": tensors["a"].double()},
        {**tensors, "c": tensors["a"]},
        {"a": tensors["a"]},
    ):
        with pytest.raises(MergeError, match=r"x.pt does not read back as written: 1 tensors differ|2 tensors differ"):
            verify("x.pt", wrong, tensors)


# ---- EfficientSAM3's format


def test_efficientsam3_holds_the_published_head_alone(tmp_path, capsys):
    folder = image_run(tmp_path, student="efficientvit_b0")
    with pytest.raises(KeyMapError, match="fused"):
        merge.run(load_recipe(folder / "recipe.yaml", ["merge.formats=[sam3,efficientsam3]"]))
    assert not (folder / "merged").exists() and not list(folder.glob("merged*"))
    assert main(["merge", str(folder / "recipe.yaml"), "--format", "efficientsam3"]) == 2
    assert "head=stride32" in capsys.readouterr().err


def test_efficientsam3_does_not_know_the_smoke_recipes_student(tmp_path):
    folder = image_run(tmp_path, student="tiny_convnext", head="stride32")
    with pytest.raises(KeyMapError, match="test_convnext|tiny_convnext"):
        merge.run(load_recipe(folder / "recipe.yaml", ["merge.formats=[efficientsam3]"]))


def test_efficientsam3_keeps_the_rest_of_sam3_as_it_was(original, tmp_path, capsys):
    folder = image_run(tmp_path, student="efficientvit_b0", head="stride32")
    merged = merge.run(on(folder, original, "merge.formats=[efficientsam3]"))
    before, file = read(original)["model"], read(merged / "efficientsam3.pt")
    assert file.keys() == {"model"}
    after = file["model"]
    kept = {name for name in before if not name.startswith(SAM3_TRUNK)}
    assert {name for name in after if not name.startswith(SAM3_TRUNK + "model.")} == kept
    assert all(same_bits(before[name], after[name]) for name in kept)
    student = {name.removeprefix(SAM3_TRUNK + "model.") for name in after if name not in kept}
    assert len(student) == 194 and {name.split(".")[0] for name in student} == {"backbone", "head"}
    assert TRUNK not in str(after.keys())
    printed = capsys.readouterr().out
    assert "backbone_type='efficientvit', model_name='b0')" in printed and "context_length" not in printed


def test_every_published_student_has_a_name_for_the_builder():
    assert BUILDER_NAMES.keys() == {name for name, row in IMAGE_STUDENTS.items() if row.published_millions}
    assert len(set(BUILDER_NAMES.values())) == len(BUILDER_NAMES)
