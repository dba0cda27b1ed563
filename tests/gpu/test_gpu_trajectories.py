# SPDX-License-Identifier: Apache-2.0
"""The same learning on a GPU as on a CPU, and on a GPU under ZeRO-2 and ZeRO-3 as without."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
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
    return [str(recipe), *SHORT, *OWN[stage], f"hardware={hardware}", "name=run", *overrides]


def train_all(lines: dict[Path, list[str]]) -> list[str]:
    """Run command lines at the same time, each in a new folder; returns what they printed."""
    for folder in lines:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        return list(pool.map(run_line, lines.keys(), lines.values()))


def assert_same(reference: dict[int, dict], other: dict[int, dict], tolerance: float) -> None:
    assert reference.keys() == other.keys() and STEPS in other
    for step, values in reference.items():
        for key in KEYS:
            assert other[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-9), (step, key)


@pytest.fixture(scope="module", params=OWN)
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """A stage, and a folder with its trainings in `cpu`, `gpu` and `again` on the GPU, fp32 all, and `bf16`."""
    stage, folder = request.param, tmp_path_factory.mktemp(request.param)
    own = {name: asked(stage, hardware) for name, hardware in (("cpu", "cpu"), ("gpu", "gpu"), ("again", "gpu"))}
    own["bf16"] = asked(stage, "gpu", "train.precision=bf16")
    train = [sys.executable, "-m", "effsam3.cli", "train"]
    printed = train_all({folder / name: [*train, *arguments] for name, arguments in own.items()})
    assert ["1 x cpu" in text for text in printed] == [True, False, False, False]
    assert ["1 x NVIDIA" in text for text in printed] == [False, True, True, True]
    return stage, folder


def losses(folder: Path, key: str = "train/loss") -> dict[int, dict]:
    return metrics(folder / "runs/run", key)


def test_fp32_on_a_gpu_is_fp32_on_a_cpu(trained):
    stage, folder = trained
    assert_same(losses(folder / "cpu"), losses(folder / "gpu"), 1e-3)
    metric = "val/j" if stage == "memory" else "val/cosine"
    for step, values in losses(folder / "cpu", metric).items():
        assert losses(folder / "gpu", metric)[step][metric] == pytest.approx(values[metric], rel=1e-3, abs=1e-3)


def test_bf16_stays_close(trained):
    stage, folder = trained
    reference = losses(folder / "gpu")
    for step, values in losses(folder / "bf16").items():
        drift = values["train/loss"] / reference[step]["train/loss"] - 1
        print(f"{stage}, step {step}: the loss in bf16 is {drift:+.1e} off", flush=True)
        assert abs(drift) < 0.05
        assert values["train/loss"] != reference[step]["train/loss"]


@pytest.mark.parametrize("zero", (2, 3))
def test_zero_is_the_same_learning(trained, zero):
    """One process under ZeRO, and what was saved without ZeRO, resumed under it."""
    pytest.importorskip("deepspeed")
    stage, folder = trained
    config, script = REPOSITORY / f"accelerate_configs/zero{zero}.yaml", REPOSITORY / "scripts/train.py"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    line = [*launcher, "--num_processes", "1", "--main_process_port", "0", str(script), *asked(stage, "gpu")]
    saved, name = folder / "gpu/runs/run/checkpoints/step-000003", f"zero{zero}"
    lines = {folder / name: line, folder / f"{name}-resumed": [*line, "--resume", str(saved)]}
    for printed in train_all(lines):
        assert "1 x NVIDIA" in printed and f"ZeRO-{zero}" in printed
    # A GPU adds up gradients of interpolated maps in any order: the same training twice is not the same to the bit.
    reference, again = losses(folder / "gpu"), losses(folder / "again")
    noise = max(abs(again[step][key] - one[key]) / one[key] for step, one in reference.items() for key in KEYS[:2])
    print(f"{stage}: the same training twice is {noise:.1e} apart", flush=True)
    assert noise < 1e-3
    tolerance = max(1e-4, 3 * noise)
    assert_same(reference, losses(folder / name), tolerance)
    resumed = {step: reference[step] for step in range(4, STEPS + 1)}
    assert_same(resumed, losses(folder / f"{name}-resumed"), tolerance)
