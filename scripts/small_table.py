# SPDX-License-Identifier: Apache-2.0
"""What whole models take at full size: parameters, operations and CPU time of each use, the tables of docs/small.md.

    python scripts/small_table.py [--rounds 3] [--models RV-M ...]

Weights are random: neither operations nor times depend on them. Times are CPU seconds on one thread, each the median
of as many rounds. SAM 3's trunk alone takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effsam3.benchmarks.flops import config_of, full_memory, part_gflop
from effsam3.models.chassis.classes import empty_model, model_class
from effsam3.models.chassis.tensors import TRACKER_NECK, TRUNK
from effsam3.models.exporting.flow import TRACED, flow
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.parts import parts_of
from effsam3.models.flops import USES
from effsam3.models.inference.concepts import encode_geometry_always
from effsam3.models.memory.slot import TRACKER
from effsam3.models.merging.slots import SLOTS
from effsam3.models.registry import named
from effsam3.recipe.reader import load_recipe
from effsam3.training.report import table

TEXT = "stage1/text/es_mc_s"
MODELS: dict[str, tuple[str, ...]] = {  # recipes of the parts; the rest is SAM 3's
    "SAM 3": (),
    "RV-M": ("stage1/vision/es_rv_m", TEXT, "stage2/memory"),
    "RV-M, two layers": ("stage1/vision/es_rv_m", TEXT, "stage2/memory_two_layers"),
    "EV-S, two layers": ("stage1/vision/es_ev_s", TEXT, "stage2/memory_two_layers"),
}
WITHOUT_WORDS = (TRUNK, TRACKER_NECK, TRACKER)  # what boxes and videos without words take


def whole(chassis: str, recipes: Sequence[str]) -> Any:
    """Return the config of a SAM 3 with the parts that these recipes make."""
    config = named(chassis).config()
    for name in recipes:
        recipe = load_recipe(name, [f"sam3.checkpoint={chassis}"])
        slot = SLOTS[recipe.stage]
        config = slot.install(config, slot.config_of(config_of(recipe)))
    return config


def seconds(config: Any, rounds: int) -> dict[str, float]:
    """Time every part on one image, phrase, shown object and tracked frame: {part: CPU seconds}."""
    model: Any = model_class(config.model_type)(config).eval().requires_grad_(False)
    encode_geometry_always(model.detector_model)
    parts = parts_of(model) + memory_parts(model)
    lengths = dict.fromkeys(TRACED, 1) | full_memory(config.tracker_config)
    taken: dict[str, list[float]] = {part.name: [] for part in parts}
    for _ in range(rounds):
        before = time.process_time()
        for example in flow(parts, lengths):
            taken[example.part.name].append(time.process_time() - before)
            before = time.process_time()
    return {name: statistics.median(each) for name, each in taken.items()}


def counts(config: Any) -> list[str]:
    """Return the parameters of the model, all and without words, and what each of `USES` takes, as cells."""
    sizes = {name: parameter.numel() for name, parameter in empty_model(config).named_parameters()}
    of_videos = sum(size for name, size in sizes.items() if name.startswith(WITHOUT_WORDS))
    millions = [f"{count / 1e6:,.2f}" for count in (sum(sizes.values()), of_videos)]
    return millions + by_use(part_gflop(config), 1)


def by_use(parts: Mapping[str, float], places: int) -> list[str]:
    """Return what each of `USES` takes, as cells."""
    return [f"{sum(parts[part] for part in names):,.{places}f}" for names in USES.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--rounds", type=int, default=0, help="0: count, and time nothing")
    parser.add_argument("--chassis", default="random", help="tiny: a test of the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counted, timed = [], []
    for name in arguments.models:
        config = whole(arguments.chassis, MODELS[name])
        counted.append([name, *counts(config)])
        if arguments.rounds:
            timed.append([name, *by_use(seconds(config, arguments.rounds), 2)])
    print(table(counted, ["model", "M parameters", "without words", *(f"GFLOP, {use}" for use in USES)]))
    if timed:
        print("\n" + table(timed, ["model", *(f"CPU s, {use}" for use in USES)]))


if __name__ == "__main__":
    main()
