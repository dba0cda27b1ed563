# SPDX-License-Identifier: Apache-2.0
"""Scores of finished runs and releases, by kind and by data: for `effsam3 leaderboard` and `effsam3 zoo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effsam3.benchmarks.tables import percent
from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.publish.release import Release, read_release

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


def read_rows(run: Path) -> list[Row]:
    """Return what `evaluate` has found of a run's merged model, and of what it was measured against.

    Raises:
        UserError: nothing that is for a leaderboard, or a file is damaged.
    """
    rows = rows_of(read_release(run))
    if not rows:
        raise UserError(f"{run}/eval has no results of the merged model for a leaderboard; {AGAIN}")
    return rows


def rows_of(release: Release) -> list[Row]:
    """Return the same of a release, [] where nothing has been measured that is for a board.

    Raises:
        UserError: a file is damaged.
    """
    run = release.folder
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
    return rows
