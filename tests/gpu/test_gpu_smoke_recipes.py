# SPDX-License-Identifier: Apache-2.0
"""The smoke recipes on one GPU, in bf16, by `effsam3 launch`: train, stop, resume, merge, evaluate, predict."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from commands import ENVIRONMENT, REPOSITORY, Family, metrics, run_line, step_of
from PIL import Image
from pycocotools import mask as coco_mask

pytestmark = pytest.mark.gpu
STEPS, STOPPED_FROM = 80, 20
COMMON = (
    "hardware=gpu", "train.precision=bf16", f"train.steps={STEPS}", "train.log_every=5", "train.eval_every=40",
    "train.save_every=40", "train.loggers=[]", "data.workers=2",
)  # fmt: skip
# The tracker learns on a tiny SAM 3 of random weights, because a trained one would take minutes to make. So all of it
# learns: a memory alone could not make the masks of a random decoder better.
OWN = {
    "image": ("data.synthetic_images=64", "evaluate.max_images=4", "evaluate.pictures=1"),
    "text": ("data.synthetic_captions=600", "evaluate.max_captions=50"),
    "memory": (
        "sam3.checkpoint=tiny", "memory.trains=[memory, pointers, prompts, decoder, neck, trunk]", "loss.memory=0",
        "optim.pretrained_scale=1.0", "merge.checkpoint=last", "data.synthetic_videos=24",
        "data.index=videos/index.parquet", "data.frames=4", "train.eval_samples=4", "evaluate.modes=[]",
        "evaluate.untrained=false", "evaluate.max_videos=2", "evaluate.pictures=1",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A recipe whose every verb has run, its training in two parts."""

    stage: str
    folder: Path  # the working directory
    stopped: str  # what was printed until SIGTERM ended it
    resumed: str  # what was printed by the same command, started again

    @property
    def run(self) -> Path:
        return self.folder / f"runs/smoke-{self.stage}"


@pytest.fixture(scope="module", params=OWN)
def trained(request, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    recipe = REPOSITORY / f"recipes/smoke/{request.param}.yaml"
    line = [sys.executable, "-m", "effsam3.cli", "launch", str(recipe), *COMMON, *OWN[request.param]]
    family = Family(folder, line)
    family.wait_until(lambda: step_of(folder / f"runs/smoke-{request.param}") >= STOPPED_FROM)
    assert len(family.members()) >= 2 + 2  # launch, training, data workers
    family.process.send_signal(signal.SIGTERM)  # to `launch` alone, as some batch systems do
    stopped = family.end()  # nothing outlives it
    assert family.process.returncode == 75, stopped
    return Trained(request.param, folder, stopped, run_line(folder, line))


def test_a_stopped_run_resumes(trained):
    assert "1 x NVIDIA" in trained.stopped and "asked to stop: saved at step" in trained.stopped
    assert "resuming from step" in trained.resumed
    assert metrics(trained.run).keys() == set(range(5, STEPS + 1, 5))
    assert json.loads((trained.run / "provenance.json").read_text())["hardware"].startswith("1 x NVIDIA")


def test_the_loss_falls(trained):
    losses = [values["train/loss"] for _, values in sorted(metrics(trained.run).items())]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert all(values["perf/peak_gib"] > 0 for values in metrics(trained.run).values())


def test_the_merged_model_was_measured_on_the_gpu(trained):
    benchmark = {"image": "speed", "text": "speed", "memory": "vos"}[trained.stage]
    assert "NVIDIA" in json.loads((trained.run / f"eval/{benchmark}.json").read_text())["device"]


def predicted(trained: Trained, out: str, source: Path, *prompts: str, on_cpu: bool = False) -> list[dict]:
    """The instances that `effsam3 predict` finds with the merged model, of all frames."""
    line = [sys.executable, "-m", "effsam3.cli", "predict", str(trained.run), str(source), *prompts, "--out", out]
    run_line(trained.folder, line, environment=ENVIRONMENT | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}))
    found = json.loads((trained.folder / out / "predictions.json").read_text())
    return found["instances"] if "instances" in found else [one for row in found["frames"] for one in row["instances"]]


def photograph(folder: Path) -> Path:
    """A red disc on a slope of greys."""
    rows, columns = np.mgrid[:160, :200]
    pixels_HW3 = np.stack([(rows + columns) // 2] * 3, 2).astype(np.uint8)
    pixels_HW3[(rows - 80) ** 2 + (columns - 100) ** 2 < 40**2] = (220, 30, 30)
    Image.fromarray(pixels_HW3).save(folder / "photograph.png")
    return folder / "photograph.png"


def test_cpu_and_gpu_predict_the_same(trained):
    """The merged model, loaded by fresh processes: an image by text and by box, for the memory a video."""
    if trained.stage == "memory":
        source, *_ = sorted((trained.folder / "videos").rglob("*.mp4"))
        asked = [("--box", "30,30,90,90")]
    else:
        source = photograph(trained.folder)
        asked = [("--text", "a red ring", "--threshold", "0"), ("--box", "60,40,140,120")]
    for prompts in asked:
        on_gpu = predicted(trained, "on-gpu", source, *prompts)
        on_cpu = predicted(trained, "on-cpu", source, *prompts, on_cpu=True)
        assert len(on_gpu) == len(on_cpu) > 0
        for one, other in zip(on_gpu, on_cpu, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=2e-3)
            masks = [coco_mask.decode(found["segmentation"]).astype(bool) for found in (one, other)]
            assert (masks[0] != masks[1]).mean() < 0.01, prompts
