# SPDX-License-Identifier: Apache-2.0
"""Parameters, latency and throughput of trunk and whole model, teacher and student side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers import Sam3TrackerVideoModel

from effsam3.benchmarks.models import Pair
from effsam3.models.image.teacher import parameter_count
from effsam3.models.inference.prompted import prompted_masks, trunk_of

WARM_UP = 2  # calls of every shape that do not count: for each, kernels are chosen and memory is allocated
ROUNDS = 6  # of which the median counts
BATCH = {"cuda": 16, "cpu": 2}  # images at once for the throughput


def speed(pair: Pair, elements: dict[str, int]) -> dict:
    """Time both models alternately, so that a busy machine slows both.

    Args:
        elements: the size of either whole model (text encoder, detector and tracker included), which is not loaded.

    Returns for `teacher` and `student`: `trunk_parameters`, `model_parameters`, `trunk_ms`, `trunk_images_per_s` (a
    batch of `batch`), `model_ms` and `model_images_per_s` (one image: embed it, segment one box); their ratios; and
    `image_size`, the pixels that either trunk sees (a student's resizing is part of its time).
    """
    models, sides = pair.models, {name: model.config.image_size for name, model in pair.models.items()}
    batch = BATCH[pair.device.type]
    # Noise will do: no model's time depends on what an image shows.
    noise = {side: torch.rand(batch, 3, side, side, device=pair.device) * 2 - 1 for side in sides.values()}

    @torch.no_grad()
    def trunk(model: Sam3TrackerVideoModel, count: int) -> None:
        trunk_of(model)(noise[model.config.image_size][:count])

    def whole(model: Sam3TrackerVideoModel) -> None:
        side = model.config.image_size
        box = torch.tensor([[side / 4, side / 4, side / 2, side / 2]], device=pair.device)
        prompted_masks(model, model.get_image_embeddings(noise[side][:1]), box, None)

    times = {
        "trunk_ms": alternate({name: partial(trunk, model, 1) for name, model in models.items()}, pair.device),
        "batch_ms": alternate({name: partial(trunk, model, batch) for name, model in models.items()}, pair.device),
        "model_ms": alternate({name: partial(whole, model) for name, model in models.items()}, pair.device),
    }
    result = {
        name: {
            "trunk_parameters": parameter_count(trunk_of(model)),
            "model_parameters": elements[name],
            "trunk_ms": times["trunk_ms"][name],
            "model_ms": times["model_ms"][name],
            "model_images_per_s": 1000 / times["model_ms"][name],
            "trunk_images_per_s": batch * 1000 / times["batch_ms"][name],
        }
        for name, model in models.items()
    }
    seen = sides | {"student": pair.seen_size}
    return with_ratio(result) | {"device": device_name(pair.device), "batch": batch, "image_size": seen}


def with_ratio(result: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add `ratio` to the numbers of `teacher` and `student`, above 1 where the student is better."""
    teacher, student = result["teacher"], result["student"]
    return result | {
        "ratio": {
            name: student[name] / teacher[name] if name.endswith("per_s") else teacher[name] / student[name]
            for name in teacher
        }
    }


def device_name(device: torch.device) -> str:
    """Return what a result was measured on."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def alternate(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn."""
    return {name: statistics.median(values) for name, values in in_turn(calls, device).items()}


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn `rounds` times after `warm_up` that do not count.

    A call is one model on one shape: each shape is warmed up by itself.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - started) * 1000)
    return {name: values[warm_up:] for name, values in taken.items()}
