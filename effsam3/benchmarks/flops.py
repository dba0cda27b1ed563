# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations every part of a model takes, counted without its weights.

Of every part, because a small trunk leaves both necks as they are, and each phrase and object costs more again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from effsam3 import stages
from effsam3.benchmarks.parts import Counter
from effsam3.models.chassis.classes import empty_model, model_class
from effsam3.models.chassis.find import config_at_hand
from effsam3.models.chassis.sizes import first_of
from effsam3.models.chassis.slim import slim_config
from effsam3.models.chassis.tensors import read_config
from effsam3.models.exporting.flow import TRACED, flow
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.parts import parts_of
from effsam3.models.flops import PARTS, USES, title
from effsam3.models.inference.concepts import encode_geometry_always
from effsam3.models.merging.slots import SLOTS, MergeError, model_folder
from effsam3.models.registry import Sam3, named
from effsam3.recipe.common import FeatureRecipe, Recipe
from effsam3.training.report import table


def part_gflop(config: PreTrainedConfig) -> dict[str, float]:
    """Count what one image, phrase, shown object and tracked frame take in the model of a `Sam3VideoConfig`.

    See `Counter`; attention's products are counted, and branches that an export folds. A phrase has 32 tokens, to
    which processors pad, and one example box; an object is shown by a point; the memory is as full as it gets.

    Returns:
        {part: GFLOP}, all of `PARTS`.
    """
    return dict(_counted(config.to_json_string(use_diff=False)))


@lru_cache(maxsize=8)  # of a made-up chassis it takes seconds, every time that it stands next to its students
def _counted(text: str) -> dict[str, float]:
    content = json.loads(text)
    config_class = model_class(content["model_type"]).config_class
    assert config_class is not None  # every class of a whole model has one
    config: Any = config_class.from_dict(content)
    with torch.device("meta"):
        model: Any = empty_model(config).eval().requires_grad_(False)
        encode_geometry_always(model.detector_model)
        parts = parts_of(model) + memory_parts(model)
    found, before = {}, 0
    with Counter() as counter:
        for example in flow(parts, full_memory(config.tracker_config), device="meta"):
            found[example.part.name], before = (counter.flops - before) / 1e9, counter.flops
    return {part: found[part] for part in PARTS}


def full_memory(tracker: Any) -> dict[str, int]:
    """Return the lengths of a model's dynamic axes for one of everything, and for all that its tracker remembers."""
    frames = tracker.num_maskmem
    hot = 1 + tracker.memory_hot_frames if getattr(tracker, "memory_mode", None) == "hybrid" else 0
    lengths = {"frames": min(hot, frames) or frames, "old_frames": frames - min(hot, frames)}
    return dict.fromkeys(TRACED, 1) | lengths | {"pointers": tracker.max_object_pointers_in_encoder}


def config_of(recipe: Recipe) -> Any:
    """Return the config of the model that `merge` makes of a recipe; no weights are read.

    Raises:
        MergeError: a release's part is not there.
        UserError: the sizes of the recipe's SAM 3 are not known.
    """
    config = config_at_hand(recipe.sam3.checkpoint)
    learned = recipe.learned()
    for slot, folder in recipe.sources().items():
        if slot in learned:
            trained = learned[slot]
            if isinstance(trained, FeatureRecipe):
                trained = replace(trained, student_init="random")  # others would be fetched
            with torch.device("meta"):
                part = stages.merging(slot).untrained_part(trained, config, {"origin": "", "facts": {}})
            own = part.config
        elif (place := model_folder(folder)) is not None:
            own = SLOTS[slot].config_of(read_config(place))
        else:
            raise MergeError(f"parts.{slot}: there is neither a run nor a model in {folder}")
        config = SLOTS[slot].install(config, own)
    for trained in learned.values():
        config = slim_config(config, trained.encoder_layers)
    return config


def chassis_row(checkpoint: str) -> Sam3:
    """Return the SAM 3 that a checkpoint began as, whichever students it has by now.

    Raises:
        UserError: its effsam3.json is damaged.
    """
    return named(first_of(checkpoint))


def gflop_table(model: Mapping[str, float], teacher: Mapping[str, float] | None, label: str) -> str:
    """Lay the GFLOP of a model's parts out by what they are used for, next to those of the SAM 3 called `label`."""
    columns = [model] if teacher is None else [model, teacher]
    rows = []
    for use, parts in USES.items():
        sums = [sum(column[part] for part in parts) for column in columns]
        named = [(f"{use}: {title(part)}", [column[part] for column in columns]) for part in parts]
        for name, numbers in [*(named if len(parts) > 1 else []), (f"**{use}**", sums)]:
            times = [f"{numbers[1] / numbers[0]:,.1f}"] if len(numbers) == 2 else []
            rows.append([name, *(f"{number:,.2f}" if number >= 1 else f"{number:.3g}" for number in numbers), *times])
    return table(rows, ["GFLOP", "this model", *([label, "times fewer"] if teacher is not None else [])])
