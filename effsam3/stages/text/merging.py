# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: what a run has learned, as the part for SAM 3's text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Sam3LiteTextTextConfig

from effsam3.models.merging.slots import Part, text_part
from effsam3.models.registry import TEXT_STUDENTS, TINY_TEXT_STUDENTS
from effsam3.models.text.padding import padding_of
from effsam3.stages.base import TEACHER_FORM, CardEntry, began_with
from effsam3.stages.text.facts import TextRecipe
from effsam3.stages.text.training import untrained

FEATURES_FORM = {"teacher": TEACHER_FORM}  # what a run must record of the features that it learned


def part_of_run(trained: TextRecipe, features: dict, weights: dict, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part of a run of stage `text`."""
    return text_part(trained.student, trained.student_padding, weights, config, **about)


def untrained_part(recipe: TextRecipe, config: PreTrainedConfig, about: dict) -> Part:
    """Return the part that a run of the recipe will give, with the weights that it starts from."""
    return part_of_run(recipe, {}, untrained(recipe).state_dict(), config, about)


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Say who fills the slot with this config: `student`, None for SAM 3's own, and for people `is`."""
    size = f"{config.num_hidden_layers} layers, {config.max_position_embeddings} tokens"
    if not isinstance(config, Sam3LiteTextTextConfig):
        return {"student": None, "is": f"SAM 3's own, {size}"}
    size += f", padding {padding_of(config)}"
    rows = TEXT_STUDENTS | TINY_TEXT_STUDENTS
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "use_repmixer_blocks")
    found = (
        (name, row.label)
        for name, row in rows.items()
        if all(getattr(row, key) == getattr(config, key) for key in shape)
    )
    name, label = next(found, (None, "LiteText of another size"))
    return {"student": name, "is": f"{label} ({name}), {size}" if name else f"{label}, {size}"}


def card(filled: dict, config: PreTrainedConfig, model: Path) -> CardEntry:
    """Describe the student for the model card; `filled` is the slot's entry in `model`'s effsam3.json."""
    name, start, limits = filled["student"], filled.get("student_init"), []
    if padding_of(config) == "attended":
        limits.append(
            "Texts attend to their padding, as EfficientSAM3's do. transformers' own classes mask it and do not load "
            "this model: `AttendedLiteTextModel` of effsam3 does."
        )
    elif (model / "efficientsam3.pt").is_file():
        limits.append(
            "The text student masks padding, EfficientSAM3 lets texts attend to it: `efficientsam3.pt` gives short "
            "texts other features than this model does."
        )
    if (row := TEXT_STUDENTS.get(name)) is None:
        return CardEntry(called=f"`{name}`", origin=began_with("text", filled), limits=tuple(limits))
    research = f"MobileCLIP's weights ({row.source}) are for research purposes only"
    if start == "mobileclip":
        origin = (
            f"**For research only.** The text student started from MobileCLIP's. {research}, and so is this model."
        )
    elif origin := began_with("text", filled):
        origin += f" {research}, and so is a student that starts from them."
    return CardEntry(called=f"{row.label} (`{name}`; {row.source})", origin=origin, limits=tuple(limits))
