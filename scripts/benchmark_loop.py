# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `benchmark.py` that are about a step of training, and about scoring masks."""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from effsam3 import stages, train
from effsam3.benchmarks.jaccard import TOLERANCE, SavScorer, boundary
from effsam3.losses.features import feature_loss, mean_over_images, mse_per_position
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

    @classmethod
    def from_shapes(cls, recipe, place) -> NextToNothing:
        return cls(recipe, place)

    def example(self, samples: int) -> dict:
        return {}

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
    hardware = "gpu" if device.type == "cuda" else "cpu"
    sizes = [f"train.global_batch_size={4 * MICROS}", "train.micro_batch_size=4", f"train.steps={steps}"]
    rare = [f"train.{name}={steps}" for name in ("eval_every", "save_every")]
    others = [
        f"hardware={hardware}",
        f"train.runs={folder}",
        "train.epochs=null",
        "data.workers=0",
        "optim.warmup_steps=1",
    ]
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


def masked_loss(device: torch.device, tiny: bool) -> Sides:
    """The loss on features of SAM 3's trunk and its gradient, of two images, and the same by torch's own functions.

    The third side is ours as `train.compile` has it; its first round compiles.
    """
    shape = (2, 8, 4, 4) if tiny else (2, 1024, 72, 72)
    pred = torch.randn(shape, device=device, requires_grad=True)
    target = pred.detach() + torch.randn(shape, device=device)
    valid = torch.ones(2, 1, *shape[2:], device=device)

    def plain() -> dict[str, torch.Tensor]:
        distance = 1 - F.cosine_similarity(pred, target, dim=1)
        error = mse_per_position(pred, target, "mean")
        return {"mse": mean_over_images(error, valid), "cosine": mean_over_images(distance, valid)}

    def gradient(loss: Callable[[], dict[str, torch.Tensor]]) -> None:
        pred.grad = None
        sum(loss().values()).backward()

    compiled = torch.compile(feature_loss, fullgraph=True)
    sides = {
        "one formula": lambda: gradient(lambda: feature_loss(pred, target, valid, "mean")),
        "torch's own": lambda: gradient(plain),
    }
    # Compiling takes longer than all the rest of a trial of the script.
    more = {} if tiny else {"compiled": lambda: gradient(lambda: compiled(pred, target, valid, "mean"))}
    return sides | more


def region_and_boundary(device: torch.device, tiny: bool) -> Sides:
    """J and F of an object on 5 frames of 480 x 854, and the same by dilating the boundaries of whole frames."""
    height, width = (60, 100) if tiny else (480, 854)
    y, x = np.mgrid[:height, :width]
    rng, pairs = np.random.default_rng(0), []
    for _ in range(5):
        (cy, cx), (ry, rx) = rng.uniform(0.3, 0.7, 2) * (height, width), rng.uniform(0.08, 0.25, 2) * height
        truth = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 + 0.3 * np.sin(5 * np.arctan2(y - cy, x - cx))
        pairs.append((np.roll(truth, rng.integers(-6, 7, 2), (0, 1)), truth))
    radius = math.ceil(TOLERANCE * math.hypot(height, width))

    def ours() -> list[tuple[float, float]]:
        scorer = SavScorer("video")
        for predicted, truth in pairs:
            scorer.add({1: truth}, {1: predicted})
        return [(frame.J, frame.F) for frame in scorer.frames[1]]

    def dilated(edge: np.ndarray) -> np.ndarray:
        sums = np.cumsum(np.pad(edge, ((radius, radius), (radius + 1, radius))), axis=1, dtype=np.int32)
        found = np.zeros_like(edge)
        for shift in range(-radius, radius + 1):
            half, rows = math.isqrt(radius**2 - shift**2), sums[radius + shift : radius + shift + height]
            start, end = radius - half, radius + half + 1
            found |= rows[:, end : end + width] > rows[:, start : start + width]
        return found

    def naive() -> list[tuple[float, float]]:
        found = []
        for predicted, truth in pairs:
            own, other = boundary(predicted), boundary(truth)
            precision, recall = (own & dilated(other)).sum() / own.sum(), (other & dilated(own)).sum() / other.sum()
            j = (predicted & truth).sum() / (predicted | truth).sum()
            found.append((j, 2 * precision * recall / (precision + recall) if precision + recall else 0.0))
        return found

    assert ours() == naive()
    return {"objects": ours, "whole frames": naive}
