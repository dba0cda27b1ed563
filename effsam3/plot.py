# SPDX-License-Identifier: Apache-2.0
"""The verb `plot`: the curves of one run, or of several next to each other, as one picture.

effsam3 plot runs/stage1-image-es_rv_m                          runs/stage1-image-es_rv_m/curves.png
effsam3 plot runs/a runs/b --metrics loss,val/cosine --out both.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effsam3.errors import UserError, did_you_mean
from effsam3.files import atomic_file, refuse_unwritable
from effsam3.training.curves import PANELS, default_metrics, draw, read_curves
from effsam3.training.progress import each_run

PREFIXES = ("", "train/", "val/", "perf/")  # tried in this order: `loss` is train/loss
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
