# SPDX-License-Identifier: Apache-2.0
"""How a run is, from its files only: facts, and a line for each in words. Light, as `effsam3 status` is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from effsam3 import stages
from effsam3.checked_files import read_yaml
from effsam3.training.checkpoint_folders import best_first, complete
from effsam3.training.monitor import Monitor
from effsam3.training.progress import read_progress
from effsam3.training.report import duration, read_lines, read_metrics

ALIVE = ("running", "silent")  # what `--watch` waits for
BLOCKS = [chr(0x2581 + height) for height in range(8)]  # unicode's lower blocks, an eighth to a whole
CURVE_POINTS = 40
BAR = 24
# What is shown of the last line of training, by its name in metrics.jsonl
LATEST = {
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "data_wait": "perf/data_wait",  # share of the time
    "samples_per_s": "perf/samples_per_s",
    "samples_per_s_per_device": "perf/samples_per_s_per_device",
    "peak_gib": "perf/peak_gib",  # of one device
    "mfu": "perf/mfu",  # share of the device's peak
}
RECIPE_FORM = {
    "name?": str,
    "stage?": str,
    "student?": (str, None),
    "memory?": {"mode?": str},
    "train?": {"steps?": (int, None), "monitor?": (str, None)},
}
NOT_LOSSES = ("train/lr", "train/grad_norm", "train/loss_scale")


def examine(folder: Path, now: float | None = None) -> dict[str, Any]:
    """Return the facts of a run folder; None means unknown.

    `now` is the time in seconds since 1970, by default the present.
    """
    progress = read_progress(folder)
    recipe = _read(folder / "recipe.yaml", RECIPE_FORM)
    # Its plain values, as another version may have written them.
    learned = stages.recipe_class(recipe["stage"]) if recipe.get("stage") in stages.STAGES else None
    lines = read_metrics(folder / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    last = trained[-1] if trained else {}
    checkpoints = folder / "checkpoints"
    saved, best = complete(checkpoints), best_first(checkpoints)
    facts = {
        "run": str(folder),
        "name": recipe.get("name", folder.name),
        "stage": recipe.get("stage"),
        "student": learned.student_of(recipe) if learned else None,
        "step": lines[-1]["step"] if lines else 0,
        "steps": recipe.get("train", {}).get("steps"),
        **({name: last.get(key) for name, key in LATEST.items()}),
        "losses": {
            name.removeprefix("train/"): value
            for name, value in last.items()
            if name.startswith("train/") and name not in NOT_LOSSES
        },
        "loss_curve": _curve([line["train/loss"] for line in trained]),
        **_validations(lines, Monitor.of_values(recipe)),
        "checkpoints": [path.name for path in saved],
        "best_checkpoint": best[0].name if best else None,
        "runners_up": [path.name for path in best[1:]],
        "unreadable": len({str(line.get("key")) for line in read_lines(folder / "unreadable.jsonl")}),
        "skipped_micro_batches": len(
            {(str(one.get("step")), str(one.get("micro_batch"))) for one in read_lines(folder / "skipped.jsonl")}
        ),
        "loggers": _loggers(folder),
    }
    if progress is not None:
        facts |= {
            "state": progress.true_state(now),
            "age_s": progress.age_s(now),
            "step": progress.step,
            "steps": progress.steps,
            "samples_per_s": progress.samples_per_s or facts["samples_per_s"],
            "hardware": progress.hardware,
            "host": progress.host,
            "pid": progress.pid,
            "error": progress.error,
        }
    else:  # an older run, without progress.json
        ended = saved and _read(saved[-1] / "trainer.json", {"ended?": bool}).get("ended")
        provenance = _read(folder / "provenance.json", {"hardware?": str, "layout?": str})
        facts |= dict.fromkeys(("age_s", "host", "pid")) | {"state": "complete" if ended else "unknown", "error": ""}
        facts["hardware"] = provenance.get("hardware", provenance.get("layout"))
    speed, hardware = facts["samples_per_s"], facts["hardware"]
    if facts["samples_per_s_per_device"] is None and speed and hardware:
        facts["samples_per_s_per_device"] = speed / int(hardware.split(" x ")[0])
    # Only of a run that goes on: the speed of one that has died says nothing about the rest.
    facts["eta_s"] = None
    if facts["state"] == "running" and speed and progress is not None:
        facts["eta_s"] = (progress.steps - progress.step) * progress.global_batch / speed
    return facts | {"next": _next(facts, folder)}


def _read(path: Path, form: dict) -> dict:
    # JSON is YAML
    return read_yaml(path, form, "restore it, or delete it") if path.is_file() else {}


def _validations(lines: list[dict], monitor: Monitor | None) -> dict[str, Any]:
    """The number at the start, the best and the latest of a trained student, each {"step": ..., "value": ...}."""
    if monitor is None:
        return dict.fromkeys(("metric", "start", "best", "latest"))
    name = monitor.name
    values = [{"step": line["step"], "value": line[name]} for line in lines if name in line]
    trained = [value for value in values if value["step"] > 0]
    return {
        "metric": name,
        "start": values[0] if values and values[0]["step"] == 0 else None,
        "best": min(trained, key=lambda one: monitor.order({name: one["value"]}), default=None),
        "latest": trained[-1] if trained else None,
    }


def _curve(losses: list[float]) -> list[float]:
    """Average a curve down to at most CURVE_POINTS points."""
    # Means of stretches: a single noisy step must not stand for hundreds.
    points = min(len(losses), CURVE_POINTS)
    edges = [len(losses) * point // points for point in range(points + 1)] if points else []
    return [sum(losses[start:end]) / (end - start) for start, end in pairwise(edges)]


def _loggers(folder: Path) -> list[str]:
    """Return the folders in which wandb and TensorBoard keep the run."""
    boards = {path.parent for path in folder.glob("*/events.out.tfevents*")}
    return sorted(map(str, [*boards, *folder.glob("wandb/*run-*")]))


def _next(facts: dict[str, Any], folder: Path) -> str:
    """Return what to do now."""
    state, saved = facts["state"], facts["checkpoints"]
    if state == "running":
        return f"wait, or stop it with `kill {facts['pid']}` on {facts['host']}: it saves first"
    if state == "silent":
        return (
            f"see whether process {facts['pid']} on {facts['host']} still works ({folder}/log.txt, the GPUs); if it "
            "hangs, end it, and the same command resumes from what is saved"
        )
    if state == "complete":
        if not (folder / "merged" / "config.json").is_file():
            return f"effsam3 merge {folder}"
        if not (folder / "eval" / "summary.md").is_file():
            return f"effsam3 evaluate {folder}"
        return f"read {folder}/eval/summary.md; effsam3 push {folder} --dry-run"
    first = {"failed": "fix what the error names, then ", "unknown": "if it does not run any more, "}.get(state, "")
    start = f"resumes from {saved[-1]}" if saved else "starts fresh, nothing is saved yet"
    if not (folder / "recipe.yaml").is_file():
        return f"{first}the same command {start}"
    return f"{first}the same command, or `effsam3 launch {folder} train`, {start}"


# ---- in words


def described(facts: dict[str, Any]) -> dict[str, str]:
    """Return everything about one run in words, by subject; subjects of which nothing is known are left out."""
    speed = {
        "{:.1f} samples/s": facts["samples_per_s"],
        "{:.1f} per device": facts["samples_per_s_per_device"],
        "{:.0f} % of the time waiting for data": _in_percent(facts["data_wait"]),
    }
    device = {"peak memory {:.1f} GiB": facts["peak_gib"], "MFU {:.1f} %": _in_percent(facts["mfu"])}
    rows = {
        "state": _state_line(facts),
        "step": _step_line(facts),
        "speed": _known(speed),
        "loss": _loss_line(facts),
        "optim": _known({"lr {:.2e}": facts["lr"], "gradient norm {:.3f}": facts["grad_norm"]}),
        "device": _known(device),
        "held out": _held_out_line(facts),
        "saved": ", ".join([*facts["checkpoints"], *filter(None, [facts["best_checkpoint"]]), *facts["runners_up"]])
        or "nothing yet",
        "bad data": f"{facts['unreadable']} unreadable samples, {facts['run']}/unreadable.jsonl names them"
        if facts["unreadable"]
        else "",
        "skipped": f"{facts['skipped_micro_batches']} micro-batches, {facts['run']}/skipped.jsonl names them"
        if facts["skipped_micro_batches"]
        else "",
        "loggers": ", ".join(facts["loggers"]),
        "next": facts["next"],
    }
    return {name: text for name, text in rows.items() if text}


def _state_line(facts: dict[str, Any]) -> str:
    if facts["state"] == "unknown":
        return "unknown: there is no progress.json"
    process = f"; process {facts['pid']} on {facts['host']}" if facts["state"] in ALIVE else ""
    sign = "last sign " if facts["state"] in (*ALIVE, "killed") else ""  # the others have recorded their end
    when = f", {sign}{duration(facts['age_s'])} ago" if facts["age_s"] is not None else ""
    error = f"\n{'':<9} {facts['error']}" if facts["error"] else ""
    return f"{facts['state']}{when}; {facts['hardware']}{process}{error}"


def _step_line(facts: dict[str, Any]) -> str:
    if not facts["steps"]:
        return f"{facts['step']:,}"
    full = BAR * facts["step"] // facts["steps"]
    left = f", about {duration(facts['eta_s'])} left" if facts["eta_s"] is not None else ""
    return f"[{'#' * full}{'.' * (BAR - full)}] {facts['step']:,} of {facts['steps']:,}, {percent(facts)}{left}"


def _loss_line(facts: dict[str, Any]) -> str:
    losses = dict(facts["losses"])
    if not losses:
        return ""
    whole = f"{losses.pop('loss'):.4f}"
    terms = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    return "  ".join(filter(None, [whole, f"({terms})" if terms else "", sparkline(facts["loss_curve"])]))


def _held_out_line(facts: dict[str, Any]) -> str:
    values = [
        f"{title} {facts[title]['value']:.4f}" + (f" at step {facts[title]['step']:,}" if facts[title]["step"] else "")
        for title in ("start", "best", "latest")
        if facts[title]
    ]
    return f"{facts['metric']}: {', '.join(values)}" if values else ""


def _known(numbers: dict[str, float | None]) -> str:
    """Join the numbers that are known, each in the words around it."""
    return ", ".join(words.format(value) for words, value in numbers.items() if value is not None)


def _in_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def percent(facts: dict[str, Any]) -> str:
    """Return how much of a run is done, "-" where that is not known."""
    return f"{100 * facts['step'] / facts['steps']:.1f} %" if facts["steps"] else "-"


def sparkline(values: Sequence[float]) -> str:
    """Draw numbers as blocks from the lowest to the highest, on a logarithmic scale where all are above 0."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    if min(values) > 0:
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    return "".join(BLOCKS[round(7 * (value - low) / (high - low or 1))] for value in values)
