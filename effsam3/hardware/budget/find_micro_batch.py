# SPDX-License-Identifier: Apache-2.0
"""Finds the largest micro-batch that a GPU holds, by trying: `train.find_micro_batch`.

The search knows no model, the trial no search. A trial leaves the student as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effsam3.errors import UserError
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.hardware.budget.estimates import FP32, micro_batches, running_hardware, states
from effsam3.recipe.derived import accumulation
from effsam3.recipe.reader import load_recipe

LOOKED_AT = 8  # micro-batches; of these the heaviest sample is tried, repeated


def find(candidates: Sequence[int], trial: Callable[[int], bool]) -> int:
    """Return the largest candidate for which `trial` returns true and does not run out of memory.

    `candidates` ascend; what a candidate does not hold, no larger one does.

    Raises:
        UserError: not even the smallest fits.
    """
    low, high = 0, len(candidates)  # all below low fit, none from high on does
    while low < high:
        middle = (low + high) // 2
        try:
            fits = trial(candidates[middle])
        except torch.OutOfMemoryError:
            fits = False
        low, high = (middle + 1, high) if fits else (low, middle)
    if low == 0:
        raise UserError(
            f"train.find_micro_batch: not even micro_batch_size={candidates[0]} fits this device; `effsam3 show "
            "RECIPE --budget` says what takes the memory and what to change"
        )
    return candidates[low - 1]


def repeated(batch: dict[str, Any], sample: int, times: int) -> dict[str, Any]:
    """Return a batch that holds one sample of another so many times; tensors and lists are by sample."""
    return {
        name: value[sample : sample + 1].expand(times, *value.shape[1:]).clone()
        if isinstance(value, Tensor)
        else (value[sample : sample + 1] * times if len(value) else value)
        for name, value in batch.items()
    }


def heaviest(batches: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Return the batch with the longest texts or the most objects in a clip, and the number of that sample."""

    def weight(batch: dict[str, Any], sample: int) -> int:
        return int(batch["valid"][sample].sum()) if "valid" in batch else batch[_first(batch)][sample].numel()

    pairs = [(batch, sample) for batch in batches for sample in range(len(batch[_first(batch)]))]
    return max(pairs, key=lambda pair: weight(*pair))


def _first(batch: dict[str, Any]) -> str:
    return "ids" if "ids" in batch else "pixels"


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


class Trial:
    """One micro-batch forward and backward, next to as much memory as gradients and optimizer will take."""

    def __init__(self, stage, batch: dict[str, Any], sample: int, reserved: int):
        """`reserved` bytes are held while it runs."""
        self.stage, self.batch, self.sample, self.reserved = stage, batch, sample, reserved

    def __call__(self, size: int) -> bool:
        """Try a micro-batch of so many samples.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        stage = self.stage
        try:
            with untouched(stage.student, stage.device):
                held = torch.empty(self.reserved, dtype=torch.uint8, device=stage.device)
                batch = repeated(self.batch, self.sample, size)
                # accelerate's own autocast begins with `prepare` under DeepSpeed; this is the same one.
                with frozen_autocast(stage.accelerator, stage.recipe.train.precision):
                    loss = stage.loss(stage.student.train(), batch)["loss"]
                loss.backward()
                del held, loss
        finally:
            if stage.device.type == "cuda":
                torch.cuda.empty_cache()
        return True


def kept(recipe: Any, folder: Path) -> Any:
    """Return the recipe with the micro-batch that a run in `folder` has found before: it resumes with that one."""
    file = folder / "recipe.yaml"
    if not recipe.train.find_micro_batch or not (folder / "checkpoints").is_dir() or not file.is_file():
        return recipe
    return with_micro_batch(recipe, load_recipe(file).train.micro_batch_size)


def with_micro_batch(recipe: Any, size: int) -> Any:
    """Return the recipe with another micro-batch."""
    return replace(recipe, train=replace(recipe.train, micro_batch_size=size))


def run(recipe: Any, stage, accelerator, report) -> Any:
    """Return the recipe with the largest micro-batch that fits every rank; stage and accelerator are set to it.

    Called between building the stage and `accelerator.prepare`. All ranks take the smallest of what they found.

    Raises:
        UserError: there is no GPU, or nothing fits.
    """
    if accelerator.device.type != "cuda":
        raise UserError(
            "train.find_micro_batch: a CPU's memory has no limit that could be tried; set "
            f"train.find_micro_batch=false and train.micro_batch_size (it is {recipe.train.micro_batch_size})"
        )
    batch, sample = heaviest(list(islice(stage.train_batches(0, LOOKED_AT), LOOKED_AT)))
    trained = sum(parameter.numel() for parameter in stage.student.parameters() if parameter.requires_grad)
    taken, _ = states(running_hardware(accelerator, recipe.hardware), trained)
    average = FP32 * trained if recipe.train.ema else 0
    # The weights stand on the device already, and the trial's backward makes gradients.
    trial = Trial(stage, batch, sample, max(sum(taken.values()) + average - 2 * FP32 * trained, 0))
    mine = find(micro_batches(recipe, accelerator.num_processes), trial)
    found = int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).min())
    torch.cuda.reset_peak_memory_stats()  # the run reports its own
    return take(recipe, found, stage, accelerator, report)


def take(recipe: Any, found: int, stage, accelerator, report) -> Any:
    """Return the recipe with the micro-batch that was found; set stage and accelerator to it and say so."""
    recipe = with_micro_batch(recipe, found)
    stage.recipe = recipe
    micros = accumulation(recipe, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = micros
    if accelerator.state.deepspeed_plugin is not None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = found, micros
    report.say(f"found    train.micro_batch_size={found}, {micros} accumulated; recipe.yaml keeps it")
    norms = sorted({type(part).__name__ for part in stage.student.modules() if has_batch_statistics(part)})
    if norms:
        report.say(
            f"WARNING  this student has {', '.join(norms)}: it normalises by its micro-batch, so on another device, "
            f"where another size is found, it learns otherwise. To repeat this run set train.micro_batch_size={found} "
            "and train.find_micro_batch=false"
        )
    return recipe


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether what a module puts out for a sample depends on the others in training."""
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
