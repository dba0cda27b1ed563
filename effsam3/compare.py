# SPDX-License-Identifier: Apache-2.0
"""The verb `compare`: the published parameter tables next to the counts of what really ships. No torch.

effsam3 compare                  tables
effsam3 compare timm/resnet10t   with a backbone of timm in them, which takes torch to count
effsam3 compare --json           the same numbers, exact
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from effsam3.models.image.backbones import image_student
from effsam3.models.registry import IMAGE_STUDENTS, SAM3, TEXT_STUDENTS, ImageStudent, TextStudent, head_params
from effsam3.training.report import table

HEADS = ("fused", "stride32")
assert SAM3.counts is not None
COUNTS = SAM3.counts


def saved_percent(millions: float, of_millions: float) -> float:
    """Return how much smaller, in percent, a part is than the one it replaces."""
    return 100 * (1 - millions / of_millions)


def numbers(others: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything the tables print, in parameters unless the name contains millions or percent.

    `others` are names of image students, in addition to the published ones.

    Raises:
        UserError: no student has such a name.
    """
    rows = {name: row for name, row in IMAGE_STUDENTS.items() if row.published_millions is not None}
    rows |= {name: image_student(name) for name in others}
    return {
        "teacher": {
            "total": COUNTS.total,
            "vision": COUNTS.vision,
            "text": COUNTS.text,
            "rest": COUNTS.total - COUNTS.vision - COUNTS.text,
            "trunk": COUNTS.trunk,
            "necks": 2 * COUNTS.neck,
            "transformers_total": COUNTS.transformers_total,
            "transformers_trunk": SAM3.sizes.trunk_params,
        },
        "image": [_image(name, row) for name, row in rows.items()],
        "text": [_text(name, row) for name, row in TEXT_STUDENTS.items()],
    }


def _image(name: str, row: ImageStudent) -> dict[str, Any]:
    """Count an image student as published (trunk against vision encoder) and as shipped (with head, against ViT)."""
    result: dict[str, Any] = {
        "label": row.label,
        "student": name,
        "family": row.family,
        "source": row.source,
        "published_millions": row.published_millions,
        "published_saved_percent": None
        if row.published_millions is None
        else saved_percent(row.published_millions, millions(COUNTS.vision)),
        "trunk": row.trunk_params,
    }
    for head in HEADS:
        # What ships: the published counts leave the head out and compare with trunk and necks.
        deployed = row.trunk_params + head_params(head, row.channels, SAM3.sizes.hidden_size)
        result[head] = {
            "head": deployed - row.trunk_params,
            "trunk_and_head": deployed,
            "saved_percent": saved_percent(deployed, SAM3.sizes.trunk_params),
            "whole_model": COUNTS.transformers_total - SAM3.sizes.trunk_params + deployed,
        }
    return result


def _text(name: str, row: TextStudent) -> dict[str, Any]:
    return {
        "label": row.label,
        "student": name,
        "tower": row.tower,
        "published_millions": row.published_millions,
        "published_saved_percent": saved_percent(row.published_millions or 0.0, millions(COUNTS.text)),
        "encoder": row.encoder_params,
        "encoder_and_projector": row.total_params,
        "saved_percent": saved_percent(row.total_params, COUNTS.text),
    }


def millions(parameters: int) -> float:
    """Return millions as the documents print them, with two decimals."""
    return round(parameters / 1e6, 2)


def compare(others: Sequence[str] = (), as_json: bool = False) -> str:
    """Return the tables, or the same numbers as JSON; `others` as `numbers` has them.

    Raises:
        UserError: no student has such a name.
    """
    if as_json:
        return json.dumps(numbers(others), indent=2)
    teacher, image, text = numbers(others).values()
    rest = f"{teacher['rest'] / 1e6:.2f} M geometry, detector and tracker"
    parts = f"{teacher['vision'] / 1e6:.2f} M vision + {teacher['text'] / 1e6:.2f} M text + {rest}"
    necks = f"{teacher['trunk'] / 1e6:.2f} M trunk (ViT) + {teacher['necks'] / 1e6:.2f} M necks"
    heads = [column for head in HEADS for column in (f"{head} head M", "saved %", "model M")]
    image_rows = [
        [row["label"] if row["published_millions"] else "-", row["student"], *_published(row), f"{row['trunk']:,}"]
        + [
            f"{number:.2f}"
            for head in (row[name] for name in HEADS)
            for number in (head["trunk_and_head"] / 1e6, head["saved_percent"], head["whole_model"] / 1e6)
        ]
        for row in image
    ]
    text_rows = [
        [row["label"], row["tower"], *_published(row), f"{row['encoder']:,}"]
        + [f"{row['encoder_and_projector'] / 1e6:.2f}", f"{row['saved_percent']:.2f}"]
        for row in text
    ]
    published = ["published M", "saved %"]
    return "\n".join(
        [
            f"{SAM3.label:<8} {teacher['total'] / 1e6:.2f} M = {parts}",
            f"vision   {teacher['vision'] / 1e6:.2f} M = {necks}; a student replaces the trunk, the necks stay",
            "",
            table(image_rows, ["image", "student", *published, "exact trunk", *heads], text_columns=2),
            "",
            table(text_rows, ["text", "tower", *published, "exact encoder", "with projector M", "saved %"], 2),
            "",
            f"published  saved = 1 - M / {millions(COUNTS.vision)} (image), 1 - M / {millions(COUNTS.text)} (text)",
            f"with head  saved = 1 - M / {millions(SAM3.sizes.trunk_params)}, the trunk which they replace",
            "model M    the whole merged model",
            "docs/parameters.md explains every difference.",
        ]
    )


def _published(row: dict[str, Any]) -> list[str]:
    if row["published_millions"] is None:
        return ["-", "-"]
    return [f"{row['published_millions']:.2f}", f"{row['published_saved_percent']:.2f}"]
