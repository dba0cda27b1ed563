# SPDX-License-Identifier: Apache-2.0
"""The curves of runs, read from their metrics.jsonl and drawn: for `effsam3 plot` and `effsam3 report`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effsam3 import stages
from effsam3.checked_files import read_yaml
from effsam3.errors import UserError
from effsam3.training.monitor import MONITOR_FORM, Monitor
from effsam3.training.report import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[int, float]]  # (step, value)

# Metrics drawn by default, if the run has them.
METRICS = sorted({metric for stage in stages.STAGES if (metric := stages.recipe_class(stage).metric)})
DEFAULT = (*METRICS, "train/lr", "train/grad_norm", "perf/samples_per_s", "perf/data_wait")
PANELS = 6  # of a picture, at most
SMOOTH, SMOOTH_SHARE = 0.9, 10  # unless asked otherwise the average spans 10 points, of short curves a tenth
LOG_RATIO = 20  # losses and gradients have a logarithmic scale from this ratio of highest to lowest value on


def default_metrics(folders: Iterable[Path], known: Sequence[str]) -> list[str]:
    """Return the names of what is drawn unless asked otherwise: the loss and what decides the best come first."""
    recipes = (folder / "recipe.yaml" for folder in folders)
    monitors = [
        monitor.name
        for recipe in recipes
        if recipe.is_file() and (monitor := Monitor.of_values(read_yaml(recipe, MONITOR_FORM, "restore it")))
    ]
    return [name for name in dict.fromkeys(("train/loss", *monitors, *DEFAULT)) if name in known][:PANELS]


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


def draw(
    curves: dict[str, dict[str, Curve]], metrics: Sequence[str], smooth: float | None, legend: bool = True
) -> Figure:
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
        if legend:
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
