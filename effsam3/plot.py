# SPDX-License-Identifier: Apache-2.0
"""The verb `plot`: the curves of one run, or of several next to each other, as one picture.

effsam3 plot runs/stage1-image-es_rv_m                          runs/stage1-image-es_rv_m/curves.png
effsam3 plot runs/a runs/b --metrics loss,val/cosine --out both.png
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from effsam3 import stages
from effsam3.checked_files import read_yaml
from effsam3.errors import UserError, did_you_mean
from effsam3.files import atomic_file, refuse_unwritable
from effsam3.training.monitor import MONITOR_FORM, Monitor
from effsam3.training.progress import each_run
from effsam3.training.report import read_metrics

Curve = list[tuple[int, float]]  # (step, value)

PREFIXES = ("", "train/", "val/", "perf/")  # tried in this order: `loss` is train/loss
# Metrics drawn by default, if the run has them.
METRICS = sorted({metric for stage in stages.STAGES if (metric := stages.recipe_class(stage).metric)})
DEFAULT = (*METRICS, "train/lr", "train/grad_norm", "perf/samples_per_s", "perf/data_wait")
PANELS = 6  # at most
SMOOTH, SMOOTH_SHARE = 0.9, 10  # unless asked otherwise the average spans 10 points, of short curves a tenth
LOG_RATIO = 20  # losses and gradients have a logarithmic scale from this ratio of highest to lowest value on
SUFFIXES = (".png", ".pdf", ".svg")


def plot(runs: Sequence[str], out: str | None = None, metrics: str | None = None, smooth: float | None = None) -> str:
    """Draw the curves of runs and print where the picture is; runs without curves are skipped by name.

    Args:
        runs: run folders, or recipes of runs.
        out: the picture; None: curves.png in the folder of one run, or next to the first of several.
        metrics: names with commas as in metrics.jsonl, `train/`, `val/` or `perf/` may be left out; None: a choice.
        smooth: weight of the past in the line over the raw curve of training, 0 (none) to below 1; None: 0.9, of
            curves with few points less, because it would lag behind them.

    Raises:
        UserError: no run has curves, or one that was asked for, or an argument is out of range.
    """
    if smooth is not None and not 0 <= smooth < 1:
        raise UserError(f"--smooth {smooth:g}: the weight of the past is at least 0 and below 1, such as 0.9")
    found, left_out = each_run(runs, lambda folder: (folder.resolve(), read_curves(folder)))
    folders = dict(found)  # each once
    first = next(iter(folders))
    path = Path(out) if out else (first if len(folders) == 1 else first.parent) / "curves.png"
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out {path}: the name of a picture ends in {', '.join(SUFFIXES)}")
    refuse_unwritable(path.parent, "--out")
    # The folder's name says enough, unless two runs have the same.
    short = len({folder.name for folder in folders}) == len(folders)
    curves = {folder.name if short else str(folder): found for folder, found in folders.items()}
    known = list(dict.fromkeys(name for run in curves.values() for name in run))
    chosen = default_metrics(folders, known) if metrics is None else choose(metrics, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        draw(curves, chosen, smooth).savefig(partial, format=path.suffix[1:])
    return "\n".join([f"{path}: {', '.join(curves)}", *(f"left out: {reason}" for reason in left_out)])


def default_metrics(folders: Iterable[Path], known: Sequence[str]) -> list[str]:
    """Return the names of what is drawn unless asked otherwise: the loss and what decides the best come first."""
    recipes = (folder / "recipe.yaml" for folder in folders)
    monitors = [
        monitor.name
        for recipe in recipes
        if recipe.is_file() and (monitor := Monitor.of_values(read_yaml(recipe, MONITOR_FORM, "restore it")))
    ]
    return [name for name in dict.fromkeys(("train/loss", *monitors, *DEFAULT)) if name in known][:PANELS]


def choose(metrics: str, known: Sequence[str]) -> list[str]:
    """Return the full names of metrics that are asked for with commas between them.

    Raises:
        UserError: no run has one of them, or there are too many for one picture.
    """
    chosen = []
    for asked in dict.fromkeys(name.strip() for name in metrics.split(",")):
        full = next((prefix + asked for prefix in PREFIXES if prefix + asked in known), None)
        if full is None:
            choices = known if "/" in asked else [name.partition("/")[2] for name in known]
            raise UserError(f"--metrics: no run has {asked!r}{did_you_mean(asked, choices)}")
        chosen.append(full)
    if len(chosen) > PANELS:
        raise UserError(f"--metrics: {len(chosen)} are asked for, a picture has room for {PANELS}")
    return chosen


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return a run's curves by the names in its metrics.jsonl; values that are not finite are left out.

    Raises:
        UserError: there are none.
    """
    curves: dict[str, Curve] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        step = line.pop("step")
        for name, value in line.items():
            if math.isfinite(value):
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise UserError(f"{folder}/metrics.jsonl holds no numbers yet; the first come when the run has validated once")
    return curves


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return the running average in which the past has this weight, without a pull towards 0 at the beginning."""
    total, norm, result = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def draw(curves: dict[str, dict[str, Curve]], metrics: Sequence[str], smooth: float | None):
    """Return a matplotlib figure with a panel for each metric and in it a line for each run.

    `curves` are `read_curves`' of each run by its name in the legend.
    """
    from matplotlib.figure import Figure

    columns = {1: 1, 2: 2, 4: 2}.get(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(16, 4.8 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, metric in zip(axes[: len(metrics)], metrics, strict=True):
        drawn = {run: points[metric] for run, points in curves.items() if metric in points}
        for run, curve in drawn.items():
            _line(axis, metric, curve, smooth, run, f"C{list(curves).index(run)}")
        values = [value for curve in drawn.values() for _, value in curve]
        if metric.startswith("train/") and metric != "train/lr" and 0 < LOG_RATIO * min(values) < max(values):
            axis.set_yscale("log")
        axis.set_title(metric)
        axis.set_xlabel("step")
        axis.legend()
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(metrics) :]:
        axis.set_axis_off()
    return figure


def _line(axis, metric: str, curve: Curve, smooth: float | None, run: str, colour: str) -> None:
    """Draw one run's curve: of training as it is and smoothed, of validation, few and exact, with its points."""
    steps, values = zip(*curve, strict=True)
    # A fixed weight would lag behind a short curve by most of its length.
    weight = min(SMOOTH, max(0.0, 1 - SMOOTH_SHARE / len(values))) if smooth is None else smooth
    if metric.startswith("val/") or metric == "train/lr" or not weight:
        axis.plot(steps, values, marker="o" if metric.startswith("val/") else "", color=colour, label=run)
    else:
        axis.plot(steps, values, linewidth=1, alpha=0.3, color=colour)
        axis.plot(steps, smoothed(values, weight), color=colour, label=run)
