# SPDX-License-Identifier: Apache-2.0
"""What a recipe takes of a device's memory and of the disk, before anything is loaded, and what to change if too much.

A micro-batch's share is measured by a dry run of the stage's loss. What the hardware keeps of weights, gradients and
optimizer is counted as torch and DeepSpeed allocate it.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar

import torch
from accelerate import Accelerator

from effsam3.errors import UserError
from effsam3.hardware.accelerate_configs import REDUCE_BUCKET, config_file, read_config
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.reader import flat

Found = TypeVar("Found")
GIB = 1 << 30
FP32 = 4  # bytes; weights, gradients and optimizer state are float32 in every precision
MICRO_BATCH = "train.micro_batch_size"
LIBRARIES = GIB  # the CUDA context, workspaces of cuBLAS (64 MiB on an H200), NCCL's own buffers
FREE = 0.1  # share of a device that fragmentation and kernels' workspaces may take
DEVICES = {24: "RTX 4090, A10", 40: "A100 40 GB", 48: "L40S", 80: "A100, H100", 141: "H200", 180: "B200"}
LESS = {"ddp": "zero2", "zero1": "zero2", "zero2": "zero3", "zero3": "zero3_offload"}  # what divides more


# ---- sizes, and what they run on


@dataclass(frozen=True)
class Sizes:
    """What a recipe takes on any hardware."""

    trained: int  # parameters
    frozen: int  # bytes
    micro_batch: int  # bytes
    flops: (
        float  # of one sample, forward and backward: at most, for texts of full length and as many objects as allowed
    )


def measure(recipe: StageRecipe) -> Sizes:
    """Return the sizes of a recipe: a few seconds for an image or text student, up to a minute for the memory.

    Raises:
        UserError: the sizes of the recipe's SAM 3 are not known.
    """
    from effsam3.hardware.budget.dry_run import cost, dry_stage  # with torch.fx: only where something is measured

    whole = recipe.train.micro_batch_size
    # Separate samples cost alike: one of them, times the batch, is measured in a fraction of the time.
    samples = 1 if recipe.samples_are_separate else whole
    dry = dry_stage(recipe, samples)
    student = dry.stage.student
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    frozen = {
        id(tensor): tensor.nbytes
        for module in (student, *dry.stage.frozen)
        for tensor in (*module.parameters(), *module.buffers())
        if not tensor.requires_grad
    }
    found = cost(dry)
    return Sizes(trained, sum(frozen.values()), whole // samples * found.peak, found.flops / samples)


def resized(recipe: StageRecipe, sizes: Sizes, micro_batch: int) -> tuple[StageRecipe, Sizes]:
    """Return the recipe and its sizes with another micro-batch; only what is not proportional is measured again."""
    other = recipe.changed(MICRO_BATCH, micro_batch)
    if not recipe.samples_are_separate:
        return other, measure(other)
    return other, replace(sizes, micro_batch=sizes.micro_batch * micro_batch // recipe.train.micro_batch_size)


@dataclass(frozen=True)
class Hardware:
    """What an accelerate_configs/<name>.yaml does with a student."""

    name: str
    processes: int
    zero_stage: int | None  # None: without DeepSpeed
    offloads: bool  # optimizer state to main memory
    offloads_weights: bool

    @property
    def has_gpu(self) -> bool:
        """Whether it is one of GPUs."""
        return self.name != "cpu" and not self.name.endswith("_cpu")


def read_hardware(hardware: str) -> Hardware:
    """Read an accelerate config.

    Raises:
        UserError: there is no such hardware.
    """
    config = read_config(hardware)
    kept = [config.deepspeed.get(f"offload_{part}_device", "none") != "none" for part in ("optimizer", "param")]
    stage = config.deepspeed.get("zero_stage")
    return Hardware(hardware, config.processes, None if stage is None else int(stage), *kept)


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for: on one device, in main memory for one process, on the disk."""

    device: dict[str, int]
    host: int
    checkpoint: int
    checkpoints: int

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.device.values())


