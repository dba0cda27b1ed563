# SPDX-License-Identifier: Apache-2.0
"""The verb `leaderboard`: what `evaluate` has found of several runs, joined, next to published numbers of others.

effsam3 leaderboard runs/*                      tables on the console
effsam3 leaderboard runs/* --out docs           docs/leaderboard.md, .json, and .png: accuracy over time for an image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from effsam3.benchmarks.boards import BOARDS, Row, read_rows
from effsam3.benchmarks.published import PUBLISHED
from effsam3.files import atomic_file, refuse_unwritable, write_json, write_text
from effsam3.training.progress import each_run, named_folder
from effsam3.training.report import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def leaderboard(runs: Sequence[str], out: str | None = None) -> str:
    """Return the tables of all runs; with `out` also write them, their numbers and a picture into that folder.

    Args:
        runs: folders of runs and releases, or their recipes, with results; others are left out by name.
        out: gets leaderboard.md, leaderboard.json and, where runs have measured their speed, leaderboard.png.

    Raises:
        UserError: no run has results of its merged model, or one of its results is damaged.
    """
    if out is not None:
        refuse_unwritable(Path(out), "--out")
    found, left_out = each_run(runs, read_rows, named_folder)
    rows = _each_once([row for one in found for row in one])
    text = "\n\n".join(_board_table(name, rows) for name in BOARDS if any(row.board == name for row in rows))
    if out is not None:
        _write(Path(out), text, rows)
    return "\n".join([text, *(f"left out: {reason}" for reason in left_out)])


def _each_once(rows: Sequence[Row]) -> list[Row]:
    """Drop a teacher's rows that only repeat those of another run."""
    once: dict[tuple, Row] = {}
    for row in rows:
        same = (
            (row.model, row.board, row.data, *row.scores.items())
            if row.role == "teacher"
            else (row.source, row.model, row.data)
        )
        once.setdefault(same, row)
    return list(once.values())


def _board_table(name: str, rows: Sequence[Row]) -> str:
    """Return a board as Markdown: by data set, best first; what others have published comes last."""
    board = BOARDS[name]
    own = sorted((row for row in rows if row.board == name), key=lambda row: (row.data, -_score(row)))
    published = [
        Row(one.model, "published", name, one.data, one.scores, None, one.millions, one.source)
        for one in PUBLISHED
        if one.board == name
    ]
    cells = [
        [
            row.model,
            row.role,
            row.data,
            *(write(row.scores[column]) if column in row.scores else "-" for column, write in board.columns.items()),
            "-" if row.millions is None else f"{row.millions:.2f}",
            "-" if row.image_ms is None else f"{row.image_ms:.1f}",
            row.source,
        ]
        for row in [*own, *published]
    ]
    header = ["model", "", "data", *(column.replace("_", " ") for column in board.columns), "M", "ms", "source"]
    return f"## {board.title}\n\n" + table(cells, header, text_columns=3)


def _score(row: Row) -> float:
    """The board's first score that the row has."""
    return next((row.scores[column] for column in BOARDS[row.board].columns if column in row.scores), -1.0)


PREFACE = """\
# Leaderboard

Written by `effsam3 leaderboard`. Rows can be compared where `data` is the same. M: parameters of the whole model in
millions; ms: the whole model on one image with one box, teacher and student timed in turn. Rows marked `published`
were measured by others, on other machines, and are quoted from the source next to them.
"""


def _write(folder: Path, text: str, rows: Sequence[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.image_ms is not None]
    picture = folder / "leaderboard.png"
    if timed:
        with atomic_file(picture) as partial:
            draw(timed).savefig(partial, format="png")
        text = f"![accuracy over milliseconds]({picture.name})\n\n{text}"
    write_text(folder / "leaderboard.md", f"{PREFACE}\n{text}\n")
    write_json(folder / "leaderboard.json", [asdict(row) for row in [*rows]] + [asdict(one) for one in PUBLISHED])


def draw(rows: Sequence[Row]) -> Figure:
    """Return a figure with a panel for each board and data set: the first score over the milliseconds of an image."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.board, row.data) for row in rows))
    figure = Figure(figsize=(7 * len(panels), 5), dpi=100, layout="constrained")
    for axis, (board, data) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        own = [row for row in rows if (row.board, row.data) == (board, data)]
        for row in own:
            marker = "*" if row.role == "teacher" else "o"
            axis.plot(row.image_ms, _score(row), marker, markersize=12 if marker == "*" else 8, label=row.model)
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds for an image and a box")
        axis.set_ylabel(next(iter(BOARDS[board].columns)))
        axis.set_title(f"{BOARDS[board].title}, {data}", fontsize=10)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure
