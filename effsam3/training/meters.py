# SPDX-License-Identifier: Apache-2.0
"""What the loop counts between two reports: losses, speed, waiting, and images that could not be read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from effsam3.errors import UserError
from effsam3.training.report import duration

# Dense bfloat16 TFLOP/s that makers state, by a part of the device's name; the first that fits.
PEAK_TFLOPS = {
    "B300": 2250, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "A100": 312,
    "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "V100": 125, "T4": 65,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Return what a device can do at most in bfloat16 (V100, T4: float16), TFLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class Window:
    """Sums up the steps since the last report.

    Args:
        global_batch: samples of a step, over all ranks.
        flops: of training on one sample, frozen parts included; None: unknown.
        per_rank: also report what each rank waited for and used.
    """

    def __init__(
        self, accelerator: Accelerator, global_batch: int, flops: float | None = None, per_rank: bool = False
    ):
        self.accelerator, self.global_batch = accelerator, global_batch
        self.flops, self.per_rank, self.peak = flops, per_rank, peak_tflops(accelerator.device)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.micros, self.waited, self.started = 0, 0.0, time.perf_counter()

    def wait_for(self, batches) -> dict:
        """Take the next batch and count how long that takes."""
        started = time.perf_counter()
        # Only here can training starve: forward, backward and optimizer need nothing from the disk.
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is no training: validation, saving."""
        began = time.perf_counter()
        yield
        # Moving the start takes the pause out of every rate at once.
        self.started += time.perf_counter() - began

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's losses, without waiting for the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.micros += 1

    def close(self, lr: float, grad_norm) -> dict[str, float]:
        """Return the window's means over all ranks and its speed, and begin the next window."""
        names = list(self.sums)
        # One exchange for all losses, and the only wait for the device in a window.
        means = self.accelerator.reduce(
            torch.stack([self.sums[name] for name in names]) / self.micros, "mean"
        ).tolist()
        seconds = time.perf_counter() - self.started
        ranks = self.accelerator.num_processes
        samples = self.micros / self.accelerator.gradient_accumulation_steps * self.global_batch
        values = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        values |= {
            "train/lr": lr,
            "perf/samples_per_s": samples / seconds,
            "perf/samples_per_s_per_device": samples / seconds / ranks,
            "perf/step_s": seconds * self.global_batch / samples,
            "perf/data_wait": self.waited / seconds,
        }
        if self.flops is not None:
            values["perf/tflops_per_device"] = samples / seconds / ranks * self.flops / 1e12
            if self.peak is not None:
                values["perf/mfu"] = values["perf/tflops_per_device"] / self.peak
        if grad_norm is not None:  # DeepSpeed keeps it to itself at stage 0
            values["train/grad_norm"] = float(grad_norm)
        if self.accelerator.device.type == "cuda":
            values["perf/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.per_rank:
            own = {"data_wait": self.waited / seconds, "step_s": seconds / (samples / self.global_batch)}
            own |= {"peak_gib": values["perf/peak_gib"]} if "perf/peak_gib" in values else {}
            # The reduced numbers hide a slow rank, because all ranks wait for it.
            rows = self.accelerator.gather(torch.tensor([list(own.values())], device=self.accelerator.device)).tolist()
            for rank, row in enumerate(rows):
                values |= {f"rank{rank}/{name}": value for name, value in zip(own, row, strict=True)}
        self._reset()
        return values


class Unreadable:
    """The images that this rank could not read, each counted once and named in unreadable.jsonl."""

    def __init__(self, folder: Path):
        self.path = folder / "unreadable.jsonl"
        self.keys: set[str] = set()

    def note(self, batch: dict, step: int) -> None:
        """Count and name those of a batch."""
        for key, reason in batch["unreadable"]:
            # Once a run, however often an epoch meets the file again.
            if key not in self.keys:
                self.keys.add(key)
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": step, "key": key, "reason": reason}) + "\n")

    def refuse(self, count: int, most: int, files: str) -> None:
        """Stop when more `files` are unreadable on all ranks together than the recipe allows.

        Raises:
            UserError: they are.
        """
        if count > most:
            raise UserError(
                f"{count} {files} could not be read, more than data.max_unreadable={most}; {self.path} names them. "
                "Repair them or build the index again"
            )


def step_line(step: int, steps: int, values: dict[str, float], left_s: float) -> str:
    """One console line of fixed width; `left_s` is the time to the end, in seconds."""
    shown = {name.removeprefix("train/"): value for name, value in values.items() if name.startswith("train/")}
    lr, grad_norm, scale = shown.pop("lr"), shown.pop("grad_norm", math.nan), shown.pop("loss_scale", None)
    losses = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"{duration(left_s):>9} left",
        losses,
        f"lr {lr:.1e}",
        f"gradient {grad_norm:.3g}",
        *([] if scale is None else [f"loss scale {scale:g}"]),
        f"{values['perf/step_s']:.3g} s/step",
        f"{values['perf/samples_per_s']:.1f} samples/s",
        *([f"{values['perf/peak_gib']:.1f} GiB"] if "perf/peak_gib" in values else []),
        f"waiting for data {values['perf/data_wait']:.0%}",
    ]
    return "  ".join(parts)


def line_of(values: dict[str, float]) -> str:
    """Validation numbers in one line."""
    return "  ".join(f"{name.split('/')[-1]} {value:.4f}" for name, value in values.items())
