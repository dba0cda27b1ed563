# SPDX-License-Identifier: Apache-2.0
"""`effsam3 train RECIPE --debug`: a few steps of a recipe as it is, with a validation, a checkpoint and many words."""

from __future__ import annotations

import resource
import shutil
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from effsam3.errors import UserError
from effsam3.files import write_json
from effsam3.recipe.common import StageRecipe
from effsam3.training.optimizer_state import trained, zero_stage
from effsam3.training.resume import AUTO

STEPS, HELD_OUT = 4, 8
# The batch stays: it decides the memory, and whether BatchNorm and the learning rate work.
CHANGES = {
    "train.epochs": None,
    "train.steps": STEPS,
    "optim.warmup_epochs": None,
    "optim.warmup_steps": 1,
    "train.log_every": 1,
    "train.eval_every": STEPS // 2,
    "train.save_every": STEPS // 2,
    "train.eval_samples": HELD_OUT,
    "train.patience": 0,
    "train.loggers": (),
    "data.workers": 0,  # an error in a data set is then raised where it happens
}
MARK = "debug.json"  # in a folder that the next debug run may replace


def debug_recipe(recipe: StageRecipe, resume: str) -> StageRecipe:
    """Return the recipe of a debug run, whose folder has a name of its own.

    Raises:
        UserError: it is asked to resume.
    """
    if resume != AUTO:
        raise UserError("--debug starts fresh each time; leave --resume out")
    for key, value in CHANGES.items():
        recipe = recipe.changed(key, value)
    return replace(recipe, name=f"{recipe.name}-debug")


def replace_folder(folder: Path) -> None:
    """Make the folder of a debug run, in place of an earlier one's.

    Raises:
        UserError: what is there was not made by a debug run.
    """
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"--debug would replace {folder}, which is no debug run; move it, or choose another name")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / MARK, CHANGES)


class Detail:
    """What a debug run prints after every step: how the gradient divides among modules, and the memory."""

    def __init__(self, accelerator: Accelerator, student: nn.Module, optimizer: Any):
        """`student` and `optimizer` are what `accelerator.prepare` has returned."""
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(student)
        self.squares: dict[str, float] = {}  # norms of the gradient, by module
        if zero_stage(accelerator):
            engine: Any = student
            # DeepSpeed's backward takes the step as well, and the gradient is gone after it.
            step = engine.step

            def look_and_step(*arguments):
                self.look()
                step(*arguments)

            engine.step = look_and_step
        else:
            optimizer.optimizer.register_step_pre_hook(lambda *_: self.look())

    def look(self) -> None:
        """Add up each module's gradient; called by all ranks right before a step is taken."""
        self.squares = {}
        parameters = trained(self.model)
        # Below what all have in common: an adapter's parameters are inside of what wraps the model.
        depth = len(commonprefix([name.split(".")[:-1] for name, _ in parameters]))
        for name, parameter in parameters:
            if zero_stage(self.accelerator):
                from deepspeed.utils import safe_get_full_grad

                gradient = safe_get_full_grad(parameter)
            else:
                gradient = parameter.grad
            module = name.split(".")[depth]
            square = 0.0 if gradient is None else gradient.double().square().sum().item()
            self.squares[module] = self.squares.get(module, 0.0) + square

    def line(self, grad_norm: Any) -> str:
        """Return the line of a step; `grad_norm` is that of the whole gradient before clipping, None if unknown."""
        squares, self.squares = self.squares, {}  # none of a step that fp16 has skipped
        # By shares, because what was looked at may be clipped, or multiplied by the loss scale.
        whole = sum(squares.values()) or 1.0
        parts = [f"{name} {float(grad_norm or 1) * (square / whole) ** 0.5:.3g}" for name, square in squares.items()]
        memory = f"peak memory {peak_gib(self.accelerator.device):.2f} GiB"
        return f"gradient by module: {', '.join(parts) or 'skipped'}; {memory}"


def peak_gib(device: torch.device) -> float:
    """Return the most memory that this process has held so far: on the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
