# SPDX-License-Identifier: Apache-2.0
"""cgF1 as SAM 3's evaluator for SA-Co defines it: classification-gated F1 of pairs of an image and a noun phrase.

cgF1 = pmF1 x IL_MCC: how well the instances of phrases that are there are masked, times how well the model tells
whether a phrase is there at all. Without negatives, phrases that are not there, IL_MCC is 0, and so is cgF1.

Everything here works on counts: nothing knows masks or models. One row holds the sums of one pair or of many, so that
numbers over a subset, and over every draw of a bootstrap, are the same arithmetic on added rows.

Letters: D detections of a pair, G annotated objects, T thresholds of IoU, P pairs, S columns of a row, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

IOUS_T = np.linspace(0.5, 0.95, 10)  # .50, .55, ... .95
SCORE = 0.5  # of a detection that counts, from this on
# What keeps the evaluator from dividing by 0. They show in its numbers: a perfect F1 is .99985.
EPSILON, EPSILON_IMAGE = 1e-4, 1e-6

T = len(IOUS_T)
# Columns of a row. Per threshold: instances found, false ones of positive and of negative pairs, missed ones; the
# F1 of pairs with objects and detections. Per pair: the four outcomes of "is it there?", and how many have that F1.
PER_IOU = ("tp", "fp_positive", "fp_negative", "fn", "macro")
PER_PAIR = ("TP", "TN", "FP", "FN", "answered")
PLACE = {name: slice(number * T, (number + 1) * T) for number, name in enumerate(PER_IOU)}
PLACE |= {
    name: slice(len(PER_IOU) * T + number, len(PER_IOU) * T + number + 1) for number, name in enumerate(PER_PAIR)
}
COLUMNS = len(PER_IOU) * T + len(PER_PAIR)
INTERVALS = ("cgF1", "IL_MCC", "pmF1")  # of these there are bootstrap intervals


@dataclass(frozen=True)
class Counts:
    """One pair against one annotator: how many objects and detections, and the IoU of those that were matched."""

    objects: int
    detections: int
    matched: np.ndarray

    @property
    def tp_T(self) -> np.ndarray:
        """Objects that were found, at every threshold."""
        return (self.matched[:, None] >= IOUS_T).sum(0).astype(float)

    @property
    def f1_T(self) -> np.ndarray:
        """F1 of this pair alone; 0 where one side is empty."""
        precision_T = self.tp_T / (self.detections + EPSILON)
        recall_T = self.tp_T / (self.objects + EPSILON)
        return 2 * precision_T * recall_T / (precision_T + recall_T + EPSILON)

    @property
    def outcome(self) -> str:
        """TP, TN, FP or FN of "is the phrase there?"; IoU plays no role."""
        if self.objects:
            return "TP" if self.detections else "FN"
        return "FP" if self.detections else "TN"

    @property
    def right(self) -> bool:
        """Whether the model is right about the phrase being there."""
        return self.outcome in ("TP", "TN")

    @property
    def score(self) -> float:
        """One number of a pair, 0..1: the mean F1 over all thresholds, 1 for a true negative."""
        return 1.0 if self.outcome == "TN" else float(self.f1_T.mean())

    @property
    def row_S(self) -> np.ndarray:
        """The pair's row of sums."""
        row_S = np.zeros(COLUMNS)
        row_S[PLACE[self.outcome]] = 1
        row_S[PLACE["tp"]] = self.tp_T
        row_S[PLACE["fn"]] = self.objects - self.tp_T
        row_S[PLACE["fp_positive" if self.objects else "fp_negative"]] = self.detections - self.tp_T
        if self.outcome == "TP":  # missed pairs are left out of the evaluator's macro F1
            row_S[PLACE["macro"]], row_S[PLACE["answered"]] = self.f1_T, 1
        return row_S


