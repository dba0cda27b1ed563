# SPDX-License-Identifier: Apache-2.0
"""From the records of teacher and student, and of what the student started from where that is another model, to
numbers: the same pairs, models and what-ifs as rows of one table.

Rows besides the two models tell what presence costs: the student's masks with the teacher's presence, or with the true
one, and the teacher's masks with the student's. What the first two gain over the student is what its presence loses.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effsam3.benchmarks.concepts.cgf1 import Counts, intervals, metrics
from effsam3.benchmarks.concepts.mask_ap import mask_ap
from effsam3.benchmarks.concepts.recording import pair_key, read_found
from effsam3.benchmarks.concepts.scoring import Detection, Scored
from effsam3.benchmarks.tables import Column, percent, result_table
from effsam3.data.concepts.pairs import ConceptPair, Subset
from effsam3.files import write_text

MODELS = ("teacher", "start", "student")
PRESENT = 0.5  # presence from which a model says that a phrase is there
EXAMPLES = 20  # notes of each reason that are kept with the results; all are counted
SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, float("inf")))  # COCO's, in px


@dataclass(frozen=True)
class Both:
    """A pair, and what all models found: {model: ...}; `masked` are the detections with masks, for AP."""

    pair: ConceptPair
    scored: dict[str, Scored]
    masked: dict[str, list[Detection]]

    def presence(self, model: str) -> float:
        """The model's own."""
        return self.scored[model].found.presence


# Rows of the table: whose masks, and which presence they are taken with.
ROWS: dict[str, tuple[str, Callable[[Both], float]]] = {
    "teacher": ("teacher", lambda both: both.presence("teacher")),
    "start": ("start", lambda both: both.presence("start")),
    "student": ("student", lambda both: both.presence("student")),
    "student, teacher's presence": ("student", lambda both: both.presence("teacher")),
    "student, true presence": ("student", lambda both: float(both.pair.there)),
    "teacher, student's presence": ("teacher", lambda both: both.presence("student")),
}


def both_found(subset: Subset, records: Mapping[str, Mapping[str, dict]]) -> tuple[list[Both], dict[str, str]]:
    """Return the pairs that all models have answered, and {pair: why} of the others; `records` by model and key."""
    answered, failed = [], {}
    for pair in subset.pairs:
        key = pair_key(subset, pair)
        own = {model: of_model[key] for model, of_model in records.items()}
        if reasons := [one["failed"] for one in own.values() if "failed" in one]:
            failed[pair.key] = reasons[0]
            continue
        read = {model: read_found(one, pair.size) for model, one in own.items()}
        answered.append(
            Both(
                pair,
                {model: Scored(pair, found) for model, (found, _) in read.items()},
                {model: masked for model, (_, masked) in read.items()},
            )
        )
    return answered, failed


def subset_result(subset: Subset, answered: Sequence[Both], failed: Mapping[str, str], draws: int = 1000) -> dict:
    """Return a subset's numbers: counts of pairs, `models` by row, what presence `lost`, `mask_ap`, notes."""
    complete = [both for both in answered if both.pair.exhaustive]
    models = answered[0].scored.keys() if answered else ()
    result: dict = {
        "pairs": len(complete),
        "positives": sum(both.pair.there for both in complete),
        "negatives": sum(not both.pair.there for both in complete),
        "images": len({both.pair.image for both in answered}),
        "annotators": max((len(both.pair.annotators) for both in answered), default=0),
        "not_exhaustive": len(answered) - len(complete),
        "failed": len(failed),
        "failed_examples": dict(list(failed.items())[:EXAMPLES]),
        "notes": subset.reasons(),
        "note_examples": _examples(subset),
    }
    if complete:
        rows = [name for name, (model, _) in ROWS.items() if model in models]
        result["models"] = {name: row_result(complete, name, draws) for name in rows}
        result["lost"] = lost(complete)
    if subset.categories is not None and answered:
        result["mask_ap"] = {
            model: mask_ap([(one.pair, one.presence(model), one.masked[model]) for one in answered], subset.federated)
            for model in models
        }
    return result


