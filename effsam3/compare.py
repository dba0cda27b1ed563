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
from effsam3.models.registry import (
    IMAGE_STUDENTS,
    SAM3,
    TEXT_STUDENTS,
    ImageStudent,
    TextStudent,
    head_params,
)

HEADS = ("fused", "stride32")
COUNTS = SAM3.counts


def saved_percent(millions: float, of_millions: float) -> float:
    """Return how much smaller, in percent, a part is than the one it replaces."""
    return 100 * (1 - millions / of_millions)


def numbers(others: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything the tables print, in parameters unless a name says millions or percent.

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
        "published_saved_percent": saved_percent(row.published_millions, millions(COUNTS.text)),
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
    wide = max(len(row["student"]) for row in image)
    rest = f"{teacher['rest'] / 1e6:.2f} M geometry, detector and tracker"
    parts = f"{teacher['vision'] / 1e6:.2f} M vision + {teacher['text'] / 1e6:.2f} M text + {rest}"
    necks = f"{teacher['trunk'] / 1e6:.2f} M trunk (ViT) + {teacher['necks'] / 1e6:.2f} M necks"
    lines = [
        f"{SAM3.label:<8} {teacher['total'] / 1e6:.2f} M = {parts}",
        f"vision   {teacher['vision'] / 1e6:.2f} M = {necks}; a student replaces the trunk, the necks stay",
        "",
        f"{'':<8} {'':<{wide}} {'published':^17} {'exact':>11} {'with fused head':^26} {'with stride32 head':^26}",
        f"{'image':<8} {'student':<{wide}} {'M':>8} {'saved':>8} {'trunk':>11}"
        + 2 * f" {'M':>8} {'saved':>8} {'model M':>8}",
    ]
    for row in image:
        published = f"{'-':>8} {'-':>8}"
        if row["published_millions"] is not None:
            published = f"{row['published_millions']:>8.2f} {row['published_saved_percent']:>6.2f} %"
        shipped = "".join(
            f" {head['trunk_and_head'] / 1e6:>8.2f} {head['saved_percent']:>6.2f} % {head['whole_model'] / 1e6:>8.2f}"
            for head in (row[name] for name in HEADS)
        )
        label = row["label"] if row["published_millions"] is not None else "-"
        lines.append(f"{label:<8} {row['student']:<{wide}} {published} {row['trunk']:>11,}{shipped}")
    lines += [
        "",
        f"{'':<8} {'':<16} {'published':^17} {'exact':>11} {'with projector':^17}",
        f"{'text':<8} {'tower':<16} {'M':>8} {'saved':>8} {'encoder':>11} {'M':>8} {'saved':>8}",
    ]
    for row in text:
        published = f"{row['published_millions']:>8.2f} {row['published_saved_percent']:>6.2f} %"
        shipped = f"{row['encoder_and_projector'] / 1e6:>8.2f} {row['saved_percent']:>6.2f} %"
        lines.append(f"{row['label']:<8} {row['tower']:<16} {published} {row['encoder']:>11,} {shipped}")
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            "",
            f"published  saved = 1 - M / {millions(COUNTS.vision)} (image), 1 - M / {millions(COUNTS.text)} (text)",
            f"with head  saved = 1 - M / {millions(SAM3.sizes.trunk_params)}, the trunk which they replace",
            "model M    the whole merged model",
            "docs/parameters.md explains every difference.",
        ]
    )
