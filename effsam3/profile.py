# SPDX-License-Identifier: Apache-2.0
"""The verb `profile`: what each part of a model costs on this machine, in several runtimes, next to its teacher.

effsam3 profile runs/stage1-image-es_rv_m --teacher models/sam3
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effsam3.benchmarks.parts import BY_BOX, BY_TEXT, profile_parts
from effsam3.benchmarks.speed import device_name
from effsam3.files import atomic_file, refuse_unwritable, write_text
from effsam3.models.exporting.fold import fold
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.parts import Part, parts_of
from effsam3.predictor import load_model
from effsam3.training.report import provenance, table

WHOLE = {"image and box": BY_BOX, "image and text": BY_TEXT}


def run(
    model: str,
    teacher: str | None = None,
    runtimes: Sequence[str] = ("eager", "onnxruntime"),
    parts: Sequence[str] = (),
    rounds: int = 5,
    out: str | None = None,
) -> Path:
    """Measure, print a table, and write profile.json, profile.md and profile.png; returns their folder.

    Args:
        model: what `predict` takes.
        teacher: another model to measure in the same turns.
        runtimes: of `benchmarks.parts.RUNTIMES`.
        parts: up to the last of these, since each needs what earlier ones put out; none: all.
        rounds: timed calls of each part.
        out: the folder; None: profiles/<name of the model>.

    Raises:
        UserError: see `load_model`; or a part cannot be exported.
    """
    target = Path("profiles") / Path(model).name if out is None else Path(out)
    refuse_unwritable(target, "--out")
    models = {"model": measured(model, parts)} | ({} if teacher is None else {"teacher": measured(teacher, parts)})
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        found = profile_parts(models, runtimes, Path(folder), rounds, threads)
    about = {
        "model": model,
        "teacher": teacher,
        "device": device_name(torch.device("cpu")),
        "rounds": rounds,
        "provenance": provenance(),
        "parts": found,
        "whole_ms": {name: whole(of_model) for name, of_model in found.items()},
    }
    target.mkdir(parents=True, exist_ok=True)
    text = as_text(about)
    write_text(target / "profile.json", json.dumps(about, indent=1) + "\n")
    write_text(target / "profile.md", text + "\n")
    draw(about, target / "profile.png")
    print(f"{text}\n\nsee {target}/profile.png, {target}/profile.json")
    return target


def measured(model: str, only: Sequence[str]) -> list[Part]:
    """Load a model as it would be deployed, its branches folded, and cut it into parts, up to the last of `only`."""
    whole_model: Any = load_model(model)
    fold(whole_model)
    every = parts_of(whole_model) + memory_parts(whole_model)
    # Earlier parts make the inputs of later ones.
    last = max((index for index, part in enumerate(every) if part.name in only), default=len(every) - 1)
    return every[: last + 1]


def whole(parts: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Return the milliseconds of an image and a prompt in each runtime: the sum of the parts that it takes."""
    return {
        use: {
            runtime: sum(parts[name]["ms"][runtime]["median"] for name in names)
            for runtime in next(iter(parts.values()))["ms"]
        }
        for use, names in WHOLE.items()
        if all(name in parts for name in names)
    }


def as_text(about: dict[str, Any]) -> str:
    """Return the tables."""
    blocks = [f"{about['device']}, one image, {about['rounds']} rounds; milliseconds: median (90 %)"]
    for model, parts in about["parts"].items():
        runtimes = list(next(iter(parts.values()))["ms"])
        rows = [
            [
                name,
                f"{part['parameters'] / 1e6:.2f}",
                f"{part['gflop']:.2f}",
                f"{part['peak_mb']:.1f}",
                *(f"{part['ms'][one]['median']:.1f} ({part['ms'][one]['p90']:.1f})" for one in runtimes),
            ]
            for name, part in parts.items()
        ]
        for use, ms in about["whole_ms"][model].items():
            rows.append([f"{use}, images/s", "", "", "", *(f"{1000 / ms[one]:.2f}" for one in runtimes)])
        title = f"{model}: {about[model]}"
        blocks.append(table(rows, [title, "M parameters", "GFLOP", "peak MB", *runtimes]))
    if about["teacher"] is not None:
        ratios = [
            f"{use}, {runtime}: {about['whole_ms']['teacher'][use][runtime] / ms:.2f} times as fast as the teacher"
            for use, of_use in about["whole_ms"]["model"].items()
            for runtime, ms in of_use.items()
        ]
        blocks.append("\n".join(ratios))
    return "\n\n".join(blocks)


def draw(about: dict[str, Any], path: Path) -> None:
    """Draw the parts' times, a bar for each model and runtime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (model, runtime) for model, parts in about["parts"].items() for runtime in next(iter(parts.values()))["ms"]
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(bars)), layout="constrained")
    labels = [f"{model}, {runtime}" for model, runtime in bars]
    left = [0.0] * len(bars)
    for name in about["parts"]["model"]:
        widths = [about["parts"][model][name]["ms"][runtime]["median"] for model, runtime in bars]
        axes.barh(labels, widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds, one image, on {about['device']}")
    axes.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)
