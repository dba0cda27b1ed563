# SPDX-License-Identifier: Apache-2.0
"""Samples a second of short real runs: one and two processes, DDP and ZeRO, a stored, int8 and online teacher.

    python scripts/measure_scaling.py [--steps 12] [--rounds 2] [--to runs/measured-scaling]

`smoke/image` on the CPU, one thread a process, by `effsam3 launch`. Its teacher is a tiny SAM 3 whose trunk is as wide
as SAM 3's, so that it takes, as there, several times as long as training. The best run of each row counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from effsam3.files import write_json
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.processor import processor
from effsam3.models.chassis.tiny import Shape, tiny_config
from effsam3.recipe.reader import load_recipe
from effsam3.training.report import table

# Titles, hardware, and how many such runs at once. What two runs that know nothing of each other make is what two
# processes can come to: cores share their memory's bandwidth.
ROWS = {"one process": ("cpu", 1), "two, apart": ("cpu", 2), "DDP": ("ddp_cpu", 1)} | {
    f"ZeRO-{stage}": (f"zero{stage}_cpu", 1) for stage in (1, 2, 3)
}
TEACHERS = {
    "stored, float16": ("embed.dtype=float16",),
    "stored, int8": ("embed.dtype=int8",),
    "online": ("teacher=online",),
}
TRUNK_WIDTH = 1024  # SAM 3's own
LOG_EVERY = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of 16 images each; the first half warms up")
    parser.add_argument("--rounds", type=int, default=2, help="all rows this many times, in turn")
    parser.add_argument("--to", type=Path, default=Path("runs/measured-scaling"), help="where the runs go")
    asked = parser.parse_args()
    make_teacher(asked.to / "teacher")
    found: dict[str, dict[str, float]] = {name: {} for name in TEACHERS}
    for turn in range(asked.rounds):
        for name in TEACHERS:
            for title in ROWS:
                rate = samples_per_s(asked, name, title, f"{turn}-{name}-{title}")
                found[name][title] = max(rate, found[name].get(title, 0))
                print(f"{name}, {title}: {rate:.2f} samples/s, load average {os.getloadavg()[0]:.1f}", flush=True)
    lines = [[name, *(f"{rate:.2f}" for rate in rates.values())] for name, rates in found.items()]
    print(table(lines, ["teacher", *ROWS], text_columns=1))
    write_json(asked.to / "scaling.json", found)


def make_teacher(folder: Path) -> None:
    """Write a tiny SAM 3 with a trunk as wide as SAM 3's, from a fixed seed."""
    torch.manual_seed(0)
    config = tiny_config(Shape(trunk_width=TRUNK_WIDTH))
    model_class(config.model_type)(config).save_pretrained(folder, save_original_format=False)
    processor(config).save_pretrained(folder)


def samples_per_s(asked: argparse.Namespace, name: str, title: str, run: str) -> float:
    """Train one cell of the table; return the median of its rate after half of the steps, summed over its runs."""
    (hardware, copies), run = ROWS[title], run.replace(", ", "-").replace(" ", "-")
    store = asked.to / name.replace(", ", "-")
    cases = [[
        f"name={run}-{copy}", f"hardware={hardware}", f"sam3.checkpoint={asked.to}/teacher", f"train.runs={asked.to}",
        f"data.index={asked.to}/data/index.parquet", "data.synthetic_images=64", f"embed.to={store}", *TEACHERS[name],
        f"train.steps={asked.steps}", f"train.log_every={LOG_EVERY}", f"train.eval_every={asked.steps}",
        f"train.save_every={asked.steps}", "train.global_batch_size=16", "train.micro_batch_size=8",
        "train.eval_samples=8", "train.loggers=[]", "optim.warmup_steps=1",
    ] for copy in range(copies)]  # fmt: skip
    if name != "online" and not store.is_dir():
        _wait(_started("embed", cases[0]))
    for process in [_started("train", own) for own in cases]:
        _wait(process)
    rate = 0.0
    for own in cases:
        lines = (load_recipe("smoke/image", own).folder / "metrics.jsonl").read_text().splitlines()
        rates = [line["perf/samples_per_s"] for line in map(json.loads, lines) if "perf/samples_per_s" in line]
        rate += statistics.median(rates[len(rates) // 2 :])
    return rate


def _started(verb: str, own: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "effsam3", "launch", "smoke/image", verb, *own]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _wait(process: subprocess.Popen) -> None:
    if code := process.wait():
        raise subprocess.CalledProcessError(code, process.args)


if __name__ == "__main__":
    main()
