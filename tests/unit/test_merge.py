# SPDX-License-Identifier: Apache-2.0
"""Merging: every tensor has one owner, or the merge names the tensor; students that do not fit are named."""

import json
import shutil

import pytest
import torch
from run_folders import RECIPES, image_run, memory_run, text_run
from safetensors.torch import load_file, save_file
from transformers import Sam3VideoModel

from effsam3 import merge
from effsam3.cli import main
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import EXTRAS_FILE, TRUNK, read_config, read_tensors
from effsam3.models.merging.combine import assign
from effsam3.models.merging.slots import SLOTS, MergeError, part_of_model
from effsam3.models.text.student import TEXT_ENCODER, TEXT_PROJECTION
from effsam3.recipe.reader import load_recipe
from effsam3.stages.image.merging import refuse_neck
from effsam3.training.checkpoint import WEIGHTS, CheckpointError

EXPECTED = {TRUNK + "head.weight": (2, 3), "detector_model.x": (4,), "tracker_neck.y": (5,)}
STUDENT = {TRUNK + "head.weight": (2, 3)}
CHASSIS = {TRUNK + "layers.0.weight": (9, 9), "detector_model.x": (4,), "tracker_neck.y": (5,)}
TEXT = {TEXT_ENCODER + "a": (1,), TEXT_PROJECTION + "b": (2,)}


# ---- owners


def test_every_tensor_gets_its_owner_and_the_teachers_trunk_is_dropped():
    owners = assign(EXPECTED, {"image": STUDENT}, {"chassis": CHASSIS})
    assert owners == {TRUNK + "head.weight": "image", "detector_model.x": "chassis", "tracker_neck.y": "chassis"}


def test_several_slots_and_several_givers_of_the_rest():
    old = {TEXT_ENCODER + "old": (3,), **CHASSIS}
    del old["tracker_neck.y"]
    owners = assign(
        {**EXPECTED, **TEXT}, {"image": STUDENT, "text": TEXT}, {"file": old, "chassis": {"tracker_neck.y": (5,)}}
    )
    assert owners == {
        TRUNK + "head.weight": "image",
        "detector_model.x": "file",
        "tracker_neck.y": "chassis",
        TEXT_ENCODER + "a": "text",
        TEXT_PROJECTION + "b": "text",
    }


@pytest.mark.parametrize(
    ("students", "rest", "message"),
    [
        ({"image": {}}, {"chassis": CHASSIS}, "head.weight has no owner"),
        ({"image": STUDENT}, {"chassis": {"detector_model.x": (4,)}}, "tracker_neck.y has no owner"),
        (
            {"image": {**STUDENT, "detector_model.x": (4,)}},
            {"chassis": CHASSIS},
            "detector_model.x has the owners image and chassis",
        ),
        (
            {"image": {TRUNK + "head.weight": (3, 2)}},
            {"chassis": CHASSIS},
            r"is \(3, 2\), the model needs \(2, 3\)",
        ),
        ({"image": {**STUDENT, TRUNK + "extra": (1,)}}, {"chassis": CHASSIS}, "extra of image lands nowhere"),
        ({"image": STUDENT}, {"chassis": {**CHASSIS, "unknown.z": (1,)}}, "unknown.z of chassis lands nowhere"),
        (
            {"image": STUDENT, "text": STUDENT},
            {"chassis": CHASSIS},
            "head.weight has the owners image and text",
        ),
        (
            {"image": STUDENT},
            {"file": CHASSIS, "chassis": CHASSIS},
            "detector_model.x has the owners file and chassis",
        ),
    ],
)
def test_what_is_not_owned_once_is_named(students, rest, message):
    with pytest.raises(MergeError, match=message):
        assign(EXPECTED, students, rest)


