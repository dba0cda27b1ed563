# SPDX-License-Identifier: Apache-2.0
"""Finds the largest micro-batch that a GPU holds, by trying: `train.find_micro_batch`.

The search knows no model, the trial no search. A trial leaves the student as it was.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from effsam3.errors import UserError
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.hardware.budget.estimates import FP32, MICRO_BATCH, micro_batches, running_hardware, states
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.derived import accumulation
from effsam3.recipe.reader import load_recipe
from effsam3.stages.protocol import Stage
from effsam3.training.report import Report


def find(candidates: Sequence[int], trial: Callable[[int], bool]) -> int:
    """Return the largest candidate for which `trial` returns true and does not run out of memory.

    `candidates` ascend; if one does not fit, no larger one does.

    Raises:
        UserError: not even the smallest fits.
    """

    def is_too_large(size: int) -> bool:
        try:
            return not trial(size)
        except torch.OutOfMemoryError:
            return True

    fitting = bisect_left(candidates, True, key=is_too_large)
    if fitting == 0:
        raise UserError(
            f"train.find_micro_batch: not even micro_batch_size={candidates[0]} fits this device; `effsam3 show "
            "RECIPE --budget` shows what takes the memory and what to change"
        )
    return candidates[fitting - 1]


@contextmanager
def untouched(student: nn.Module, device: torch.device):
    """Give back buffers, gradients, mode and random numbers as they were; weights are not changed by a loss."""
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    gradients = [(parameter, parameter.grad) for parameter in student.parameters()]
    training = student.training
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        student.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for name, buffer in student.named_buffers():
            buffer.copy_(buffers[name])


def trial(stage: Stage, device: torch.device, precision: str, reserved: int, size: int) -> bool:
    """Take a micro-batch of `size` samples forward and backward; the student stays as it was.

    Its samples are as large as they can be and hold zeros: what fits now fits in every step. `reserved` bytes are held
    meanwhile, as gradients and optimizer will hold them.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    try:
        with untouched(stage.student, device):
            # Held during the trial: optimizer state and averaged weights come later and must fit as well.
            held = torch.empty(reserved, dtype=torch.uint8, device=device)
            batch = {
                name: torch.zeros_like(value, device="cpu") if getattr(value, "is_meta", False) else value
                for name, value in stage.example(size).items()
            }
            # accelerate's own autocast begins with `prepare` under DeepSpeed; this is the same one.
            with frozen_autocast(device, precision):
                loss = stage.loss(stage.student.train(), batch)["loss"]
            loss.backward()
            del held, loss
    finally:
        if device.type == "cuda":
            # Cached blocks of a failed trial would fragment the next one.
            torch.cuda.empty_cache()
    return True


def kept(recipe: StageRecipe, folder: Path) -> StageRecipe:
    """Return the recipe with the micro-batch that a run in `folder` has found before: it resumes with that one."""
    file = folder / "recipe.yaml"
    if not recipe.train.find_micro_batch or not (folder / "checkpoints").is_dir() or not file.is_file():
        return recipe
    return recipe.changed(MICRO_BATCH, load_recipe(file).train.micro_batch_size)


def run(recipe: StageRecipe, stage: Stage, accelerator: Accelerator, report: Report) -> StageRecipe:
    """Return the recipe with the largest micro-batch that fits every rank: the smallest of what the ranks have found.

    Collective. Called between building the stage and `accelerator.prepare`; it brings the student to the device.

    Raises:
        UserError: there is no GPU, or nothing fits.
    """
    if accelerator.device.type != "cuda":
        raise UserError(
            "train.find_micro_batch: a CPU's memory has no limit that could be tried; set "
            f"train.find_micro_batch=false and train.micro_batch_size (it is {recipe.train.micro_batch_size})"
        )
    trained = sum(parameter.numel() for parameter in stage.student.parameters() if parameter.requires_grad)
    taken, _ = states(running_hardware(accelerator, recipe.hardware), trained)
    average = FP32 * trained if recipe.train.ema else 0
    stage.student.to(accelerator.device)
    # Without the weights, which are there, and the gradients, which the trial's backward makes.
    reserved = max(sum(taken.values()) + average - 2 * FP32 * trained, 0)
    attempt = partial(trial, stage, accelerator.device, recipe.train.precision, reserved)
    mine = find(micro_batches(recipe, accelerator.num_processes), attempt)
    # The smallest, because all ranks take equal micro-batches, and one device may have less free memory.
    found = int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).min())
    torch.cuda.reset_peak_memory_stats()  # the run reports its own
    micros = accumulation(recipe.changed(MICRO_BATCH, found), accelerator.num_processes)
    report.say(f"found    {MICRO_BATCH}={found}, {micros} accumulated; recipe.yaml keeps it")
    if warning := warning_of(stage.student, found):
        report.say(warning)
    return recipe.changed(MICRO_BATCH, found)


def warning_of(student: nn.Module, found: int) -> str:
    """Return what to know of a student that learns otherwise with another micro-batch than the one found, or ""."""
    whole_batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = sorted({type(part).__name__ for part in student.modules() if isinstance(part, whole_batch)})
    if not norms:
        return ""
    return (
        f"WARNING  this student has {', '.join(norms)}: it normalises by its micro-batch, so on another device, "
        f"where another size is found, the learning changes. To repeat this run set {MICRO_BATCH}={found} and "
        "train.find_micro_batch=false"
    )