def row_result(complete: Sequence[Both], name: str, draws: int) -> dict:
    """Return one row's numbers by masks, their bootstrap `intervals`, `boxes`; of a model with its own presence how
    often that is right.
    """
    model, presence_of = ROWS[name]
    rows_PS, boxes_PS = (
        np.stack([both.scored[model].counts(presence_of(both), boxes).row_S for both in complete])
        for boxes in (False, True)
    )
    result: dict = {key: float(value) for key, value in metrics(rows_PS.sum(0)).items()}
    result["intervals"] = intervals(rows_PS, [both.pair.image for both in complete], draws)
    result["boxes"] = {key: float(value) for key, value in metrics(boxes_PS.sum(0)).items()}
    if name in MODELS:
        right = {there: [(both.presence(model) >= PRESENT) == there for both in complete if both.pair.there == there]
                 for there in (True, False)}  # fmt: skip
        result["presence"] = float(np.mean([*right[True], *right[False]]))
        for there, group in zip(("presence_positive", "presence_negative"), right.values(), strict=True):
            if group:
                result[there] = float(np.mean(group))
    return result


def lost(complete: Sequence[Both]) -> dict[str, int]:
    """Count pairs on which the teacher is right about the phrase being there and the student is not (`pairs`), those
    of them that were `missed` or `imagined`, and those that are right with the teacher's presence, on the student's
    own masks (`by_presence`).
    """
    found = {"pairs": 0, "missed": 0, "imagined": 0, "by_presence": 0}
    for both in complete:
        own = both.scored["student"].counts()
        if own.right or not both.scored["teacher"].counts().right:
            continue
        found["pairs"] += 1
        found["missed" if own.outcome == "FN" else "imagined"] += 1
        found["by_presence"] += both.scored["student"].counts(both.presence("teacher")).right
    return found


def shown_result(records: Mapping[str, Sequence[dict]], prompts: Sequence[str]) -> dict:
    """Return {prompt: mIoU of each model, and the same by COCO's object sizes} from records of objects.

    Only images count that all models have seen.
    """
    seen = [
        own for own in zip(*records.values(), strict=True)
        if not any("failed" in one for one in own)
    ]  # fmt: skip
    result: dict = {}
    for prompt in prompts:
        entries = [
            {"area": shown[0]["area"]} | {model: one[prompt] for model, one in zip(records, shown, strict=True)}
            for own in seen
            for shown in zip(*(one["objects"] for one in own), strict=True)
        ]
        if not entries:
            continue
        by_size = {name: [one for one in entries if low <= one["area"] < high] for name, low, high in SIZES}
        result[prompt] = _means(entries) | {
            "by_size": {name: _means(group) for name, group in by_size.items() if group}
        }
    return result


def _means(entries: Sequence[dict]) -> dict:
    means = {model: float(np.mean([one[model] for one in entries])) for model in MODELS if model in entries[0]}
    return means | {"masks": len(entries)}


