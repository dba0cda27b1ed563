"""Stage adapt: every verb, the same learning on any hardware, adapters alone and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, metrics, run, run_here
from peft import PeftModel
from run_folders import image_run, memory_run, text_run
from safetensors.torch import load_file
from transformers import Sam3VideoModel

from effsam3 import merge
from effsam3.errors import ChassisError, UserError
from effsam3.hardware.budget.dry_run import cost, dry_stage
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, read_tensors
from effsam3.models.merging.slots import MergeError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.adapt.images import own_images
from effsam3.stages.adapt.training import AdaptStage

LORA = REPOSITORY / "recipes/smoke/lora.yaml"
EVERY = (
    "adapters.parts=[trunk, text, detr, detector_mask_decoder, tracker_mask_decoder]", "adapters.dropout=0",
    "adapters.rank=4", "prompts.box=0.25", "prompts.point=0.25", "prompts.text=0.5", "prompts.exemplar=0.3",
    "data.view=view",
)  # fmt: skip
SHORT = (
    "data.synthetic_images=12", "data.objects=2", "train.steps=3", "train.log_every=1", "train.eval_every=3",
    "train.save_every=3", "train.eval_samples=2", "train.micro_batch_size=2", "optim.warmup_steps=1",
    "optim.warmup_lr=1e-3", "evaluate.max_images=2", "evaluate.pictures=1",
)  # fmt: skip
KEYS = ("loss", "bce", "dice", "iou", "score", "box", "semantic", "presence", "grad_norm", "lr")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with drawn images and a run of one process, `reference`, and the overrides that made it."""
    folder = tmp_path_factory.mktemp("adapt")
    overrides = (*SHORT, *EVERY, f"train.runs={folder}/runs", f"data.path={folder}/images")
    printed = run_here(folder, "train", *overrides, "name=reference", recipe=LORA)
    assert "163 layers of trunk, text, detr" in printed and "views    0, 1; a merge takes one" in printed
    assert "evaluate: merge.view: None is the view of no held-out image" in printed  # told before the first step
    return folder, overrides


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero3_cpu"])
def test_two_processes_learn_the_same(runs, hardware):
    folder, overrides = runs
    run(folder, "train", *overrides, f"name={hardware}", f"hardware={hardware}", recipe=LORA, launch=True)
    for step, values in metrics(folder / "runs/reference").items():
        other = metrics(folder / "runs" / hardware)[step]
        assert all(other[f"train/{key}"] == pytest.approx(values[f"train/{key}"], rel=1e-3) for key in KEYS), step
    validated = (metrics(folder / "runs" / name, "val/loss")[3] for name in ("reference", hardware))
    one, other = ({name: value for name, value in found.items() if name.startswith("val/")} for found in validated)
    assert one == pytest.approx(other, rel=1e-3, abs=1e-3)
    # Complete under ZeRO-3, too, whichever parameters DeepSpeed would divide.
    for file in ("checkpoints/best-step-000003/student.safetensors", "adapter/adapter_model.safetensors"):
        whole, found = (load_file(folder / "runs" / name / file) for name in ("reference", hardware))
        assert whole.keys() == found.keys()
        assert all(torch.allclose(whole[name], found[name], atol=2e-3) for name in whole)
    assert not [name for name, tensor in found.items() if not tensor.numel()]


def test_merged_evaluated_and_read_by_peft(runs):
    folder, overrides = runs
    with pytest.raises(MergeError, match=r"an embedding for each of its views \(0, 1\)"):
        merge.run(load_recipe(LORA, [*overrides, "name=reference"]))
    viewed = (*overrides, "name=reference", "merge.view='0'")
    printed = run_here(folder, "merge", *viewed, "merge.formats=[transformers, sam3]", recipe=LORA)
    assert "changed in place, reference/best-step-000003" in printed and "a copy in bfloat16 would keep" in printed
    merged, own = folder / "runs/reference/merged", read_tensors(chassis_folder("tiny"))
    (about,) = json.loads((merged / "effsam3.json").read_text())["adapted"]
    assert about["view"] == "0" and len(about["tensors"]) == 163 + 6 and 0 < about["bf16_keeps"] <= 1
    tensors = read_tensors(merged)
    changed = {name for name in own if not torch.equal(own[name], tensors[name])}
    assert changed <= set(about["tensors"]) and len(changed) > 100
    adapter = folder / "runs/reference/adapter"
    by_peft = PeftModel.from_pretrained(Sam3VideoModel.from_pretrained(chassis_folder("tiny")), adapter)
    plain = by_peft.merge_and_unload().state_dict()
    views = load_file(adapter / "views.safetensors")["weight"]
    for name, tensor in tensors.items():
        tensor = tensor - views[0] if name.endswith("proj2.bias") and name in about["tensors"] else tensor
        assert torch.allclose(plain[name], tensor, atol=1e-5), name
    printed = run_here(folder, "evaluate", *viewed, recipe=LORA)
    assert "of the view 0, in %" in printed and "| start" in printed and "| adapted" in printed
    assert "text, Dice" in printed and "Rounded to bfloat16" in printed
    result = json.loads((folder / "runs/reference/eval/adapted_masks.json").read_text())
    assert {"iou_box", "dice_point", "iou_text"} <= result["adapted"].keys() and result["masks"]["box"]
    assert len(list((folder / "runs/reference/pictures").glob("*.png"))) == 1


