# SPDX-License-Identifier: Apache-2.0
"""One's own videos: the video benchmark of the trained tracker and of the one that it started from."""

from __future__ import annotations

from pathlib import Path

import torch

from effsam3.benchmarks.results import Results
from effsam3.benchmarks.tracking import Showing
from effsam3.benchmarks.vos import add_vos, vos_tables
from effsam3.data.videos.vos import named_by, open_vos
from effsam3.data.videos.vos_video import VosVideo
from effsam3.models.inference.prompted import load_tracker
from effsam3.stages.video.facts import VideoRecipe
from effsam3.stages.video.training import prompt_style, videos_of


def videos_to_measure_on(recipe: VideoRecipe) -> list[VosVideo]:
    """Return the recipe's own choice of videos, or those that training held out."""
    asked = recipe.evaluate
    if asked.videos is None:
        return videos_of(recipe.data)[1]
    with named_by("evaluate.videos", "evaluate.split"):
        return open_vos(asked.videos, split=asked.split)


def videos_to_track(recipe: VideoRecipe) -> None:
    """The videos to measure on."""
    if recipe.evaluate.videos is not None or recipe.data.source != "synthetic":
        videos_to_measure_on(recipe)


NEEDS = (videos_to_track,)


def measure(
    recipe: VideoRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Run the recipe's benchmarks on `folder`/merged and on what it was made of, a folder called `teacher_name`."""
    trackers = {
        f"{teacher_name}, start": torch.nn.Module.to(load_tracker(chassis), device),
        "trained": torch.nn.Module.to(load_tracker(folder / "merged"), device),
    }
    showing = Showing(recipe.evaluate.prompt, prompt_style(recipe.prompts))
    add_vos(results, trackers, videos_to_measure_on(recipe), recipe.evaluate, folder, showing)


tables = vos_tables