def states(hardware: Hardware, trained: int) -> tuple[dict[str, int], int]:
    """Return the bytes of weights, gradients and optimizer on one device, and of what is offloaded per process.

    ZeRO keeps another float32 copy of its part of the weights, although they are float32 already: counted in
    DeepSpeed 0.19 with torch_autocast, stage by stage.
    """
    P = trained * FP32
    # DeepSpeed pads the parts to equal sizes.
    part = -(-P // hardware.processes)
    if hardware.zero_stage is None:
        copies = P if hardware.processes > 1 else 0  # DDP sends copies of the gradients
        return {"weights": P, "gradients": P + copies, "optimizer": 2 * P}, 0
    divided = {"weights": P, "gradients": part if hardware.zero_stage > 1 else P, "optimizer": 3 * part}
    divided["ZeRO's buckets"] = REDUCE_BUCKET * FP32
    if hardware.zero_stage == 3:  # gathers on demand; assume the worst case, all at once
        divided["weights"] += 0 if hardware.offloads_weights else part
    if not hardware.offloads:
        return divided, 0
    moved = divided.pop("optimizer") + part + (part if hardware.offloads_weights else 0)
    return divided | {"gradients": divided["gradients"] if hardware.zero_stage < 2 else 0}, moved


def checkpoint_bytes(recipe: StageRecipe, trained: int) -> int:
    """Return the bytes of a checkpoint: weights and two moments whole, on any hardware; averaged weights."""
    return (4 if recipe.train.ema else 3) * trained * FP32


def estimate(recipe: StageRecipe, sizes: Sizes, hardware: Hardware | None = None) -> Estimate:
    """Return what a recipe takes on its hardware, or on other hardware."""
    hardware = hardware or read_hardware(recipe.hardware)
    device, host = states(hardware, sizes.trained)
    P, train = sizes.trained * FP32, recipe.train
    if train.ema:
        device["averaged weights"] = P
    device["frozen parts"] = sizes.frozen
    device["micro-batch"] = sizes.micro_batch
    device["CUDA, NCCL"] = LIBRARIES if hardware.has_gpu else 0
    checkpoint = checkpoint_bytes(recipe, sizes.trained)
    kept = checkpoint * train.keep_checkpoints + P * train.keep_best  # of the best ones, only the weights
    return Estimate({name: size for name, size in device.items() if size}, host, checkpoint, kept)


# ---- output


def device_bytes(device_gib: float | None = None) -> int | None:
    """Return a device's memory: the one named, else that of this machine's first GPU, None without either."""
    if device_gib is not None:
        return int(device_gib * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def fits(total: int, device: int) -> bool:
    """Return whether an estimate fits a device with room for fragmentation."""
    return total <= device * (1 - FREE)


def micro_batches(recipe: StageRecipe, processes: int) -> list[int]:
    """Return the micro-batches that divide the global batch exactly on these processes, smallest first."""
    share = recipe.train.global_batch_size // processes
    return [size for size in range(1, share + 1) if share % size == 0]


def largest_micro_batch(recipe: StageRecipe, sizes: Sizes, device: int) -> tuple[str, int] | None:
    """Return the change to the largest smaller micro-batch that fits and what is taken then, None if none fits."""
    hardware = read_hardware(recipe.hardware)
    smaller = [size for size in micro_batches(recipe, hardware.processes) if size < recipe.train.micro_batch_size]
    total = cache(lambda size: estimate(*resized(recipe, sizes, size), hardware).total)
    # Bisected, since every size that is not proportional is a dry run of its own.
    fitting = bisect_left(smaller, True, key=lambda size: not fits(total(size), device))
    return (f"{MICRO_BATCH}={smaller[fitting - 1]}", total(smaller[fitting - 1])) if fitting else None


def other_changes(recipe: StageRecipe, sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Yield (key=value, bytes on a device then) of all but the micro-batch, in the order of the stage's knobs."""
    hardware, values, savings = read_hardware(recipe.hardware), flat(recipe), recipe.savings()
    for key in recipe.knobs:
        if key == "hardware":
            name, folder = recipe.hardware, config_file(recipe.hardware).parent
            # Step by step to what divides more, as far as there is a config for it.
            while (folder / f"{(name := LESS.get(name, ''))}.yaml").is_file():
                yield f"hardware={name}", estimate(recipe, sizes, read_hardware(name)).total
        elif key == "train.ema" and recipe.train.ema:
            yield "train.ema=0", estimate(recipe.changed(key, 0.0), sizes, hardware).total
        elif (saving := savings.get(key)) is not None:
            other = recipe.changed(key, saving.value)
            if saving.proportional:
                then = replace(sizes, micro_batch=sizes.micro_batch * saving.value // values[key])
            else:
                then = measure(other)
            yield f"{key}={json.dumps(saving.value)}", estimate(other, then, hardware).total


def advice(recipe: StageRecipe, sizes: Sizes, device: int, most: int = 2) -> list[str]:
    """Return the cheapest single changes after which the recipe fits, at most `most`, each with what it takes then.

    If no single one is enough, the smallest micro-batch and what else saves most.
    """
    micro = largest_micro_batch(recipe, sizes, device)
    found = [micro] if micro else []
    tried = []
    for change in other_changes(recipe, sizes):
        tried.append(change)
        found += [change] if fits(change[1], device) else []
        if len(found) == most or micro:  # accumulation makes up for the micro-batch: nothing is as cheap
            break
    if found:
        return [f"{text} would take {_gib(total)}" for text, total in found]
    hardware = read_hardware(recipe.hardware)
    tried.append((f"{MICRO_BATCH}=1", estimate(*resized(recipe, sizes, 1), hardware).total))
    least = sorted(tried, key=lambda change: change[1])[:most]
    return [f"{text} would take {_gib(total)}, too much by itself" for text, total in least]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def table(recipe: StageRecipe, device_gib: float | None = None) -> str:
    """Return the recipe's needs: a row for each part on one device, a verdict, the disk.

    Raises:
        UserError: there is no such hardware.
    """
    sizes, hardware = measure(recipe), read_hardware(recipe.hardware)
    found, device = estimate(recipe, sizes, hardware), device_bytes(device_gib)
    on = "device" if hardware.has_gpu else "process"
    lines = [f"device    about {_gib(found.total)} on each {on} of {recipe.hardware}"]
    lines += [f"          {_gib(size):>10}  {name}" for name, size in found.device.items() if size >= 1 << 20]
    if found.host:
        lines.append(f"          {_gib(found.host):>10}  in main memory, for each process")
    if device is not None:
        short = found.total - device * (1 - FREE)
        verdict = f"fits {_gib(device)}" if short <= 0 else f"does not fit {_gib(device)}: {_gib(short)} too much"
        lines.append(f"verdict   {verdict} ({FREE:.0%} left free for fragmentation)")
        lines += [f"          {line}" for line in advice(recipe, sizes, device)] if short > 0 else []
    elif hardware.has_gpu:
        enough = next((size for size in DEVICES if fits(found.total, size * GIB)), None)
        named = f"{enough} GiB ({DEVICES[enough]}) are enough" if enough else "no common device is enough"
        lines.append(f"verdict   {named}; --device-gib N tells whether N are, and what to change")
    lines.append(
        f"disk      about {_gib(found.checkpoint)} for a checkpoint, {_gib(found.checkpoints)} for the "
        f"{recipe.train.keep_checkpoints} that are kept and the weights of the best {recipe.train.keep_best}"
    )
    return "\n".join(lines)


def attempt(estimate: Callable[[StageRecipe], Found], recipe: StageRecipe, otherwise: Found) -> Found:
    """Return an estimate, or `otherwise` where it cannot be made: a dry run must never stop a real one.

    A SAM 3 whose sizes are not known is a UserError, an operation without a fake a RuntimeError.
    """
    try:
        return estimate(recipe)
    except (UserError, RuntimeError):
        return otherwise


def running_hardware(accelerator: Accelerator, hardware: str) -> Hardware:
    """Return the hardware that a run has been started on, whatever its recipe names."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return Hardware(hardware, accelerator.num_processes, None, False, False)
    zero = plugin.deepspeed_config["zero_optimization"]
    offloads = [zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")]
    return Hardware(hardware, accelerator.num_processes, plugin.zero_stage, *offloads)


def header_lines(recipe: StageRecipe, hardware: Hardware, sizes: Sizes) -> dict[str, str]:
    """Return one line for a run's header."""
    found, device = estimate(recipe, sizes, hardware), device_bytes()
    of = "" if device is None else f" of {_gib(device)}"
    largest = sorted(found.device, key=found.device.__getitem__, reverse=True)[:2]
    parts = ", ".join(f"{name} {_gib(found.device[name])}" for name in largest)
    return {"budget": f"about {_gib(found.total)}{of} ({parts}); a checkpoint takes {_gib(found.checkpoint)}"}


def explain_out_of_memory(
    recipe: StageRecipe, error: torch.OutOfMemoryError, device_gib: float | None = None
) -> UserError:
    """Explain an error on a device that was too small: the stage's knobs, and what would help."""
    values, sizes = flat(recipe), measure(recipe)
    total, device = estimate(recipe, sizes).total, device_bytes(device_gib)
    knobs = ", ".join(f"{key}={values[key]}" for key in recipe.knobs)
    # Where the estimate called the device enough, anything smaller may be.
    lines = advice(recipe, sizes, device if device is not None and not fits(total, device) else sys.maxsize)
    return UserError(
        f"the device is out of memory ({str(error).splitlines()[0]})\n"
        f"estimated were about {_gib(total)} a device, {_gib(sizes.micro_batch)} of them for a micro-batch\n"
        f"what decides it: {knobs}\nchange: " + "\n    or: ".join(lines)
    )


@contextmanager
def out_of_memory_explained(recipe: StageRecipe) -> Iterator[None]:
    """Turn a device's lack of memory into an error that names what decides it.

    Raises:
        UserError: the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        unexplained = UserError(f"{error}; lower train.micro_batch_size (it is {recipe.train.micro_batch_size})")
        explain = partial(explain_out_of_memory, error=error)
        raise attempt(explain, recipe, unexplained) from error
