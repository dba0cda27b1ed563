# SPDX-License-Identifier: Apache-2.0
"""Tensors changed in place: owned once, made for what they change, recorded through merges and formats."""

import json

import pytest
import torch
from run_folders import RECIPES, image_run
from safetensors.torch import load_file, save_file

from effsam3 import merge
from effsam3.cli import main
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import NECK, TRUNK, fingerprint, read_config, read_tensors
from effsam3.models.merging import slots
from effsam3.models.merging.adapt import FILE, Adapted
from effsam3.models.merging.combine import combine
from effsam3.models.merging.slots import SLOTS, MergeError, Part, owners_card, part_of_model
from effsam3.publish.card import model_card
from effsam3.publish.release import read_release
from effsam3.recipe.reader import load_recipe
from effsam3.training.checkpoint import WEIGHTS

HEAD = "detector_model.dot_product_scoring.query_proj.weight"
DECODER = "detector_model.detr_decoder.layers.0.self_attn.q_proj.weight"


def adapted_folder(path, base, names):
    """Changed tensors as docs/formats.md describes them."""
    before = {name: base[name] for name in names}
    path.mkdir(parents=True)
    changed = {name: tensor + 0.5 for name, tensor in before.items()}
    save_file(changed, path / FILE, {"effsam3": json.dumps({"made_on": fingerprint(before)})})
    return path


def release(runs, *overrides, name="adapted"):
    own = [f"runs={runs}", f"name={name}", "merge.formats=[transformers]", "parts.image=null", "parts.text=null"]
    return load_recipe(RECIPES / "smoke/release.yaml", [*own, *overrides])


@pytest.fixture(scope="module")
def chassis():
    return read_tensors(chassis_folder("tiny"))


def same_but(found, wanted, names):
    assert found.keys() == wanted.keys()
    assert {name for name in found if not torch.equal(found[name], wanted[name])} == set(names)


def test_changed_tensors_and_no_others(tmp_path, chassis, capsys):
    trunk = TRUNK + "layers.0.attention.q_proj.weight"
    one = adapted_folder(tmp_path / "lora", chassis, [trunk])
    two = adapted_folder(tmp_path / "head", chassis, [HEAD, DECODER])
    merged = merge.run(release(tmp_path, f"parts.adapted=[{one},{two}]"))
    after = read_tensors(merged)
    same_but(after, chassis, [trunk, HEAD, DECODER])
    for name in (trunk, HEAD, DECODER):
        torch.testing.assert_close(after[name], chassis[name] + 0.5, rtol=0, atol=1e-6)
    card = json.loads((merged / CARD).read_text())
    made_on = fingerprint({trunk: chassis[trunk]})
    assert card["slots"] == {}
    assert card["adapted"][0] == {"name": "lora", "from": str(one), "made_on": made_on, "tensors": [trunk]}
    assert card["adapted"][1]["tensors"] == [HEAD, DECODER][::-1]
    table = capsys.readouterr().out
    assert f"changed in place, {one}" in table
    assert main(["inspect", str(merged)]) == 0
    assert "adapted head" in capsys.readouterr().out
    text = model_card(read_release(merged.parent), "me/mine")
    assert "in which some tensors have been adapted." in text
    assert "adapted, `head`: 2 tensors" in text and f"`{two}`" in text
    assert main(["show", str(merged.parent / "recipe.yaml")]) == 0
    assert f"# adapted   {one}, {two}" in capsys.readouterr().out
    assert main(["evaluate", str(merged.parent / "recipe.yaml")]) == 0
    assert f"parts.adapted: {one} has no recipe.yaml with data to measure" in capsys.readouterr().out


def test_it_survives_the_next_merge_and_sam3_pt(tmp_path, chassis):
    """An image student on top replaces what was adapted in the trunk, and keeps the adapted head."""
    trunk = TRUNK + "layers.0.attention.q_proj.weight"
    folder = adapted_folder(tmp_path / "tuned", chassis, [HEAD])
    formats = "merge.formats=[transformers,sam3]"
    first = merge.run(release(tmp_path, f"parts.adapted=[{folder}]", formats))
    again = chassis_folder(str(first / "sam3.pt"))
    same_but(read_tensors(again), read_tensors(first), [])
    entry = json.loads((first / CARD).read_text())["adapted"]
    assert json.loads((again / CARD).read_text())["adapted"] == entry
    run = image_run(tmp_path)
    second = merge.run(release(tmp_path, f"parts.image={run}", f"sam3.checkpoint={again}", name="second"))
    card = json.loads((second / CARD).read_text())
    assert card["adapted"] == entry and card["slots"].keys() == {"image"}
    assert torch.equal(read_tensors(second)[HEAD], read_tensors(first)[HEAD])

    both = adapted_folder(tmp_path / "both", chassis, [trunk, HEAD])
    third = merge.run(release(tmp_path, f"parts.adapted=[{both}]", name="third"))
    part = Part(slot="image", student="x", config=None, tensors={}, origin="y")
    assert owners_card(third, [part])["adapted"][0]["tensors"] == [HEAD]


