# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `benchmark.py` that are about a step of training."""

from __future__ import annotations

import atexit
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from effsam3 import stages, train
from effsam3.recipe.reader import load_recipe
from effsam3.stages.base import StageBase

Sides = dict[str, Callable[[], object]]
MICROS = 2  # micro-batches of a step


class Numbers:
    """Samples without contents."""

    def __len__(self) -> int:
        return 64

    def __getitems__(self, positions: list[int]) -> dict:
        return {"unreadable": []}


class EightNumbers(nn.Module):
    """The smallest student."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self) -> torch.Tensor:
        return self.weight.square().sum()


class NextToNothing(StageBase):
    """A stage whose student takes no time, so that what is left is the loop."""

    frozen: tuple[nn.Module, ...] = ()
    facts: dict = {}

    def __init__(self, recipe, place):
        super().__init__(recipe, place)
        self.student, self.student_parameters = EightNumbers(), 8
        self.train_data = self.val_data = Numbers()

    @classmethod
    def from_recipe(cls, recipe, report, accelerator) -> NextToNothing:
        return cls(recipe, accelerator)

    def describe(self) -> dict[str, str]:
        return {}

    def samples(self, batch: dict) -> list[str]:
        return []

    def loss(self, student: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        loss = student()
        return {"loss": loss, "square": loss.detach()}

    def validate(self, student: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        return {name: torch.ones(()) for name in ("cosine", "cosine_centred", "mse", "cosine_of_mean", "positions")}

    def conclude(self, start, best) -> str:
        return ""


def loop_step(device: torch.device, tiny: bool) -> Sides:
    """The loop around a student of eight numbers, 1,000 steps of two micro-batches, and the same in plain torch.

    Half a second of ours is setting up and ending the run.
    """
    steps = 4 if tiny else 1000
    folder = tempfile.mkdtemp(prefix="effsam3-benchmark-")
    atexit.register(shutil.rmtree, folder)
    hardware = "single" if device.type == "cuda" else "cpu"
    sizes = [f"train.global_batch_size={4 * MICROS}", "train.micro_batch_size=4", f"train.steps={steps}"]
    rare = [f"train.{name}={steps}" for name in ("eval_every", "save_every")]
    others = [f"hardware={hardware}", f"train.runs={folder}", "train.epochs=null", "data.workers=0"]
    recipe = load_recipe("smoke/image", [*sizes, *rare, *others])

    def ours() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        shutil.rmtree(recipe.folder, ignore_errors=True)
        module = SimpleNamespace(STAGE=NextToNothing)
        with patch.object(stages, "training", lambda stage: module), contextlib.redirect_stdout(io.StringIO()):
            train.run(recipe, resume="never")

    def bare() -> None:
        student = EightNumbers().to(device)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for _ in range(steps):
            for _ in range(MICROS):
                (student() / MICROS).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return {"our loop": ours, "plain torch": bare}
