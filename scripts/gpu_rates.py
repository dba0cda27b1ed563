# SPDX-License-Identifier: Apache-2.0
"""What one GPU computes in a second: SAM 3's trunk, a training step of a student of each family, clips for a memory.

    python scripts/gpu_rates.py [--seconds 5] [--tiny] [--out rates.json]

Random weights in a recipe's precision, batches that are on the GPU already: no disk, no decoding, no other processes.
A share is of the peak that the GPU's maker states for dense bfloat16. `--tiny` only shows that everything runs, also
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from effsam3 import stages
from effsam3.benchmarks.speed import device_name
from effsam3.errors import UserError
from effsam3.files import write_text
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.hardware.budget.dry_run import DryPlace
from effsam3.hardware.budget.estimates import measure
from effsam3.models.image.teacher import Teacher
from effsam3.models.registry import SAM3S
from effsam3.recipe.reader import load_recipe
from effsam3.training.meters import peak_tflops
from effsam3.training.report import table

STUDENTS = ("es_rv_m", "es_tv_m", "es_ev_m")  # RepViT, TinyViT, EfficientViT
BATCH = 16  # images that the teacher sees at once
SMALL, SHORT = ("student=tiny_convnext", "student_init=random"), ("data.frames=2", "data.objects=1")  # if tiny


class Work(NamedTuple):
    """What is repeated; `tflop` of one item, None where counting it would take a minute."""

    items: int
    tflop: float | None
    run: Callable[[], object]


def trunk(device: torch.device, tiny: bool, compiled: bool = False) -> Work:
    """SAM 3's trunk forward in bfloat16, as `embed` and an online teacher run it; `compiled` is `train.compile`."""
    sam3, count = SAM3S["tiny" if tiny else "random"], 1 if tiny else BATCH
    with torch.device(device):
        teacher = Teacher(sam3.config().detector_config.vision_config)
        pixels = torch.rand(count, 3, teacher.image_size, teacher.image_size) * 2 - 1
    if compiled:
        teacher.compile_layers()

    def run() -> None:
        with frozen_autocast(device, "bf16"):
            teacher(pixels)

    return Work(count, sam3.gflop["trunk"] / 1e3 if sam3.gflop else None, run)


def step(name: str, sizes: Sequence[str], device: torch.device, tiny: bool) -> Work:
    """One step of a recipe: its loss on a micro-batch, the gradient and the optimizer's step; `sizes` if tiny."""
    recipe = load_recipe(name, [*sizes, "sam3.checkpoint=tiny"] if tiny else ["sam3.checkpoint=random"])
    count = 1 if tiny else recipe.train.micro_batch_size
    place = DryPlace(recipe.train.precision)
    place.device = device
    with torch.device(device):
        stage = stages.training(recipe.stage).STAGE.from_shapes(recipe, place)
    batch = {
        key: torch.zeros_like(value, device=device) if isinstance(value, Tensor) and value.is_meta else value
        for key, value in stage.example(count).items()
    }
    learned = [one for one in stage.student.train().parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)

    def run() -> None:
        with place.autocast():
            loss = stage.loss(stage.student, batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Work(count, measure(recipe).flops / 1e12 if recipe.stage == "image" else None, run)


def rates(device: torch.device, tiny: bool, seconds: float) -> Iterator[dict]:
    """Measure one after the other; a row each, `per_s` in items."""
    works = {"teacher trunk, images": trunk}
    works |= {f"step of {name}, images": partial(step, f"stage1/image/{name}", SMALL) for name in STUDENTS}
    works["step of memory, clips"] = partial(step, "smoke/memory" if tiny else "stage2/memory", SHORT)
    works["teacher trunk compiled, images"] = partial(trunk, compiled=True)  # last: it takes long to compile
    for name, make in works.items():
        work = make(device, tiny)
        for _ in range(1 if tiny else 3):  # kernels are chosen and memory is taken
            work.run()
        wait(device)
        started, runs = time.perf_counter(), 0
        while not runs or time.perf_counter() - started < seconds:
            work.run()
            wait(device)
            runs += 1
        per_s = runs * work.items / (time.perf_counter() - started)
        peak, tflops = peak_tflops(device), None if work.tflop is None else per_s * work.tflop
        share = None if peak is None or tflops is None else tflops / peak
        yield {"what": name, "batch": work.items, "per_s": per_s, "tflops": tflops, "share_of_peak": share}
        del work
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until everything asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="for each row, after it has warmed up")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, one step each: a test of the script")
    parser.add_argument("--out", type=Path, default=Path("rates.json"), help="where the numbers are written")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        raise UserError("there is no GPU here; --tiny tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for row in rates(device, arguments.tiny, 0 if arguments.tiny else arguments.seconds):
        found.append(row)
        # Each as soon as it is there: scripts/gpu_check.sh may run out of time.
        write_text(arguments.out, json.dumps({"device": device_name(device), "rates": found}, indent=1) + "\n")
        print(f"{row['what']}: {row['per_s']:.1f} a second", flush=True)
    columns = [
        [row["what"], str(row["batch"]), f"{row['per_s']:.1f}", *map(known, (row["tflops"], row["share_of_peak"]))]
        for row in found
    ]
    print(f"\n{device_name(device)}\n")
    print(table(columns, ["what", "at once", "per s", "TFLOP/s", "share of peak"]))


def known(value: float | None) -> str:
    """Return a number in three digits, or nothing."""
    return "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