def average(subsets: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """Return the plain means of the subsets' numbers by row, as SA-Co Gold's average is."""
    measured = [one["models"] for one in subsets.values() if "models" in one]
    names = ("cgF1", "IL_MCC", "pmF1", "cgF1_50", "pmF1_50")
    rows = measured[0] if measured else ()
    return {row: {key: float(np.mean([one[row][key] for one in measured])) for key in names} for row in rows}


def _examples(subset: Subset) -> list[str]:
    kept: dict[str, list[str]] = {}
    for note in subset.notes:
        lines = kept.setdefault(note.reason, [])
        if len(lines) < EXAMPLES:
            lines.append(f"{note.where}: {note.reason} ({note.detail})")
    return [line for lines in kept.values() for line in lines]


# ---- tables


def _interval(name: str) -> Callable[[tuple], str]:
    scale = 1 if name == "IL_MCC" else 100
    digits = 2 if name == "IL_MCC" else 1
    return lambda both: f"{scale * both[0]:.{digits}f} ({scale * both[1]:.{digits}f} to {scale * both[2]:.{digits}f})"


COLUMNS: list[Column] = [
    ("cgF1", "cgF1", _interval("cgF1")),
    ("pmF1", "pmF1", _interval("pmF1")),
    ("IL_MCC", "IL_MCC", _interval("IL_MCC")),
    ("cgF1@50", "cgF1_50", percent),
    ("boxes' cgF1", "box_cgF1", percent),
    ("presence right", "presence", percent),
    ("on positives", "presence_positive", percent),
    ("on negatives", "presence_negative", percent),
]
AP: list[Column] = [
    (name, name, lambda value: "-" if value is None else percent(value))
    for name in ("AP", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large", "AP_positive")
]
SHOWN: list[Column] = [("masks", "masks", str), *((model, model, percent) for model in reversed(MODELS))]


def concept_tables(result: dict) -> list[str]:
    """Return the benchmark's results as Markdown."""
    parts: list[str] = []
    for name, subset in result["subsets"].items():
        title = (
            f"concepts, {name}: {subset['positives']} positive, {subset['negatives']} negative pairs, 95 % intervals"
        )
        if "models" in subset:
            rows = {
                row: one | {"box_cgF1": one["boxes"]["cgF1"]}
                | {key: (one[key], *ends) for key, ends in one["intervals"].items()}
                for row, one in subset["models"].items()
            }  # fmt: skip
            parts.append(result_table(title, rows, COLUMNS))
        parts += sentences(subset)
        if "mask_ap" in subset:
            parts.append(
                result_table(f"text-prompted mask AP, {name}, {subset['images']} images", subset["mask_ap"], AP)
            )
        if subset.get("shown"):
            rows = {}
            for prompt, one in subset["shown"].items():
                rows[prompt] = one
                rows |= {f"{prompt}, {size}": group for size, group in one["by_size"].items()}
            measured = [column for column in SHOWN if any(column[1] in row for row in rows.values())]
            parts.append(result_table(f"prompted masks, {name}, mIoU in %, COCO's sizes", rows, measured))
    if "average" in result:
        columns: list[Column] = [
            ("cgF1", "cgF1", percent),
            ("pmF1", "pmF1", percent),
            ("IL_MCC", "IL_MCC", "{:.2f}".format),
        ]
        parts.append(result_table(f"concepts, mean of {len(result['subsets'])} subsets", result["average"], columns))
    return parts


def sentences(subset: dict) -> list[str]:
    """Say what the numbers of a subset do not."""
    lines = []
    if "models" not in subset:
        lines.append("No pair is left to compute cgF1 on.")
    elif not subset["negatives"] or not subset["positives"]:
        lacking = "negatives" if not subset["negatives"] else "positives"
        lines.append(
            f"There are no {lacking}, so IL_MCC and cgF1 are 0 whatever the models find"
            f"{': look at pmF1, or add pairs of phrases that are not there' if lacking == 'negatives' else ''}."
        )
    else:
        found = subset["lost"]
        lines.append(
            f"On {found['pairs']} pairs the teacher is right about the phrase being there and the student wrong "
            f"({found['missed']} missed, {found['imagined']} imagined); {found['by_presence']} of them are right with "
            "the teacher's presence."
        )
    if subset["not_exhaustive"]:
        lines.append(f"Without {subset['not_exhaustive']} pairs of which not all instances were marked.")
    if subset["failed"]:
        name, why = next(iter(subset["failed_examples"].items()))
        lines.append(f"Left out: {subset['failed']} pairs of images that cannot be read, such as pair {name}: {why}.")
    if subset["notes"]:
        counted = ", ".join(f"{count} {reason}" for reason, count in subset["notes"].items())
        lines.append(f"The annotations have: {counted}; such as {subset['note_examples'][0]}.")
    return [" ".join(lines)] if lines else []


def write_pairs(path: Path, subsets: Mapping[str, Sequence[Both]]) -> None:
    """Write a line for each pair and model as CSV."""
    text = io.StringIO()
    names = ("subset", "pair", "image", "phrase", "model", "objects", "detections", "outcome", "score", "presence")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for name, answered in subsets.items():
        for both in answered:
            pair = both.pair
            for model in both.scored:
                counts: Counts = both.scored[model].counts()
                writer.writerow(
                    [name, pair.key, pair.image, pair.phrase, model, counts.objects, counts.detections]
                    + [counts.outcome, f"{counts.score:.4f}", f"{both.presence(model):.4f}"]
                )
    write_text(path, text.getvalue())
