# SPDX-License-Identifier: Apache-2.0
"""What `effsam3 show --budget` says of a GPU's memory against what real steps take of it."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import REPOSITORY, command, metrics, run_line

from effsam3.hardware.budget.estimates import LIBRARIES, estimate, largest_micro_batch, measure
from effsam3.models.chassis.find import chassis_folder
from effsam3.recipe.reader import load_recipe

pytestmark = pytest.mark.gpu
GIB = 1 << 30
STEPS = 4
COMMON = (
    "hardware=gpu", f"train.steps={STEPS}", "train.log_every=2", "train.eval_every=100", "train.save_every=100",
    "train.eval_samples=8", "train.loggers=[]", "data.workers=4", "optim.warmup_steps=1",
)  # fmt: skip
BY_EPOCHS = ("train.epochs=null", "optim.warmup_epochs=null")
FULL_SIZE = ("sam3.checkpoint=random",)  # SAM 3's sizes, weights of no worth
IMAGE = (
    *FULL_SIZE, *BY_EPOCHS, "student_init=random", "teacher=online", "data.source=synthetic",
    "data.synthetic_images=80", "data.index=data/index.parquet", "train.global_batch_size=16",
)  # fmt: skip
TEXT = (
    *FULL_SIZE, *BY_EPOCHS, "student_init=random", "data.source=synthetic", "data.captions=data/recap",
    "data.synthetic_captions=600", "train.global_batch_size=64", "data.held_out=0.2",
)  # fmt: skip
VIDEOS = ("data.source=synthetic", "data.synthetic_videos=24", "data.index=videos/index.parquet")
MEMORY = (*FULL_SIZE, *VIDEOS, "train.global_batch_size=4")  # fmt: skip
# name -> recipe, overrides; the longest first
RUNS = {
    "hybrid memory": ("stage2/memory", MEMORY),
    "hybrid memory, kept": ("stage2/memory", (*MEMORY, "train.recompute=false", "train.micro_batch_size=1")),
    "RepViT M1.1": ("stage1/image/es_rv_m", IMAGE),
    "RepViT M1.1, fp32": ("stage1/image/es_rv_m", (*IMAGE, "train.precision=fp32", "train.micro_batch_size=4")),
    "RepViT M1.1, neck": ("stage1/image/es_rv_m", (*IMAGE, "loss.neck=0.1")),
    "TinyViT 21M": ("stage1/image/es_tv_l", IMAGE),
    "EfficientViT B1": ("stage1/image/es_ev_m", IMAGE),
    "MobileCLIP-S0": ("stage1/text/es_mc_s", TEXT),
    "smoke memory": ("smoke/memory", ("sam3.checkpoint=tiny", *VIDEOS)),
    "smoke image": ("smoke/image", ("teacher=online", "train.precision=bf16", "train.micro_batch_size=8")),
    "smoke text": ("smoke/text", ("train.precision=bf16",)),
}
# A real step takes at most so much of what is estimated, and at least so much: real clips have less than the most.
MOST, LEAST, LEAST_OF_CLIPS = 1.05, 0.9, 0.6
WORKSPACES = 0.1  # GiB that cuBLAS and cuDNN take of torch's allocator, at most; estimated among CUDA's own


def real_and_estimated(name: str, folder: Path) -> tuple[float, float]:
    """GiB that torch's allocator held at most in a training, and that were estimated for it."""
    recipe, own = RUNS[name]
    path, folder = REPOSITORY / f"recipes/{recipe}.yaml", folder / name.replace(" ", "-")
    folder.mkdir()
    with ThreadPoolExecutor(1) as meanwhile:
        line = command("train", *COMMON, *own, "name=run", recipe=path)
        running = meanwhile.submit(run_line, folder, line)
        asked = load_recipe(path, [*COMMON, *own])
        estimated = estimate(asked, measure(asked)).total - LIBRARIES
        running.result()
    return max(values["perf/peak_gib"] for values in metrics(folder / "runs/run").values()), estimated / GIB


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{name: (real, estimated), to be waited for} of all runs, some at a time."""
    chassis_folder("random")  # once, not by all at a time; four of the runs have room on a GPU of 80 GiB
    folder = tmp_path_factory.mktemp("budget")
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        yield {name: pool.submit(real_and_estimated, name, folder) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_real_step_takes_what_was_estimated(found, name):
    real, estimated = found[name].result()
    print(f"{name}: real {real:.3f} GiB, estimated {estimated:.3f} GiB, {real / estimated:.2f}", flush=True)
    assert real < MOST * estimated + WORKSPACES
    assert real > (LEAST_OF_CLIPS if "memory" in name else LEAST) * estimated


# ---- the search, and what is said when memory ends

# Most of what torch may take of the device, so that it ends soon.
LIMITED = """
import sys, torch
from effsam3.cli import main
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]) * 2**30 / total)
sys.exit(main(sys.argv[2:]))
"""
LIMIT_GIB = 1.5
SEARCHED = (
    "hardware=gpu", "student=repvit_m1_1", "teacher=online", "train.precision=bf16", "train.global_batch_size=256",
    "train.steps=2", "train.log_every=1", "optim.warmup_steps=1", "train.eval_every=2", "train.save_every=2",
    "train.eval_samples=8", "train.loggers=[]", "data.synthetic_images=64", "data.index=data/index.parquet",
)  # fmt: skip


def limited(folder: Path, *overrides: str, code: int = 0) -> str:
    """Train the smoke image recipe on a GPU of which torch may take `LIMIT_GIB`."""
    _, _, _, *line = command("train", *SEARCHED, *overrides)
    return run_line(folder, [sys.executable, "-c", LIMITED, str(LIMIT_GIB), *line], code)


def test_the_search_finds_what_fits_and_no_less(tmp_path):
    printed = limited(tmp_path, "train.find_micro_batch=true", "name=searched")
    found = load_recipe(tmp_path / "runs/searched/recipe.yaml").train.micro_batch_size
    assert f"train.micro_batch_size={found}, {256 // found} accumulated" in printed and "WARNING" in printed
    assert metrics(tmp_path / "runs/searched")[2]["perf/peak_gib"] < LIMIT_GIB
    # What is estimated to fit, as far as that is known: one step of the search more or less.
    recipe = load_recipe(REPOSITORY / "recipes/smoke/image.yaml", [*SEARCHED, "train.micro_batch_size=256"])
    text, _ = largest_micro_batch(recipe, measure(recipe), int((LIMIT_GIB + 1) / 0.9 * GIB))
    expected = int(text.rpartition("=")[2])
    assert found in (expected // 2, expected, expected * 2)
    # Twice as much does not fit, and what is said then names what would.
    printed = limited(tmp_path, f"train.micro_batch_size={2 * found}", "name=too-much", code=2)
    assert "the device is out of memory" in printed and "Traceback" not in printed
    assert f"train.micro_batch_size={2 * found}" in printed and "change: train.micro_batch_size=" in printed
