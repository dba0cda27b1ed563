# SPDX-License-Identifier: Apache-2.0
"""The same learning on a GPU as on a CPU, and on a GPU under ZeRO-2 as without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, metrics, run_line

pytestmark = pytest.mark.gpu
STEPS = 6
SHORT = (
    f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=3", "train.save_every=3", "optim.warmup_steps=2",
    "train.eval_samples=8", "train.keep_checkpoints=9", "train.loggers=[]", "train.ema=0.5",
)  # fmt: skip
OWN = {
    "image": ("teacher=online", "loss.neck=0.1", "data.synthetic_images=48", "data.index=data/index.parquet"),
    "text": ("data.synthetic_captions=400",),
    "memory": (
        "sam3.checkpoint=tiny", "data.synthetic_videos=24", "data.index=videos/index.parquet", "data.frames=3",
        "train.recompute=true",
    ),
}  # fmt: skip
KEYS = ("train/loss", "train/grad_norm", "train/lr")


def asked(stage: str, hardware: str, *overrides: str) -> list[str]:
    """Recipe and overrides of a short training."""
    recipe = REPOSITORY / f"recipes/smoke/{stage}.yaml"
    return [str(recipe), *SHORT, *OWN[stage], f"hardware={hardware}", f"name={hardware}", *overrides]


def train(folder: Path, *arguments: str) -> None:
    run_line(folder, [sys.executable, "-m", "effsam3.cli", "train", *arguments])


def assert_same(reference: dict[int, dict], other: dict[int, dict], tolerance: float) -> None:
    assert reference.keys() == other.keys() and STEPS in other
    for step, values in reference.items():
        for key in KEYS:
            assert other[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-9), (step, key)


@pytest.fixture(scope="module", params=OWN)
def on_both(request, tmp_path_factory) -> tuple[str, Path]:
    """A stage and the folder in which it has trained in fp32 on the CPU and on the GPU."""
    stage, folder = request.param, tmp_path_factory.mktemp(request.param)
    for hardware in ("cpu", "gpu"):
        train(folder, *asked(stage, hardware))
    return stage, folder / "runs"


def test_fp32_on_a_gpu_is_fp32_on_a_cpu(on_both):
    stage, runs = on_both
    reference, found = metrics(runs / "cpu"), metrics(runs / "gpu")
    assert_same(reference, found, 1e-3)
    metric = "val/j" if stage == "memory" else "val/cosine"
    for step, values in metrics(runs / "cpu", metric).items():
        assert metrics(runs / "gpu", metric)[step][metric] == pytest.approx(values[metric], rel=1e-3, abs=1e-3)


def test_bf16_stays_close(on_both):
    stage, runs = on_both
    train(runs.parent, *asked(stage, "gpu", "train.precision=bf16", "name=bf16"))
    reference = metrics(runs / "gpu")
    for step, values in metrics(runs / "bf16").items():
        assert values["train/loss"] == pytest.approx(reference[step]["train/loss"], rel=0.05)
        assert values["train/loss"] != reference[step]["train/loss"]


def test_zero2_is_the_same_learning(on_both):
    """One process under ZeRO-2, and then what was saved without it carried on under it."""
    pytest.importorskip("deepspeed")
    stage, runs = on_both
    config, script = REPOSITORY / "accelerate_configs/zero2.yaml", REPOSITORY / "scripts/train.py"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--num_processes", "1", "--main_process_port", "0", str(script)]
    printed = run_line(runs.parent, [*launcher, *asked(stage, "gpu", "name=zero2")])
    assert "1 x NVIDIA" in printed and "ZeRO-2" in printed
    reference = metrics(runs / "gpu")
    assert_same(reference, metrics(runs / "zero2"), 1e-4)
    saved = runs / "gpu/checkpoints/step-000003"
    printed = run_line(runs.parent, [*launcher, *asked(stage, "gpu", "name=moved"), "--resume", str(saved)])
    assert "resuming from step 3" in printed
    assert_same({step: reference[step] for step in range(4, STEPS + 1)}, metrics(runs / "moved"), 1e-4)
