# SPDX-License-Identifier: Apache-2.0
"""Results of benchmarks as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effsam3.training.report import table

Column = tuple[str, str, Callable[[Any], str]]  # header, key of a row's result, how its value is written


def percent(share: float) -> str:
    """Write a share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def millions(count: int) -> str:
    """Write a number of parameters."""
    return f"{count / 1e6:.2f} M"


def result_table(
    title: str, results: Mapping[str, Mapping], columns: Sequence[Column], *more_rows: Sequence[str]
) -> str:
    """Return a row for each result, under its label, with "-" for what it lacks; then `more_rows` as they are."""
    # Missing is missing: an empty cell would read as zero.
    rows = [
        [label, *(write(one[key]) if key in one else "-" for _, key, write in columns)]
        for label, one in results.items()
    ]
    return table([*rows, *map(list, more_rows)], [title, *(header for header, _, _ in columns)])


def speed_table(title: str, timing: Mapping[str, Any], labels: Mapping[str, str], columns: Sequence[Column]) -> str:
    """Return the rows of teacher and student, under their `labels`, and how many times better the student is."""
    gain = ["gain", *(f"{timing['ratio'][key]:.2f}x" for _, key, _ in columns)]
    return result_table(title, {label: timing[name] for name, label in labels.items()}, columns, gain)
