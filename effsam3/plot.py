# SPDX-License-Identifier: Apache-2.0
"""The verb `plot`: the curves of one run or of several beside each other, as one picture.

effsam3 plot runs/stage1-image-es_rv_m                          runs/stage1-image-es_rv_m/curves.png
effsam3 plot runs/a runs/b --metrics loss,val/cosine --out both.png
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from effsam3 import stages
from effsam3.errors import UserError, did_you_mean
from effsam3.training.progress import each_run
from effsam3.training.report import read_metrics, refuse_unwritable

Curve = list[tuple[int, float]]  # (step, value)

PREFIXES = ("", "train/", "val/", "perf/")  # tried in this order: `loss` is train/loss
# What is drawn unless it is asked otherwise, as far as a run has it.
METRICS = sorted({metric for stage in stages.STAGES if (metric := stages.recipe_class(stage).metric)})
DEFAULT = ("train/loss", *METRICS, "train/lr", "train/grad_norm", "perf/samples_per_s", "perf/data_wait")
DEFAULT += ("perf/peak_gib",)
PANELS = 6  # at most
TITLES = {
    "train/loss": "training loss",
    **{metric: f"{metric}, held out" for metric in METRICS},
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "perf/samples_per_s": "samples per second",
    "perf/data_wait": "share of the time waiting for data",
    "perf/peak_gib": "peak memory of a device, GiB",
}
EXACT = ("train/lr", "perf/peak_gib")  # not noisy: drawn as they are
SMOOTH, SMOOTH_SHARE = 0.9, 10  # unless asked otherwise the average spans 10 points, of short curves a tenth
LOG_RATIO = 20  # a logarithmic scale from this ratio of the highest to the lowest value on
# Okabe and Ito's colours, told apart by the colour-blind, without their yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")  # after seven runs the colours come again
SUFFIXES = (".png", ".pdf", ".svg")
WIDTH_PX, ROW_PX, DPI = 1600, 480, 100


def plot(runs: Sequence[str], out: str | None = None, metrics: str | None = None, smooth: float | None = None) -> str:
    """Draw the curves of runs and say where; of several, those without curves are left out and named.

    Args:
        runs: run folders, or recipes of runs.
        out: the picture; None: curves.png in the folder of one run, or beside the first of several.
        metrics: names with commas as in metrics.jsonl, `train/`, `val/` or `perf/` may be left out; None: a choice.
        smooth: weight of the past in the line over the raw curve of training, 0 (none) to below 1; None: 0.9, of
            curves with few points less, because it would lag behind them.

    Raises:
        UserError: no run has curves, or one that was asked for, or an argument is out of range.
    """
    if smooth is not None and not 0 <= smooth < 1:
        raise UserError(f"--smooth {smooth:g}: the weight of the past is at least 0 and below 1, such as 0.9")
    found, left_out = each_run(runs, lambda folder: (folder, read_curves(folder)))
    of_folder = {folder.resolve(): curves for folder, curves in found}  # each once
    first = found[0][0]
    path = Path(out) if out else (first if len(of_folder) == 1 else first.parent) / "curves.png"
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out {path}: the name of a picture ends in {', '.join(SUFFIXES)}")
    refuse_unwritable(path.parent, "--out")
    curves = dict(zip(unique_names(list(of_folder)), of_folder.values(), strict=True))
    known = list(dict.fromkeys(name for run in curves.values() for name in run))
    chosen = [name for name in DEFAULT if name in known][:PANELS] if metrics is None else choose(metrics, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    draw(curves, chosen, smooth).savefig(partial)
    partial.replace(path)
    return "\n".join([f"{path}: {', '.join(curves)}", *(f"left out: {reason}" for reason in left_out)])


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


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Name folders by as few of their last parts as tell them apart; no two may be the same."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same folder twice in {folders}")


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return the running average in which the past has this weight, without a pull towards 0 at the beginning."""
    total, norm, result = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def wants_log(name: str, values: Sequence[float]) -> bool:
    """Whether a logarithmic scale helps: losses and gradients above 0 that span more than a decade."""
    learned = name.startswith("train/") and name != "train/lr"
    return learned and min(values) > 0 and max(values) > LOG_RATIO * min(values)


def draw(curves: dict[str, dict[str, Curve]], metrics: Sequence[str], smooth: float | None):
    """Return a matplotlib figure with a panel for each metric and in it a line for each run.

    `curves` are `read_curves`' of each run by its name in the legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    columns = {1: 1, 2: 2, 4: 2}.get(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    styles = {
        name: {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
        for number, name in enumerate(curves)
    }
    figure = Figure(figsize=(WIDTH_PX / DPI, ROW_PX * rows / DPI), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, metric in zip(axes[: len(metrics)], metrics, strict=True):
        drawn = {run: points[metric] for run, points in curves.items() if metric in points}
        for run, curve in drawn.items():
            _line(axis, metric, curve, smooth, styles[run])
        log = wants_log(metric, [value for curve in drawn.values() for _, value in curve])
        if log:
            axis.set_yscale("log")
        axis.set_title(TITLES.get(metric, metric) + (" (logarithmic)" if log else ""), fontsize=13)
        axis.set_xlabel("step", fontsize=11)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[len(metrics) :]:
        axis.set_axis_off()
    keys = [Line2D([], [], linewidth=2.5, **style) for style in styles.values()]
    figure.legend(keys, styles, loc="outside upper center", ncols=min(len(styles), 6), fontsize=12, frameon=False)
    return figure


def _line(axis, metric: str, curve: Curve, smooth: float | None, style: dict[str, str]) -> None:
    steps, values = zip(*curve, strict=True)
    weight = min(SMOOTH, max(0.0, 1 - SMOOTH_SHARE / len(values))) if smooth is None else smooth
    if metric.startswith("val/"):  # few and exact
        axis.plot(steps, values, marker="o", markersize=5, linewidth=1.8, **style)
    elif metric in EXACT or not weight:
        axis.plot(steps, values, linewidth=1.8, **style)
    else:
        axis.plot(steps, values, linewidth=1, alpha=0.3, **style)
        axis.plot(steps, smoothed(values, weight), linewidth=2, **style)
