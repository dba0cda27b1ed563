# SPDX-License-Identifier: Apache-2.0
"""Stage concepts: every verb in turn, the same learning on any hardware and after a stop, a student and a teacher."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import REPOSITORY, metrics, run, run_here
from concept_students import student_folder
from safetensors.torch import load_file
from transformers import Sam3VideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, read_tensors

CONCEPTS = REPOSITORY / "recipes/smoke/concepts.yaml"
SHORT = (
    "data.synthetic_images=12", "data.synthetic_held_out=4", "data.phrases=2", "train.micro_batch_size=2",
    "train.steps=6", "optim.warmup_steps=2", "train.log_every=1", "train.eval_every=3", "train.save_every=3",
    "train.eval_samples=4", "evaluate.concept_pictures=1",
)  # fmt: skip
KEYS = ("loss", "annotations", "teacher", "annotations_box", "annotations_dice", "grad_norm", "lr")
TRAINED = ("vision_encoder.", "detr_encoder.", "detr_decoder.", "mask_decoder.", "dot_product_scoring.")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with drawn images and a run of one process, `reference`, and the overrides that made it."""
    folder = tmp_path_factory.mktemp("concepts")
    overrides = (*SHORT, f"train.runs={folder}/runs", f"data.path={folder}/data")
    printed = run_here(folder, "train", *overrides, "name=reference", recipe=CONCEPTS)
    assert "truth    annotations x 1, teacher x 0.1; teacher tiny_concepts" in printed
    return folder, overrides


def weights(folder, name):
    return load_file(folder / "runs" / name / "checkpoints/step-000006/student.safetensors")


