# SPDX-License-Identifier: Apache-2.0
"""J and F of video object segmentation, and how DAVIS 2017 and SA-V turn them into one number per object.

J is the region similarity, F the boundary measure, both 0..1 (Perazzi et al. 2016, section 4). The two protocols
differ in which objects and frames count; where an official tool stops, the scorers document what they do instead.

Letters: H W rows and columns of the video. A mask is bool (H, W).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from effsam3.errors import UserError

TOLERANCE = 0.008  # of the image's diagonal: how far apart two boundaries may lie and still match


class ScoreError(UserError):
    """Masks that the protocol cannot score."""


@dataclass(frozen=True, kw_only=True)
class ObjectScore:
    """One object's scores over the frames that count, 0..1; decay: the first quarter's mean less the last one's."""

    J: float
    F: float
    J_recall: float
    F_recall: float
    J_decay: float
    F_decay: float
    frames: int


def region_similarity(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    """J: intersection over union; 1 if both masks are empty."""
    union = np.count_nonzero(predicted_HW | truth_HW)
    return np.count_nonzero(predicted_HW & truth_HW) / union if union else 1.0


def boundary_measure(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    """F: the harmonic mean of precision and recall of boundary pixels, matched within TOLERANCE of the diagonal.

    1 if neither mask has a boundary, 0 if only one has. Takes time by the objects' extent, not by the image's.
    """
    crop = _extent(predicted_HW, truth_HW)
    return _boundary_measure(predicted_HW[crop], truth_HW[crop], _radius(truth_HW))


def _radius(mask_HW: np.ndarray) -> int:
    """How far apart two boundaries may lie in pixels: 8 at 480 x 854, 18 at 1080 x 1920."""
    return math.ceil(TOLERANCE * math.hypot(*mask_HW.shape))


def _boundary_measure(predicted_HW: np.ndarray, truth_HW: np.ndarray, radius: int) -> float:
    """F of masks that `_extent` has cropped."""
    edges = boundary(predicted_HW), boundary(truth_HW)
    counts = [np.count_nonzero(edge) for edge in edges]
    if not all(counts):
        return 0.0 if any(counts) else 1.0
    precision = _near(edges[0], edges[1], radius) / counts[0]
    recall = _near(edges[1], edges[0], radius) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask_HW: np.ndarray) -> np.ndarray:
    """Boundary pixels, bool (H, W): those that differ from their east, south or south-east neighbour.

    The last row looks only east, the last column only south: where the image cuts a mask off is no boundary.
    """
    edge = np.zeros_like(mask_HW)
    here = mask_HW[:-1, :-1]
    edge[:-1, :-1] = (here != mask_HW[:-1, 1:]) | (here != mask_HW[1:, :-1]) | (here != mask_HW[1:, 1:])
    edge[-1, :-1] = mask_HW[-1, :-1] != mask_HW[-1, 1:]
    edge[:-1, -1] = mask_HW[:-1, -1] != mask_HW[1:, -1]
    return edge


def _extent(one_HW: np.ndarray, other_HW: np.ndarray) -> tuple[slice, slice]:
    """Return the bounding box of both masks with a margin of one pixel: boundaries in it are those of the whole image.

    Objects are small and frames are not: most of the time would go into empty rows.
    """
    rows = _span(np.logical_or(one_HW.any(1), other_HW.any(1)))
    return rows, _span(np.logical_or(one_HW[rows].any(0), other_HW[rows].any(0)))


def _span(occupied: np.ndarray) -> slice:
    places = np.flatnonzero(occupied)
    return slice(max(places[0] - 1, 0), places[-1] + 2) if len(places) else slice(1)


def _near(edge_HW: np.ndarray, other_HW: np.ndarray, radius: int) -> int:
    """Count the pixels of `edge` that have one of `other` within `radius`, as a dilation with a disk would find them.

    A disk is one run of pixels per row; a run of `other` is empty or not by two running sums. Only pixels of `edge`
    are asked for, near rows first, and none once it has been found.
    """
    height, width = other_HW.shape
    stride = width + 2 * radius + 1
    padded = np.zeros((height + 2 * radius, stride), np.uint8)
    padded[radius : radius + height, radius + 1 : radius + 1 + width] = other_HW
    sums = np.cumsum(padded.reshape(-1), dtype=np.int32)  # over all rows in one go
    # numpy finds the true ones of a flat array of bool ten times faster than those of any other.
    rows, columns = np.divmod(np.flatnonzero(edge_HW), edge_HW.shape[1])
    centres = (rows + radius) * stride + columns + radius
    wanted = len(centres)
    shifts, halves = _disk(radius)
    starts, ends = shifts * stride - halves, shifts * stride + halves + 1
    first, last = 0, 1
    # Most boundary pixels have their match in the nearest rows and are done: ever more rows for ever fewer pixels.
    while len(centres) and first < len(shifts):
        empty_RP = sums[centres + starts[first:last, None]] == sums[centres + ends[first:last, None]]
        centres = centres[empty_RP.all(0)]
        first, last = last, 3 * last
    return wanted - len(centres)


@functools.cache
def _disk(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a disk's rows, the nearest to its centre first, and how many pixels each reaches to either side."""
    shifts = sorted(range(-radius, radius + 1), key=abs)
    return np.array(shifts), np.array([math.isqrt(radius**2 - shift**2) for shift in shifts])


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean, recall (the share above 0.5) and decay (the first quarter's mean less the last one's) over frames.

    As in the DAVIS toolkit: the quarters share their border frames. Its bounds wrap around at 256 frames, ours do not.
    """
    bounds = np.floor(np.linspace(1, len(values), 5) + 0.5).astype(int) - 1
    first, last = values[: bounds[1] + 1], values[bounds[3] :]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """One object on one annotated frame."""

    J: float
    F: float
    in_truth: bool
    in_prediction: bool


class _Scorer:
    """One video, fed one annotated frame after the other; keeps numbers, not masks."""

    def __init__(self, video: str):
        self.video = video
        self.frames: dict[int, list[_Frame]] = {}

    def _measure(self, number: int, predicted_HW: np.ndarray, truth_HW: np.ndarray) -> None:
        if predicted_HW.shape != truth_HW.shape:
            raise ScoreError(
                f"{self.video}, object {number}: the predicted mask is {predicted_HW.shape}, the annotated one "
                f"{truth_HW.shape} (rows, columns); predictions must have the video's own size"
            )
        predicted, truth = predicted_HW.astype(bool, copy=False), truth_HW.astype(bool, copy=False)
        radius, crop = _radius(truth), _extent(predicted, truth)
        predicted, truth = predicted[crop], truth[crop]
        self.frames.setdefault(number, []).append(
            _Frame(
                J=region_similarity(predicted, truth),
                F=_boundary_measure(predicted, truth, radius),
                in_truth=bool(truth.any()),
                in_prediction=bool(predicted.any()),
            )
        )


class DavisScorer(_Scorer):
    """DAVIS 2017, semi-supervised.

    The objects are those that the first annotated frame shows. The first and the last annotated frame do not count,
    every other one does, also where object and prediction are both absent (J = F = 1). A missing prediction is an
    empty mask. Two things are other than in the toolkit, which expects ids without gaps: it takes every id up to the
    highest for an object, so that of ids 7 and 12 ten would be absent, and perfect; and it quits over a predicted id
    above the highest, where here an object that is not scored is an error on a frame that counts.
    """

    def __init__(self, video: str):
        super().__init__(video)
        self.objects: list[int] | None = None
        self.unscored: int | None = None  # predicted on the latest frame, which counts if another one follows

    def add(self, truths: Mapping[int, np.ndarray], predictions: Mapping[int, np.ndarray]) -> None:
        """Score the next annotated frame, {object: mask} each; an object that has no mask is absent.

        Raises:
            ScoreError: no object on the first frame, a predicted object that is not scored, or masks of two sizes.
        """
        if self.unscored is not None:
            raise ScoreError(
                f"{self.video}: predicted object {self.unscored}, which the first annotated frame does not show; "
                "DAVIS scores no object that appears later (appearing_later=False)"
            )
        if self.objects is None:
            self.objects = sorted(number for number, mask in truths.items() if mask.any())
            if not self.objects:
                raise ScoreError(
                    f"{self.video}: the first annotated frame shows no object, so DAVIS has none to score"
                )
            self.empty_HW = np.zeros_like(truths[self.objects[0]], dtype=bool)
        else:
            others = (number for number, mask in predictions.items() if number not in self.objects and mask.any())
            self.unscored = min(others, default=None)
        for number in self.objects:
            self._measure(number, predictions.get(number, self.empty_HW), truths.get(number, self.empty_HW))

    def scores(self) -> dict[int, ObjectScore | None]:
        """One score per object, None with fewer than three annotated frames: the first and the last do not count."""
        return {number: _score(frames[1:-1]) if frames[1:-1] else None for number, frames in self.frames.items()}


class SavScorer(_Scorer):
    """SA-V: every object over the frames on which it is annotated itself, less the first and the last of them.

    Leading frames on which neither the object nor its prediction is there do not count; later ones do (J = F = 1).
    The official evaluator stops with an AssertionError at an object that is absent from all the frames that count:
    here its score is None and it enters no mean.
    """

    def add(self, truths: Mapping[int, np.ndarray], predictions: Mapping[int, np.ndarray]) -> None:
        """Score the next annotated frame, {object: mask} each.

        An empty annotated mask means that the object is absent, no mask that it is not annotated on this frame.
        Predictions of objects that are not annotated are not looked at.

        Raises:
            ScoreError: an annotated object has no predicted mask, or masks of two sizes.
        """
        for number, truth_HW in truths.items():
            if number not in predictions:
                raise ScoreError(
                    f"{self.video}: object {number} is annotated but has no predicted mask; predict an empty one "
                    "where it is absent"
                )
            self._measure(number, predictions[number], truth_HW)

    def scores(self) -> dict[int, ObjectScore | None]:
        """One score per object, None where there is nothing to score it on."""
        found: dict[int, ObjectScore | None] = {}
        for number, frames in self.frames.items():
            counted = frames[1:-1]
            seen = [place for place, frame in enumerate(counted) if frame.in_truth or frame.in_prediction]
            present = any(frame.in_truth for frame in counted)
            found[number] = _score(counted[seen[0] :]) if present else None
        return found


def _score(frames: list[_Frame]) -> ObjectScore:
    j = statistics(np.array([frame.J for frame in frames]))
    f = statistics(np.array([frame.F for frame in frames]))
    return ObjectScore(
        J=j[0], F=f[0], J_recall=j[1], F_recall=f[1], J_decay=j[2], F_decay=f[2], frames=len(frames)
    )  # fmt: skip


def mean_scores(scores: Iterable[ObjectScore]) -> dict[str, float]:
    """Means over all objects of all videos, as both protocols take them, with `J&F` = (J + F) / 2 and `objects`.

    Raises:
        ScoreError: there is no object.
    """
    rows = [asdict(score) for score in scores]
    if not rows:
        raise ScoreError("no object of any video could be scored")
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "frames"}
    return {"J&F": (means["J"] + means["F"]) / 2, **means, "objects": len(rows)}
