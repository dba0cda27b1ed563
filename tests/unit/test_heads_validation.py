"""Validation of stage image through SAM 3's heads."""

import json

import numpy as np
import pytest
import torch
from commands import SMOKE, metrics, run_here
from torch._subclasses.fake_tensor import FakeTensorMode

from effsam3.data.images.boxes import boxes_to_show, grid_of_boxes
from effsam3.data.images.index import build_index
from effsam3.data.images.sa1b import load_index
from effsam3.data.synthetic.images import make_synthetic_sa1b
from effsam3.errors import UserError
from effsam3.hardware.budget.estimates import measure
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads.detector import answer, ask, detector_levels
from effsam3.models.heads.known import only_heads
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.recipe.reader import load_recipe
from effsam3.training.checkpoint import chosen

PHRASES = ["red circle", "a dog on the grass", "sky"]


def load():
    folder = chassis_folder("tiny_concepts")
    return load_whole(model_class(read_config(folder).model_type), folder)


def test_heads_alone_answer_as_the_whole_model_does():
    model, tokenizer = load(), PromptTokenizer()
    pixels = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = ask([PHRASES[2], PHRASES[1]], torch.tensor([0, 1]), tokenizer)
    with torch.no_grad():
        feat = trunk_features(model, pixels)
        whole = answer(model, detector_levels(model, feat), asked)
        heads = only_heads(model, PHRASES, tokenizer)
        alone = answer(heads, detector_levels(heads, feat), asked)
        assert all(torch.equal(one, other) for one, other in zip(whole, alone, strict=True))
        unknown = ask(["cat"], torch.tensor([0]), tokenizer)
        with pytest.raises(LookupError, match="none of those"):
            answer(heads, detector_levels(heads, feat), unknown)
    assert not [name for name, _ in heads.named_parameters() if "backbone" in name or "text_encoder" in name]


def test_phrases_are_read_on_the_models_device():
    """Without a GPU: tensors that have a device and no contents, and refuse those of another device."""
    folder = chassis_folder("tiny_concepts")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = model_class(read_config(folder).model_type)(read_config(folder))
        heads = only_heads(model, PHRASES, PromptTokenizer())
    texts = heads.detector_model.text_encoder
    assert {texts.ids_PT.device.type, texts.states_PTC.device.type} == {"cuda"}


def test_boxes_are_those_of_the_largest_masks_or_of_a_grid(tmp_path):
    make_synthetic_sa1b(tmp_path / "images", 4, side_px=96)
    build_index([tmp_path / "images"], tmp_path / "index.parquet", 0.5, workers=1, progress=False)
    row = load_index(tmp_path / "index.parquet")[0]
    file = tmp_path / row["annotation_file"]
    content = json.loads(file.read_text())
    found = boxes_to_show(row, tmp_path, 2)
    boxes = sorted(content["annotations"], key=lambda one: one["area"])[::-1][: len(found)]
    sides = [row["width"], row["height"]] * 2
    expected = [np.divide([x, y, x + w, y + h], sides) for x, y, w, h in (one["bbox"] for one in boxes)]
    assert 1 <= len(found) <= 2 and np.allclose(found, expected, atol=1e-6)
    file.write_text("no JSON")
    assert np.array_equal(boxes_to_show(row, tmp_path, 2), grid_of_boxes(2))
    assert grid_of_boxes(3).tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1]]


def test_the_heads_judge_a_student_and_choose_its_best_weights(tmp_path):
    options = [
        "sam3.checkpoint=tiny_concepts", "teacher=online", "student=tiny_convnext", "data.synthetic_images=24",
        "data.synthetic_side_px=96", "train.steps=12", "train.eval_every=6", "train.save_every=6",
        "train.eval_samples=6", "train.monitor=val/heads", "validate.phrases=[red circle, green square, sky]",
    ]  # fmt: skip
    printed = run_here(tmp_path, "train", *options)
    found = metrics(tmp_path / "runs/smoke-image", "val/heads")
    parts = [f"val/heads_{part}" for part in ("masks", "presence", "queries")]
    for values in found.values():
        assert values["val/heads"] == pytest.approx(sum(values[part] for part in parts) / 3)
        assert all(0 < values[part] < 1 for part in parts)
    # Between random weights and the teacher's own trunk, which is 1.
    assert found[0]["val/heads"] + 0.02 < found[12]["val/heads"] < 1
    trainer = json.loads((chosen(tmp_path / "runs/smoke-image/checkpoints", "best") / "trainer.json").read_text())
    assert trainer["best"]["val/heads"] == max(values["val/heads"] for values in found.values())
    assert "judged" in printed and "of 3 phrases" in printed and "heads, masks" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.monitor=val/heads", "embed.tap=neck"], "train.monitor: val/heads needs the trunk's output"),
        (["train.monitor=val/head"], "did you mean val/heads"),
        (["validate.phrases=[]"], "validate.phrases"),
        (["validate.phrases=[a dog, ' ']"], "validate.phrases: one of them is empty"),
    ],
)
def test_recipes_that_cannot_be_judged(options, message):
    with pytest.raises(UserError, match=message):
        load_recipe(SMOKE, options)


def test_the_budget_counts_the_heads():
    plain, judged = (
        measure(load_recipe(SMOKE, ["sam3.checkpoint=tiny_concepts", f"train.monitor={name}"]))
        for name in ("val/cosine", "val/heads")
    )
    heads = only_heads(load(), load_recipe(SMOKE, []).validate.phrases, PromptTokenizer())
    own = {id(one): one.nbytes for one in (*heads.parameters(), *heads.buffers())}
    assert judged.frozen - plain.frozen == sum(own.values())
    assert (judged.trained, judged.micro_batch, judged.flops) == (plain.trained, plain.micro_batch, plain.flops)