def test_an_adapter_of_a_student(tmp_path):
    """Made on the student of one run; not taken on the same student of another, nor after it was merged into one."""
    run, other = image_run(tmp_path), image_run(tmp_path, name="other", head="fused")
    file = other / "checkpoints" / "best-step-000007" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    student = read_tensors(merge.run(load_recipe(run / "recipe.yaml")))
    name = next(name for name in student if name.startswith(TRUNK + "head.") and name.endswith("weight"))
    folder = adapted_folder(tmp_path / "lora", student, [name])
    adapted = f"parts.adapted=[{folder}]"
    merged = merge.run(release(tmp_path, f"parts.image={run}", adapted))
    same_but(read_tensors(merged), student, [name])
    with pytest.raises(MergeError, match=r"lora .* was made on other tensors .* than those of image that it"):
        merge.run(release(tmp_path, f"parts.image={other}", adapted, name="wrong"))
    with pytest.raises(MergeError, match=f"1 tensors of lora .* the model has no {name}"):
        merge.run(release(tmp_path, adapted, name="wrong"))
    part = part_of_model("image", merged)
    assert [one["tensors"] for one in part.adapted] == [[name]]
    moved = merge.run(release(tmp_path, f"parts.image={merged}", name="moved"))
    assert json.loads((moved / CARD).read_text())["adapted"] == json.loads((merged / CARD).read_text())["adapted"]
    same_but(read_tensors(moved), read_tensors(merged), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {DECODER: t[DECODER], "nowhere.weight": t[HEAD]}, "the model has no nowhere.weight"),
        (lambda t: {DECODER: t[DECODER][:3]}, rf"{DECODER} is \(3, 128\), the model's \(128, 128\)"),
        (lambda t: {DECODER: t[DECODER].half()}, f"{DECODER} is torch.float16, the model's torch.float32"),
        (lambda t: {HEAD: t[HEAD]}, f"{HEAD} is changed by first, too"),
    ],
)
def test_what_does_not_fit_is_named(chassis, change, message):
    first = Adapted(
        name="first", origin="a", tensors={HEAD: chassis[HEAD] + 1}, made_on=fingerprint({HEAD: chassis[HEAD]})
    )
    second = Adapted(name="second", origin="b", tensors=change(chassis), made_on="")
    with pytest.raises(MergeError, match=rf"1 tensors of second \(b\) cannot be merged: {message}"):
        combine(read_config(chassis_folder("tiny")), {"chassis": chassis}, [], [first, second])


def test_files_that_are_not_there_or_say_too_little(tmp_path, chassis):
    with pytest.raises(MergeError, match=r"parts.adapted: .*nowhere holds no adapted.safetensors; .*docs/formats.md"):
        merge.run(release(tmp_path, f"parts.adapted=[{tmp_path}/nowhere]"))
    (tmp_path / "silent").mkdir()
    save_file({HEAD: chassis[HEAD].clone()}, tmp_path / "silent" / FILE)
    with pytest.raises(MergeError, match="parts.adapted: the metadata of .*made_on is missing"):
        merge.run(release(tmp_path, f"parts.adapted=[{tmp_path}/silent]"))
    named = adapted_folder(tmp_path / "chassis", chassis, [HEAD])
    with pytest.raises(MergeError, match="two owners of tensors are called 'chassis'; rename"):
        merge.run(release(tmp_path, f"parts.adapted=[{named}]"))
    assert not (tmp_path / "adapted" / "merged").exists()


def test_a_slot_of_several_modules_is_a_row(monkeypatch, chassis, tmp_path):
    """The trunk with both necks, as one slot: merged, recorded, and refused beside what it overlaps."""
    image, necks = SLOTS["image"], (NECK, "tracker_neck.")
    vision = slots.Slot(
        owns=(TRUNK, *necks), module="", config_of=image.config_of, install=image.install, alike=image.alike
    )
    monkeypatch.setitem(SLOTS, "vision", vision)
    config = read_config(chassis_folder("tiny"))
    own = {name: tensor + 1 for name, tensor in chassis.items() if name.startswith(vision.owns)}
    part = Part(slot="vision", student="wide", config=image.config_of(config), tensors=own, origin="a run")
    merged = combine(config, {"chassis": chassis}, [part])
    same_but(merged.tensors, chassis, own)
    assert {name for name, owner in merged.owners.items() if owner == "vision"} == own.keys()
    trunk = {name: tensor for name, tensor in chassis.items() if name.startswith(TRUNK)}
    smaller = Part(slot="image", student="small", config=part.config, tensors=trunk, origin="b")
    with pytest.raises(MergeError, match=f"both wide in the slot vision .* bring {TRUNK}; leave one out"):
        combine(config, {"chassis": chassis}, [part, smaller])
    (tmp_path / CARD).write_text(json.dumps(owners_card(None, [part])))
    with pytest.raises(MergeError, match=f"has wide in the slot vision, of which {TRUNK} would be replaced"):
        owners_card(tmp_path, [smaller])
    (tmp_path / CARD).write_text(json.dumps(owners_card(None, [smaller])))
    assert owners_card(tmp_path, [part])["slots"].keys() == {"vision"}


def test_the_document_makes_such_a_folder(tmp_path, chassis, monkeypatch):
    text = (RECIPES.parent / "docs" / "formats.md").read_text()
    section = text.split("## Adapted tensors")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/stage1-image-es_rv_m/merged", str(chassis_folder("tiny"))), {})
    merged = merge.run(release(tmp_path, "parts.adapted=[tuned]"))
    same_but(read_tensors(merged), chassis, [HEAD])
