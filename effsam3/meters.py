# SPDX-License-Identifier: Apache-2.0
"""What the loop counts between two reports: losses, speed, waiting, and images that could not be read."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch


class Window:
    """Sums up the steps since the last report."""

    def __init__(self, accelerator, global_batch: int):
        self.accelerator, self.global_batch = accelerator, global_batch
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.micros, self.waited, self.started = 0, 0.0, time.perf_counter()

    def wait_for(self, batches) -> dict:
        """Take the next batch and count how long that takes."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's losses, without waiting for the device."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.micros += 1

    def close(self, lr: float, grad_norm) -> dict[str, float]:
        """Return the window's means over all ranks and its speed, and begin the next window."""
        names = list(self.sums)
        means = self.accelerator.reduce(
            torch.stack([self.sums[name] for name in names]) / self.micros, "mean"
        ).tolist()
        seconds = time.perf_counter() - self.started
        samples = self.micros / self.accelerator.gradient_accumulation_steps * self.global_batch
        values = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        values |= {"train/lr": lr, "perf/samples_per_s": samples / seconds, "perf/data_wait": self.waited / seconds}
        if grad_norm is not None:  # DeepSpeed keeps it to itself at stage 0
            values["train/grad_norm"] = float(grad_norm)
        if self.accelerator.device.type == "cuda":
            values["perf/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._reset()
        return values


class Unreadable:
    """The images that this rank could not read, each counted once and named in unreadable.jsonl."""

    def __init__(self, folder: Path):
        self.path, self.keys = folder / "unreadable.jsonl", set()

    def note(self, batch: dict, step: int) -> None:
        """Count and name those of a batch."""
        for key, reason in batch["unreadable"]:
            if key not in self.keys:
                self.keys.add(key)
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": step, "key": key, "reason": reason}) + "\n")


def step_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One fixed-width console line."""
    shown = {name.removeprefix("train/"): value for name, value in values.items() if name.startswith("train/")}
    lr, grad_norm = shown.pop("lr"), shown.pop("grad_norm", math.nan)
    losses = "  ".join(f"{name} {value:8.4f}" for name, value in shown.items())
    speed, waited = values["perf/samples_per_s"], values["perf/data_wait"]
    return f"step {step:>6}/{steps}  {losses}  lr {lr:.1e}  grad {grad_norm:7.3f}  {speed:7.1f}/s  wait {waited:4.0%}"


def line_of(values: dict[str, float]) -> str:
    """Validation numbers in one line."""
    return "  ".join(f"{name.split('/')[-1]} {value:.4f}" for name, value in values.items())