def test_slots_own_what_students_replace_and_nothing_twice():
    names = read_tensors(chassis_folder("tiny"))
    owners = {name: [slot for slot, row in SLOTS.items() if name.startswith(row.owns)] for name in names}
    # A vision student brings a trunk, too, and is never next to an image student.
    assert all(len(slots) <= 1 or slots == ["image", "vision"] for slots in owners.values())
    assert {slot for slots in owners.values() for slot in slots} >= {"image", "text"}


# ---- run folders that do not fit


def test_neck_features_are_refused_with_the_reason():
    refuse_neck({"tap": "trunk", "channels": 1024})
    with pytest.raises(MergeError, match="the tracker's; neck features cannot be turned back"):
        refuse_neck({"tap": "neck", "channels": 256})


def run_of(folder, *overrides):
    return load_recipe(folder / "recipe.yaml", overrides)


def change_weights(folder, change):
    file = folder / "checkpoints" / "best-step-000007" / WEIGHTS
    save_file(change(load_file(file)), file)


def test_a_student_of_another_size(tmp_path):
    folder = image_run(tmp_path)
    recipe = (folder / "recipe.yaml").read_text().replace("tiny_convnext", "efficientvit_b0")
    (folder / "recipe.yaml").write_text(recipe)
    with pytest.raises(MergeError, match=r"tensors are not those of efficientvit_b0 with head fused \(first: "):
        merge.run(run_of(folder))


def test_a_student_of_another_width(tmp_path):
    folder = image_run(tmp_path)
    change_weights(folder, lambda weights: weights | {"feature_mean": torch.zeros(1024)})
    with pytest.raises(MergeError, match="gives 1024 channels, the chassis' trunk 64"):
        merge.run(run_of(folder))


def test_a_checkpoint_of_another_stage(tmp_path):
    image, text = image_run(tmp_path), text_run(tmp_path)
    shutil.copy(
        text / "checkpoints/best-step-000007" / WEIGHTS, image / "checkpoints/best-step-000007" / WEIGHTS
    )  # fmt: skip
    with pytest.raises(MergeError, match="gives 128 channels"):
        merge.run(run_of(image))
    change_weights(image, lambda weights: {n: t for n, t in weights.items() if not n.startswith("feature_")})
    with pytest.raises(MergeError, match=r"not those of tiny_convnext .*or is this a checkpoint of something else"):
        merge.run(run_of(image))
    with pytest.raises(MergeError, match="is a run of stage text; the slot image needs one of stage image"):
        merge.run(load_recipe(RECIPES / "smoke/image.yaml", [f"train.runs={tmp_path}", "name=text"]))


def test_a_missing_checkpoint_and_a_missing_run(tmp_path):
    folder = image_run(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint 'step-000009'"):
        merge.run(run_of(folder, "merge.checkpoint=step-000009"))
    with pytest.raises(MergeError, match="there is no run and no model in .*nobody; train one with"):
        merge.run(run_of(folder, "name=nobody"))
    assert not (folder / "merged").exists() and not (tmp_path / "nobody").exists()


def test_half_precision_students_are_merged_as_float32(tmp_path):
    folder = image_run(tmp_path, student="efficientvit_b0", head="stride32")
    half = {}

    def to_half(weights):
        half.update({n: t.bfloat16() if t.is_floating_point() else t for n, t in weights.items()})
        return half

    change_weights(folder, to_half)
    merged = read_tensors(merge.run(run_of(folder)), TRUNK)
    for name, tensor in half.items():
        assert merged[name].dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype), name
        assert torch.equal(merged[name], tensor.to(merged[name].dtype)), name


# ---- what a merge writes