def alike(folder, name, rel=3e-3):
    for step, values in metrics(folder / "runs/reference").items():
        other = metrics(folder / "runs" / name)[step]
        assert all(other[f"train/{key}"] == pytest.approx(values[f"train/{key}"], rel=rel) for key in KEYS), step
    whole, found = weights(folder, "reference"), weights(folder, name)
    assert whole.keys() == found.keys()
    # Where a gradient is nothing but rounding, Adam takes whole steps in a direction that is anyone's.
    away = torch.cat([(whole[one] - found[one]).abs().flatten() for one in whole])
    assert away.mean() < 1e-5 and (away > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero3_cpu"])
def test_two_processes_learn_the_same(runs, hardware):
    folder, overrides = runs
    run(folder, "train", *overrides, f"name={hardware}", f"hardware={hardware}", recipe=CONCEPTS, launch=True)
    alike(folder, hardware)


def test_a_resumed_run_is_the_same_to_the_bit(runs):
    folder, overrides = runs
    run_here(folder, "train", *overrides, "name=stopped", recipe=CONCEPTS)
    # As if it had ended after step 3.
    shutil.rmtree(folder / "runs/stopped/checkpoints/step-000006")
    for best in (folder / "runs/stopped/checkpoints").glob("best-*6"):
        shutil.rmtree(best)
    printed = run_here(folder, "train", *overrides, "name=stopped", recipe=CONCEPTS)
    assert "step      3/6" not in printed and "step      6/6" in printed
    whole, found = weights(folder, "reference"), weights(folder, "stopped")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_merged_and_evaluated(runs):
    folder, overrides = runs
    losses = [values["val/loss"] for values in metrics(folder / "runs/reference", "val/loss").values()]
    assert losses[-1] < 0.95 * losses[0]
    own = (*overrides, "name=reference")
    printed = run_here(folder, "merge", *own, recipe=CONCEPTS)
    assert "changed in place, reference/best-step-000006" in printed
    before, after = read_tensors(chassis_folder("tiny_concepts")), read_tensors(folder / "runs/reference/merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) > 200
    assert all(name.removeprefix("detector_model.").startswith(TRAINED) for name in changed)
    printed = run_here(folder, "evaluate", *own, recipe=CONCEPTS)
    assert "| teacher" in printed and "| student" in printed
    (subset,) = json.loads((folder / "runs/reference/eval/concepts.json").read_text())["subsets"].values()
    assert subset["positives"] == subset["negatives"] > 0


def test_a_student_learns_from_its_teacher_alone(tmp_path):
    """No annotations: a trunk of 3 k parameters with BatchNorm under the frozen detector of `tiny_concepts`."""
    student = student_folder(tmp_path / "student")
    own = (
        *SHORT, f"train.runs={tmp_path}/runs", f"data.path={tmp_path}/data", f"sam3.checkpoint={student}",
        "model.trainable=[vision_encoder.backbone]", "loss={annotations: 0, teacher: 1, features: 1}",
    )  # fmt: skip
    for verb in ("train", "merge", "evaluate"):
        run_here(tmp_path, verb, *own, "name=taught", recipe=CONCEPTS)
    losses = [values["val/loss"] for values in metrics(tmp_path / "runs/taught", "val/loss").values()]
    assert losses[-1] < losses[0]
    before, after = read_tensors(student), read_tensors(tmp_path / "runs/taught/merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(TRUNK) and "running" not in name for name in changed)


def test_a_detector_of_half_the_encoder_is_trained_merged_and_measured(runs):
    folder, overrides = runs
    own = (
        *overrides, "name=slim", "model={encoder_layers: 1, trainable: [detr_encoder, detr_decoder]}",
        "evaluate.coarse_masks=true",
    )  # fmt: skip
    for verb in ("train", "merge", "evaluate"):
        printed = run_here(folder, verb, *own, recipe=CONCEPTS)
    assert "| teacher" in printed and "| student" in printed
    run_here(folder, "push", *own, "--dry-run", recipe=CONCEPTS)
    card = (folder / "runs/slim/merged/README.md").read_text()
    assert "adapted and the detector's fusion encoder keeps 1 of its layers." in card
    losses = [values["val/loss"] for values in metrics(folder / "runs/slim", "val/loss").values()]
    assert losses[-1] < losses[0]
    model, info = Sam3VideoModel.from_pretrained(folder / "runs/slim/merged", output_loading_info=True)
    assert (
        len(model.detector_model.detr_encoder.layers) == 1 and not info["missing_keys"] and not info["unexpected_keys"]
    )
    # The first of both layers, moved on; the mask decoder stayed.
    before, after = read_tensors(chassis_folder("tiny_concepts")), read_tensors(folder / "runs/slim/merged")
    first = "detector_model.detr_encoder.layers.0.mlp.fc1.weight"
    assert 0 < (before[first] - after[first]).abs().max() < 0.05
    assert torch.equal(*(one["detector_model.mask_decoder.mask_embedder.layers.0.weight"] for one in (before, after)))
    settings = {
        model: json.loads((folder / f"runs/slim/eval/concepts/{model}/found/settings.json").read_text())
        for model in ("teacher", "student")
    }
    assert settings["student"]["coarse_masks"] and "coarse_masks" not in settings["teacher"]


def test_adapters_resume_to_the_bit_and_are_folded_in(runs):
    folder, overrides = runs
    own = (*overrides, "model.trainable=[]", "adapters={parts: [detr, detector_mask_decoder], rank: 4, alpha: 8}")
    for name in ("low-rank", "low-rank-stopped"):
        run_here(folder, "train", *own, f"name={name}", recipe=CONCEPTS)
    stopped = folder / "runs/low-rank-stopped/checkpoints"
    for one in (stopped / "step-000006", *stopped.glob("best-*6")):
        shutil.rmtree(one)
    printed = run_here(folder, "train", *own, "name=low-rank-stopped", recipe=CONCEPTS)
    assert "step      3/6" not in printed and "step      6/6" in printed
    whole, found = weights(folder, "low-rank"), weights(folder, "low-rank-stopped")
    assert whole.keys() == found.keys() and all(".lora_" in name for name in whole)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    printed = run_here(folder, "merge", *own, "name=low-rank", recipe=CONCEPTS)
    assert "of what the adapters change" in printed
    before, after = read_tensors(chassis_folder("tiny_concepts")), read_tensors(folder / "runs/low-rank/merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) > 50
    parts = ("detector_model.geometry_encoder.", "detector_model.detr_", "detector_model.mask_decoder.")
    assert all(name.startswith(parts) and name.endswith(".weight") for name in changed)
