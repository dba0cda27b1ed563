# SPDX-License-Identifier: Apache-2.0
"""Stage concepts on images that nobody has annotated: listed phrases, the teacher's answers, its stored features."""

import json

import pytest
import torch
from accelerate import Accelerator
from concept_students import student_folder
from run_folders import RECIPES

from effsam3 import embed
from effsam3.benchmarks.concepts.answered import mask_ious
from effsam3.data.synthetic.concepts import PHRASES, make_synthetic_concepts
from effsam3.errors import RecipeError, UserError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.concepts.phrases import phrases_of
from effsam3.stages.concepts.training import STAGE
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/concepts.yaml"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with an index of drawn images, a list of phrases and the features of tiny_concepts' trunk."""
    folder = tmp_path_factory.mktemp("images")
    make_synthetic_concepts(folder, 12, 1)
    stage1 = [
        "sam3.checkpoint=tiny_concepts", "data.source=folder", f"data.folder={folder}/train", "data.held_out=0.4",
        f"data.index={folder}/index.parquet", "data.synthetic_images=0", "head=linear", f"embed.to={folder}/store",
        "student=tiny_separable_w4", f"train.runs={folder}/runs",
    ]  # fmt: skip
    embed.run(load_recipe(RECIPES / "smoke/image.yaml", stage1))
    (folder / "phrases.txt").write_text("\n".join(PHRASES) + "\n\n" + "no " * 40 + "\n")
    student_folder(folder / "student")
    return folder


def overrides(folder, *more):
    return [
        "data.source=images", f"data.path={folder}/index.parquet", f"data.listed={folder}/phrases.txt",
        "data.synthetic_images=0", f"train.runs={folder}/runs", f"sam3.checkpoint={folder}/student",
        "model.trainable=[vision_encoder.backbone]", "loss={teacher: 1, annotations: 0}", *more,
    ]  # fmt: skip


def make(folder, *more):
    recipe = load_recipe(SMOKE, overrides(folder, *more))
    return STAGE.from_recipe(recipe, Report(folder / "runs" / "report"), Accelerator(cpu=True))


def test_stored_features_teach_what_the_trunk_would(images):
    online, stored = make(images), make(images, f"teacher.store={images}/store")
    both = [next(iter(stage.train_batches(0, 1, 2))) for stage in (online, stored)]
    assert both[0]["phrases"] == both[1]["phrases"] and set(both[0]["phrases"]) <= set(PHRASES)
    losses = [stage.loss(stage.student, batch) for stage, batch in zip((online, stored), both, strict=True)]
    assert losses[0]["loss"] > 0 and losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=0.02, atol=1e-3)
    # Its trunk is not even loaded.
    parameters = [sum(one.numel() for one in stage.teacher.parameters()) for stage in (online, stored)]
    assert parameters[0] - parameters[1] > 100_000


def test_what_the_teacher_answers_is_the_truth_of_validation(images):
    own = make(images, "sam3.checkpoint=tiny_concepts")  # the student is the teacher
    small = make(images)
    for stage in (own, small):
        # Presence of random weights is sure of nothing: say yes to all, so that something is found.
        for model in (stage.student.model, stage.teacher):
            torch.nn.init.constant_(model.detector_model.detr_decoder.presence_head.layer3.bias, 8.0)
    results = []
    for stage in (own, small):
        batch = stage.val_data.__getitems__([0, 1])
        found = stage.summarise(stage.validate(stage.student, batch))
        results.append(found)
    assert results[0]["val/presence"] == 1.0 and results[0]["val/loss"] < results[1]["val/loss"]


def test_a_phrase_that_is_too_long_is_named_and_left_out(images):
    (note,) = make(images).train_data.notes
    assert note.reason == "bad_phrase" and "line 14" in note.where


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.listed=null"], "data.listed: images have no phrases of their own"),
        (["loss={teacher: 1, annotations: 1}"], "loss.annotations: 1, but images have none"),
        (["data.val_path=other"], "data.source: images has an index with both images and held-out ones"),
        (["data.source=concepts", "teacher.store=store"], "teacher.store: stage 1 stores features of an index"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_meant(images, more, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(SMOKE, overrides(images, *more))


def test_a_store_of_another_teacher_is_refused(images):
    with pytest.raises(UserError, match=r"teacher\.checkpoint=tiny; change teacher"):
        make(images, f"teacher.store={images}/store", "teacher.checkpoint=tiny")


def test_pixels_are_counted_exactly_whatever_the_precision():
    mask_1MM = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask_1MM[0, :, :5] = True  # 320 pixels
    other_1MM = mask_1MM.clone()
    other_1MM[0, 0, 0] = False  # 319: bfloat16 knows 318 and 320
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(mask_ious(mask_1MM, other_1MM)) == pytest.approx(319 / 320, abs=1e-6)


def test_images_that_are_held_out_are_not_learned_from(tmp_path):
    make_synthetic_concepts(tmp_path, 6, 2)
    drawn = [
        "data.source=concepts", f"data.path={tmp_path}/train.json", f"data.val_path={tmp_path}/few.json",
        "data.synthetic_images=0",
    ]  # fmt: skip
    both = json.loads((tmp_path / "train.json").read_text())
    names = {pair["file_name"] for pair in both["images"][:3]}
    few = [pair for pair in both["images"] if pair["file_name"] in names]
    (tmp_path / "few.json").write_text(json.dumps(both | {"images": few}))
    train, val = phrases_of(load_recipe(SMOKE, drawn), 160, 32)
    assert set(val.keys) == names and not names & set(train.keys) and len(train.keys) == 6 - len(names)
    assert {note.where for note in train.notes if note.reason == "held_out"} == names
    with pytest.raises(UserError, match=r"data\.val_path: all 6 images of .*train\.json are held out"):
        phrases_of(load_recipe(SMOKE, [*drawn, f"data.val_path={tmp_path}/train.json"]), 160, 32)
