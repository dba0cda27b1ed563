# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of starting: what a command takes before it does its work, and what only importing its libraries takes.

Every side is a process of its own; `scripts/benchmark.py` counts the CPU time of children that have ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch

SMALL = ("data.synthetic_images=12", "train.global_batch_size=2", "train.micro_batch_size=2", "train.eval_samples=2")
# What a first step of smoke/image cannot go without: torch's optimizers load its compiler, timm all its trunks.
FLOOR = "import timm.models, torch._dynamo; from transformers import Sam3Model"


def python(*arguments: str) -> None:
    """Run Python to its end, in silence and with one thread, as this process: threads that wait use a processor."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)


def imports(ours: str, others: str, device: torch.device, tiny: bool) -> dict[str, Callable[[], object]]:
    """Import two lists of modules."""
    code = "import importlib.util as u; assert all(map(u.find_spec, '{}'.split(', ')))" if tiny else "import {}"
    return {f"import {one}": partial(python, "-c", code.format(one)) for one in (ours, others)}


def show(device: torch.device, tiny: bool) -> dict[str, Callable[[], object]]:
    """`show` of a recipe, and Python with PyYAML."""
    return {
        "show smoke/image": partial(python, "-m", "effsam3", "show", "smoke/image"),
        "import yaml": partial(python, "-c", "import yaml"),
    }


def first_step(device: torch.device, tiny: bool) -> dict[str, Callable[[], object]]:
    """One step of smoke/image with its data drawn, its validation and its checkpoint; next to its libraries alone.

    The third side is the part of these libraries that such a step cannot go without.
    """

    verb = "show" if tiny else "train"  # which tells at least whether the recipe has these keys

    def ours() -> None:
        folder = tempfile.mkdtemp(prefix="effsam3-benchmark-")
        place = ("train.runs=" + folder, f"data.index={folder}/index.parquet", f"embed.to={folder}/teacher")
        steps = ("teacher=online", "train.steps=1", "optim.warmup_steps=0")
        python("-m", "effsam3", verb, "smoke/image", *place, *steps, *SMALL)
        shutil.rmtree(folder)

    return {
        "a first step": ours,
        "import torch, transformers": partial(python, "-c", "pass" if tiny else "import torch, transformers"),
        "and SAM 3's classes, timm": partial(python, "-c", "pass" if tiny else FLOOR),
    }