def test_a_resized_picture_that_poses_as_features_is_refused(runs, monkeypatch):
    folder, overrides = runs

    class Picture(torch.nn.Module):
        """The image, a pixel for each position: what once stood in for an encoder."""

        def forward(self, pixels_B3SS):
            small = torch.nn.functional.interpolate(pixels_B3SS, (16, 16), mode="bilinear")
            maps = small.repeat(1, 22, 1, 1)[:, :64] * torch.linspace(1, 2, 64).view(1, -1, 1, 1)
            return type("Output", (), {"last_hidden_state": maps.flatten(2).transpose(1, 2)})()

    stage = object.__new__(AdaptStage)
    stage.recipe = recipe = load_recipe(LORA, [*overrides, "name=x"])
    stage.train_data = own_images(recipe).batches(recipe, "train", 224)
    stage.device = torch.device("cpu")
    stage.model = Sam3VideoModel.from_pretrained(chassis_folder("tiny"))
    stage.refuse_other_features()
    stage.model.detector_model.vision_encoder.backbone = Picture()
    with pytest.raises(ChassisError, match="resized picture"):
        stage.refuse_other_features()


def test_adapters_on_another_model_are_refused(runs, tmp_path):
    folder, overrides = runs
    shutil.copytree(folder / "runs/reference", tmp_path / "runs/reference", ignore=shutil.ignore_patterns("merged"))
    file = tmp_path / "runs/reference/provenance.json"
    made = json.loads(file.read_text())
    made["features"]["teacher"]["fingerprint"] = "0" * 32
    file.write_text(json.dumps(made))
    recipe = load_recipe(tmp_path / "runs/reference/recipe.yaml", [f"train.runs={tmp_path}/runs"])
    with pytest.raises(MergeError, match="was trained on other weights"):
        merge.run(recipe)
    text = (tmp_path / "runs/reference/recipe.yaml").read_text()
    (tmp_path / "runs/reference/recipe.yaml").write_text(text.replace("rank: 4", "rank: 8"))
    with pytest.raises(MergeError, match="are not those of the adapters of"):
        merge.run(load_recipe(tmp_path / "runs/reference/recipe.yaml", [f"train.runs={tmp_path}/runs"]))


def test_what_no_prompt_would_train_is_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match="adapters.parts: text would learn nothing.*prompts.text above 0"):
        load_recipe(LORA, ["adapters.parts=[trunk, text]"])
    with pytest.raises(UserError, match="tracker_mask_decoder would learn nothing"):
        load_recipe(LORA, ["prompts.box=0", "prompts.point=0", "prompts.text=1"])
    with pytest.raises(UserError, match="add up to 1.5"):
        load_recipe(LORA, ["prompts.text=0.5"])
    with pytest.raises(UserError, match="merge.view: 'left' is a view, but data.view is null"):
        load_recipe(LORA, ["merge.view=left"])


def test_a_dry_run_knows_what_recomputing_saves():
    found = {}
    for recompute in ("false", "true"):
        dry = dry_stage(load_recipe(LORA, [*EVERY, "data.objects=2", f"train.recompute={recompute}"]), 2)
        found[recompute] = cost(dry)
    assert found["true"].peak < 0.9 * found["false"].peak and found["true"].flops == found["false"].flops


def test_a_release_of_students_is_adapted_like_sam3(tmp_path):
    """Convolutions with BatchNorm in the trunk's place, a MobileCLIP in the text encoder's, an efficient memory."""
    runs = tmp_path / "runs"
    image, text = image_run(runs, student="repvit_m0_9"), text_run(runs)
    parts = [f"parts.image={image}", f"parts.text={text}", f"parts.memory={memory_run(runs)}"]
    merge.run(load_recipe(REPOSITORY / "recipes/smoke/release.yaml", [*parts, "name=release", f"runs={runs}"]))
    overrides = (
        *SHORT, *EVERY, "data.view=null", "train.steps=1", "train.eval_every=1", "optim.warmup_steps=0", "name=lora",
        f"sam3.checkpoint={runs}/release", f"train.runs={runs}", f"data.path={tmp_path}/images",
    )  # fmt: skip
    for verb in ("train", "merge", "evaluate"):
        printed = run_here(tmp_path, verb, *overrides, recipe=LORA)
    assert "| adapted" in printed
    before, after = (read_tensors(runs / name / "merged") for name in ("release", "lora"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    convolutions = {name for name in changed if name.startswith(TRUNK) and before[name].ndim == 4}
    assert convolutions and all(before[name].shape[2:] == (1, 1) for name in convolutions)
    assert [name for name in changed if "text_encoder" in name] and not [name for name in changed if "running" in name]
