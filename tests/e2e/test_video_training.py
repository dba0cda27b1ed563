# SPDX-License-Identifier: Apache-2.0
"""Own videos by the command line: the same learning in two processes and after a stop, merged and measured."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, REPOSITORY, command, metrics, run
from safetensors.torch import load_file, save_file
from test_trajectories import wait_for
from transformers import Sam3TrackerVideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_tensors
from effsam3.stages.video.facts import TERMS

SMOKE = REPOSITORY / "recipes/smoke/video.yaml"
STEPS = 3
KEYS = ("loss", *TERMS, "grad_norm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with drawn videos and a run of one process, `reference`, and the overrides that made it."""
    folder = tmp_path_factory.mktemp("video")
    # The tiny chassis scores every object absent, so that all masks would be empty and all of them equal.
    shutil.copytree(chassis_folder("tiny"), folder / "chassis")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / "chassis").items()}
    tensors["tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias"].fill_(5.0)
    save_file(tensors, folder / "chassis/model.safetensors", {"format": "pt"})
    overrides = (
        f"sam3.checkpoint={folder}/chassis", f"train.runs={folder}/runs", f"data.path={folder}/videos",
        "data.synthetic_videos=6", "data.synthetic_frames=16", "data.stride=1", "prompts.frames=[0,2]",
        f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=3", "train.save_every=1",
        "train.eval_samples=2", "train.keep_checkpoints=9", "optim.warmup_steps=1",
    )  # fmt: skip
    printed = run(folder, "train", *overrides, "name=reference", recipe=SMOKE)
    assert "memory_encoder 0." in printed and "held-out clips, prompted as in training" in printed
    return folder, overrides


def assert_same(folder: Path, name: str, tolerance: float) -> None:
    expected, found = (metrics(folder / "runs" / run_name) for run_name in ("reference", name))
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, values in expected.items():
        for key in (f"train/{key}" for key in KEYS):
            assert found[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-7), (step, key)
    held_out, other = (metrics(folder / "runs" / run_name, "val/j") for run_name in ("reference", name))
    assert held_out[0]["val/j"] > 0.005
    for step, values in other.items():
        for key in ("val/j", "val/loss", "val/loss_temporal"):
            assert values[key] == pytest.approx(held_out[step][key], rel=tolerance), (step, key)


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero2_cpu"])
def test_two_processes(runs, hardware):
    folder, overrides = runs
    more = ("train.micro_batch_size=1", f"hardware={hardware}", f"name={hardware}")
    assert "2 x cpu" in run(folder, "train", *overrides, *more, recipe=SMOKE, launch=True)
    assert_same(folder, hardware, 1e-4)


def test_stopped_and_resumed(runs):
    folder, overrides = runs
    arguments, checkpoints = ("train", *overrides, "name=resumed"), folder / "runs/resumed/checkpoints"
    process = subprocess.Popen(
        command(*arguments, recipe=SMOKE),
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: (checkpoints / "step-000001").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "resuming from step" in run(folder, *arguments, recipe=SMOKE)
    assert_same(folder, "resumed", 1e-12)


def test_merged_and_measured(runs):
    folder, _ = runs
    reference = folder / "runs/reference"
    run(folder, "merge", recipe=reference)
    student = load_file(next((reference / "checkpoints").glob("best-*")) / "student.safetensors")
    model, chassis = read_tensors(reference / "merged"), read_tensors(folder / "chassis")
    trained = {f"tracker_model.{name}": tensor for name, tensor in student.items()}
    assert model.keys() == chassis.keys() >= trained.keys()
    assert all(torch.equal(model[name], trained.get(name, chassis[name])) for name in model)
    assert not torch.equal(model["tracker_model.memory_encoder.projection.weight"],
                           chassis["tracker_model.memory_encoder.projection.weight"])  # fmt: skip
    (adapted,) = json.loads((reference / "merged/effsam3.json").read_text())["adapted"]
    assert adapted["name"] == "reference" and adapted["tensors"] == sorted(trained)
    _, info = Sam3TrackerVideoModel.from_pretrained(reference / "merged", output_loading_info=True)
    assert not any(info.values())
    printed = run(folder, "evaluate", "evaluate.prompt=box", "evaluate.max_videos=1", recipe=reference)
    result = json.loads((reference / "eval/vos.json").read_text())
    assert list(result["trackers"]) == [f"{folder}/chassis, start", "trained"] and result["prompt"] == "box"
    assert result["trackers"]["trained"]["agreement"] < 1 and ", shown by box" in printed