def count(iou_DG: np.ndarray) -> Counts:
    """Match the detections that count with the objects, one to one, by the greatest sum of IoU."""
    detections, objects = iou_DG.shape
    rows, columns = linear_sum_assignment(-iou_DG)
    return Counts(objects, detections, iou_DG[rows, columns])


def best_annotator(counts: Sequence[Counts]) -> int:
    """Return whose annotations the pair is held against: a true negative's, else those of the best mean F1.

    Of several as good ones the first is taken, as in the evaluator, whatever it says about the phrase being there.
    """
    scores = [one.score if one.outcome != "TN" else 2.0 for one in counts]
    return scores.index(max(scores))


def metrics(row_S: np.ndarray) -> dict[str, np.ndarray]:
    """Return the evaluator's numbers of added rows (..., S), each (...).

    `cgF1`, `pmF1` (positive_micro_F1), `F1` (with the false ones of negative pairs) and `macro_F1` (-1 where nothing
    was found anywhere) are means over all thresholds; `_50` and `_75` are of one. `IL_MCC` in -1..1, `IL_F1` and
    `IL_FPR` are about phrases being there.
    """
    tp, fp_positive, fp_negative, fn, macro = (row_S[..., PLACE[name]] for name in PER_IOU)
    TP, TN, FP, FN, answered = (row_S[..., PLACE[name]][..., 0] for name in PER_PAIR)
    recall = tp / (tp + fn + EPSILON)
    pm_f1 = _f1(tp / (tp + fp_positive + EPSILON), recall, EPSILON)
    f1 = _f1(tp / (tp + fp_positive + fp_negative + EPSILON), recall, EPSILON)
    margins = (TP + FP) * (TP + FN) * (TN + FP) * (TN + FN)
    mcc = (TP * TN - FP * FN) / (np.sqrt(margins) + EPSILON_IMAGE)
    cg_f1 = pm_f1 * mcc[..., None]
    mean_macro = (macro / np.maximum(answered, 1)[..., None]).mean(-1)
    at_50, at_75 = (int(np.argmin(abs(IOUS_T - iou))) for iou in (0.5, 0.75))
    return {
        "cgF1": cg_f1.mean(-1),
        "IL_MCC": mcc,
        "pmF1": pm_f1.mean(-1),
        "cgF1_50": cg_f1[..., at_50],
        "cgF1_75": cg_f1[..., at_75],
        "pmF1_50": pm_f1[..., at_50],
        "F1": f1.mean(-1),
        "IL_F1": _f1(TP / (TP + FP + EPSILON_IMAGE), TP / (TP + FN + EPSILON_IMAGE), EPSILON_IMAGE),
        "IL_FPR": FP / (FP + TN + EPSILON_IMAGE),
        "macro_F1": np.where(answered > 0, mean_macro, -1.0),
    }


def _f1(precision: np.ndarray, recall: np.ndarray, epsilon: float) -> np.ndarray:
    return 2 * precision * recall / (precision + recall + epsilon)


def intervals(
    rows_PS: np.ndarray, images: Sequence[str], draws: int = 1000, seed: int = 0, share: float = 0.95
) -> dict[str, list[float]]:
    """Return bootstrap intervals of INTERVALS: between which values that share of resampled subsets lies.

    Images are drawn, with all their pairs: phrases of one image are found or missed together.
    """
    _, group_P = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    rows_IS = np.zeros((group_P.max() + 1, COLUMNS))
    np.add.at(rows_IS, group_P, rows_PS)
    rng, drawn = np.random.default_rng(seed), []
    number = len(rows_IS)
    for _ in range(draws):  # one after the other: all at once, a million images would take gigabytes
        times_I = np.bincount(rng.integers(number, size=number), minlength=number)
        drawn.append(times_I @ rows_IS)
    values = metrics(np.stack(drawn))
    ends = (100 * (1 - share) / 2, 100 * (1 + share) / 2)
    return {name: np.percentile(values[name], ends).tolist() for name in INTERVALS}
