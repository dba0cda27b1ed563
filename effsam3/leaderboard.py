# SPDX-License-Identifier: Apache-2.0
"""The verb `leaderboard`: what `evaluate` has found of several runs, joined, next to published numbers of others.

effsam3 leaderboard runs/*                      tables on the console
effsam3 leaderboard runs/* --out docs           docs/leaderboard.md, .json, and .png: accuracy over time for an image
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effsam3.benchmarks.published import PUBLISHED
from effsam3.benchmarks.tables import percent
from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.files import atomic_file, refuse_unwritable, write_json, write_text
from effsam3.publish.release import read_release
from effsam3.training.progress import each_run, named_folder
from effsam3.training.report import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGAIN = "run `effsam3 evaluate` again"


@dataclass(frozen=True)
class Row:
    """A model on one board.

    Attributes:
        model: what it is called: a run's folder, or the name of a checkpoint.
        role: student, teacher or published.
        board: key of BOARDS.
        data: what it was measured on; only rows of the same data can be compared.
        scores: by the board's columns.
        image_ms: milliseconds of the whole model for one image and one box, measured in the same run as the teacher's.
        millions: parameters of the whole model.
        source: where it was measured, or published.
    """

    model: str
    role: str
    board: str
    data: str
    scores: dict[str, float]
    image_ms: float | None
    millions: float | None
    source: str


Scores = dict[str, float]
Found = Iterator[tuple[str, str, str, Scores]]  # of each model in a result: its name there, role, data, scores


@dataclass(frozen=True)
class Board:
    """A kind of score: the columns of its table, of which the first one is drawn; how it is read from a result."""

    title: str
    columns: dict[str, Callable[[float], str]]
    read: Callable[[dict[str, Any]], Found]


def _masks(result: dict[str, Any]) -> Found:
    # Stage prompted has two students, the one that it started from and its own, next to the same teacher.
    models = {"start": result["start"], "student": result["prompted"]} if "prompted" in result else {"student": result}
    for name, one in models.items():
        for called, role in (("teacher", "teacher"), (name, "student")):
            scores: Scores = {prompt: one[prompt][role] for prompt in ("box", "point") if prompt in one}
            yield called, role, f"{one['images']} images", scores


def _concepts(result: dict[str, Any]) -> Found:
    subsets = result["subsets"]
    models = {name: one["models"] for name, one in subsets.items() if "models" in one}
    if "average" in result:
        models[f"mean of {len(subsets)} subsets"] = result["average"]
    for name, by_model in models.items():
        pairs = f", {subsets[name]['pairs']} pairs" if name in subsets else ""
        for role in ("teacher", "student"):
            yield role, role, name + pairs, {key: by_model[role][key] for key in ("cgF1", "IL_MCC", "pmF1")}


def _videos(result: dict[str, Any]) -> Found:
    for place, (name, one) in enumerate(result["trackers"].items()):
        data = f"{result['videos']} videos, {one['objects']} objects, {result['protocol']}"
        scores = {key: one[key] for key in ("J&F", "frames_per_s") if key in one}
        yield name, "student" if place else "teacher", data, scores


def _texts(result: dict[str, Any]) -> Found:
    for source, one in result.items():
        if source != "provenance":
            yield "student", "student", f"{one['texts']} {source}", {key: one[key] for key in ("cosine", "retrieval")}


_OWN = {f"{name} {kind}": f"{name.lower()}_{kind}" for name in ("IoU", "Dice") for kind in ("box", "point", "text")}


def _adapted(result: dict[str, Any]) -> Found:
    for role, name in (("teacher", "start"), ("student", "adapted")):
        scores = {column: result[name][key] for column, key in _OWN.items() if key in result[name]}
        yield name, role, f"{result['images']} images", scores


def _plain(value: float) -> str:
    return f"{value:.3f}"


# By the name of the benchmark's file; the longest name that fits counts, for releases put a part's name before it.
BOARDS = {
    "concepts": Board("Concepts: phrases", {"cgF1": percent, "IL_MCC": "{:.2f}".format, "pmF1": percent}, _concepts),
    "masks": Board("Masks: mIoU by prompt", {"box": percent, "point": percent}, _masks),
    "vos": Board("Videos: objects shown once", {"J&F": percent, "frames_per_s": "{:.1f}".format}, _videos),
    "similarity": Board("Text features next to the teacher's", {"cosine": _plain, "retrieval": _plain}, _texts),
    "adapted_masks": Board("Own images", dict.fromkeys(_OWN, percent), _adapted),
}


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


def read_rows(run: Path) -> list[Row]:
    """Return what `evaluate` has found of a run's merged model, and of what it was measured against.

    Raises:
        UserError: nothing that is for a leaderboard, or a file is damaged.
    """
    release = read_release(run)
    results = {path.stem: read_json(path, dict, AGAIN) for path in release.measured}
    timing = next((one for one in results.values() if "model_ms" in one.get("student", ())), None)
    rows = []
    for stem, result in results.items():
        board = max((name for name in BOARDS if f"_{stem}".endswith(f"_{name}")), key=len, default=None)
        if board is None:
            continue
        try:
            for called, role, data, scores in BOARDS[board].read(result):
                teacher = role == "teacher"
                ms, parameters = (
                    (timing[role][key] for key in ("model_ms", "model_parameters")) if timing else (None, None)
                )
                rows.append(
                    Row(
                        model=release.merged["chassis"]
                        if teacher
                        else run.name
                        if called == role
                        else f"{run.name}: {called}",
                        role=role,
                        board=board,
                        data=data,
                        scores=scores,
                        image_ms=ms,
                        millions=None if parameters is None else parameters / 1e6,
                        source=f"{run}/eval/{stem}.json",
                    )
                )
        except (AttributeError, LookupError, TypeError) as error:
            raise UserError(f"{run}/eval/{stem}.json is not a result of {board} ({error!r}); {AGAIN}") from error
    if not rows:
        raise UserError(f"{run}/eval has no results of the merged model for a leaderboard; {AGAIN}")
    return rows


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
