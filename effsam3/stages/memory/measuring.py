# SPDX-License-Identifier: Apache-2.0
"""Stage 2, memory: the video benchmark of a merged tracker, and its tables."""

from __future__ import annotations

from pathlib import Path

import torch

from effsam3.benchmarks.results import Results
from effsam3.benchmarks.vos import add_vos, vos_tables
from effsam3.data.videos.sav import SavFile, load_index
from effsam3.data.videos.vos import named_by, open_vos
from effsam3.data.videos.vos_video import VosVideo
from effsam3.models.chassis.tensors import load_part, read_config
from effsam3.models.inference.prompted import load_tracker
from effsam3.models.memory.slot import tracker_config
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors, in_mode
from effsam3.models.memory.training import read_tracker_tensors
from effsam3.stages.memory.facts import MemoryRecipe


def videos_to_track(recipe: MemoryRecipe) -> None:
    """The videos to measure on."""
    if recipe.evaluate.videos is not None:
        with named_by("evaluate.videos", "evaluate.split"):
            open_vos(recipe.evaluate.videos, split=recipe.evaluate.split)


NEEDS = (videos_to_track,)


def measure(
    recipe: MemoryRecipe, folder: Path, chassis: Path, teacher_name: str, device: torch.device, results: Results
) -> None:
    """Run the recipe's benchmarks on `folder`/merged and on its teacher, a folder that is called `teacher_name`."""
    asked, data = recipe.evaluate, recipe.data
    if asked.videos is not None:
        with named_by("evaluate.videos", "evaluate.split"):
            videos = open_vos(asked.videos, split=asked.split)
    else:
        rows, root = load_index(Path(data.index), "val", data.limit), Path(data.index).parent
        videos = [
            VosVideo(row["key"], root / row["video_file"], SavFile(root / row["annotation_file"])) for row in rows
        ]
    trackers = {f"{teacher_name}, dense": torch.nn.Module.to(load_tracker(chassis), device)}
    student = torch.nn.Module.to(load_tracker(folder / "merged"), device)
    if isinstance(student, EfficientTracker):
        trackers |= {f"{student.config.memory_mode}, trained": student}
        trackers |= {f"{mode}, same weights": in_mode(student, mode) for mode in asked.modes}
        if asked.untrained:
            config = tracker_config(read_config(chassis).tracker_config, recipe.memory)
            start = efficient_tracker_tensors(read_tracker_tensors(chassis), config, seed=recipe.train.seed)
            untrained = load_part(EfficientTracker(config), start).float().to(device)
            trackers |= {f"{config.memory_mode}, untrained": untrained}
    else:
        trackers |= {"dense, trained": student}
    add_vos(results, trackers, videos, asked, folder)


tables = vos_tables