def test_image_then_text_on_top_of_it(tmp_path):
    """A merged model is a chassis: the second student joins the first, and effsam3.json names both."""
    image, text = image_run(tmp_path), text_run(tmp_path)
    first = merge.run(run_of(image))
    recipe = (text / "recipe.yaml").read_text().replace("checkpoint: tiny", f"checkpoint: {first}")
    (text / "recipe.yaml").write_text(recipe)
    second = merge.run(run_of(text))
    slots = json.loads((second / CARD).read_text())["slots"]
    assert {slot: card["student"] for slot, card in slots.items()} == {
        "image": "tiny_convnext",
        "text": "tiny_text_plain",
    }
    before, after = read_tensors(first), read_tensors(second)
    own = (TEXT_ENCODER, TEXT_PROJECTION)
    assert {name for name in before if not name.startswith(own)} == {n for n in after if not n.startswith(own)}
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith(own))
    model, info = Sam3VideoModel.from_pretrained(second, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(
    ("trains", "also"),
    [
        (("memory",), ()),
        (
            ("memory", "decoder", "prompts", "neck"),
            (
                "tracker_model.mask_decoder.",
                "tracker_model.prompt_encoder.",
                "tracker_model.mask_downsample.",
                "tracker_model.no_memory_embedding",
                "tracker_neck.",
            ),
        ),
    ],
)
def test_a_memory_goes_on_with_all_that_it_trained(tmp_path, trains, also):
    """The rest of the tracker that it trained goes along when it is taken out of the merged model again."""
    folder = memory_run(tmp_path, trains=trains)
    first = merge.run(run_of(folder))
    part = part_of_model("memory", folder)
    before, chassis = read_tensors(first), read_tensors(chassis_folder("tiny"))
    changed = {name for name in before if name not in chassis or not torch.equal(before[name], chassis[name])}
    assert part.also == also and changed <= part.tensors.keys()
    assert all(any(name.startswith(prefix) for name in changed) for prefix in also)
    card = json.loads((first / CARD).read_text())["slots"]["memory"]
    assert part.card() == card and card.get("also", []) == list(also)
    parts = f"parts={{image: null, text: null, memory: {first}}}"
    release = load_recipe(RECIPES / "smoke/release.yaml", [f"runs={tmp_path}", "merge.formats=[transformers]", parts])
    second = merge.run(release)
    after = read_tensors(second)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((second / CARD).read_text())["slots"]["memory"] == card


def test_what_transformers_cannot_hold_goes_along(tmp_path, capsys):
    chassis = tmp_path / "chassis"
    shutil.copytree(chassis_folder("tiny"), chassis)
    extra = {"detector.geometry_encoder.points_pool_project.bias": torch.arange(3.0)}
    save_file(extra, chassis / EXTRAS_FILE)
    folder = image_run(tmp_path)
    recipe = (folder / "recipe.yaml").read_text().replace("checkpoint: tiny", f"checkpoint: {chassis}")
    (folder / "recipe.yaml").write_text(recipe)
    merged = merge.run(run_of(folder))
    assert torch.equal(load_file(merged / EXTRAS_FILE)[next(iter(extra))], torch.arange(3.0))


def test_an_older_merge_stays_until_the_new_one_is_whole(tmp_path):
    folder = image_run(tmp_path, student="tiny_convnext")
    merged = merge.run(run_of(folder))
    written = (merged / CARD).stat().st_ino
    change_weights(folder, lambda weights: {n: t for n, t in weights.items() if n != "feature_mean"})
    with pytest.raises(MergeError, match="1 tensors are not those of"):
        merge.run(run_of(folder))
    assert (merged / CARD).stat().st_ino == written
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []


def test_read_config_of_the_result(tmp_path):
    config = read_config(merge.run(run_of(image_run(tmp_path))))
    trunks = config.detector_config.vision_config.backbone_config, config.tracker_config.vision_config.backbone_config
    assert [trunk.model_type for trunk in trunks] == ["effsam3_student_trunk"] * 2
    assert [trunk.head for trunk in trunks] == ["fused"] * 2


def test_format_is_short_for_the_recipes_key(tmp_path, capsys):
    folder = image_run(tmp_path)
    assert main(["merge", str(folder / "recipe.yaml"), "--format", "sam3,onnx"]) == 2
    assert "merge.formats: 'onnx' is not one of transformers, sam3, efficientsam3" in capsys.readouterr().err
    assert not (folder / "merged").exists()
