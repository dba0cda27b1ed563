# SPDX-License-Identifier: Apache-2.0
"""Stage 1, vision: the benchmarks of a merged student of trunk and necks, and their tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from effsam3.benchmarks.fidelity import map_fidelity
from effsam3.benchmarks.models import load_map_pair
from effsam3.benchmarks.results import Results
from effsam3.benchmarks.tables import Column, result_table
from effsam3.stages.image.measuring import NEEDS, measure_pair, shared_tables
from effsam3.stages.vision.facts import VisionRecipe

__all__ = ["NEEDS", "measure", "tables"]


def measure(
    recipe: VisionRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Run the recipe's benchmarks on `folder`/merged and on its teacher, a folder that is called `teacher_name`."""
    pair = load_map_pair(chassis, folder / "merged", device)
    measure_pair(recipe, pair, partial(map_fidelity, pair), folder, chassis, teacher_name, results)


FIDELITY: list[Column] = [
    ("cosine", "cosine", "{:.4f}".format),
    ("cosine of the mean", "cosine_of_mean", "{:.4f}".format),
    ("centred cosine", "cosine_centred", "{:.4f}".format),
    ("mse", "mse", "{:.4f}".format),
]


def tables(results: dict[str, dict]) -> list[str]:
    """Return the benchmarks' results as Markdown."""
    parts = []
    if (fidelity := results.get("fidelity")) is not None:
        rows = {"all maps": fidelity} | {name.replace("_", ", "): own for name, own in fidelity["maps"].items()}
        parts.append(result_table(f"maps of both necks, {fidelity['images']} held-out images", rows, FIDELITY))
    return parts + shared_tables(results)
