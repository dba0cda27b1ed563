# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised video object segmentation: each object is shown once, mostly by its mask, and tracked from there.

Several trackers run side by side over the same frames, the first of them being the one that the others are held
against. Scores are those of `benchmarks.jaccard`; predictions can be written as the official evaluators read them.

Letters: H W rows and columns of the video.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Sam3TrackerVideoModel

from effsam3.benchmarks.jaccard import DavisScorer, ObjectScore, SavScorer, mean_scores, region_similarity
from effsam3.benchmarks.pictures.videos import ContactSheet
from effsam3.benchmarks.results import Results
from effsam3.benchmarks.speed import device_name
from effsam3.benchmarks.tables import Column, percent, result_table
from effsam3.benchmarks.tracking import BY_MASK, Showing, TrackedFrame, TrackerRun, track
from effsam3.data.videos.mask_pngs import HIGHEST_ID
from effsam3.data.videos.vos_video import VosVideo
from effsam3.data.videos.writing import write_palette_png
from effsam3.errors import UserError, did_you_mean
from effsam3.files import atomic_folder, write_text


@dataclass(frozen=True)
class Protocol:
    """`overlap`: whether objects may share pixels; if not, all masks of a frame are written as one PNG of ids."""

    scorer: type[DavisScorer] | type[SavScorer]
    overlap: bool


PROTOCOLS = {"davis": Protocol(DavisScorer, overlap=False), "sav": Protocol(SavScorer, overlap=True)}


@dataclass
class Tally:
    """What one tracker has done, on one video or on all."""

    scores: dict[tuple[str, int], ObjectScore | None] = field(default_factory=dict)
    agreement: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    most_tokens: int = 0
    stored_bytes: int = 0
    tracked: int = 0
    object_frames: int = 0

    def add(self, other: Tally) -> None:
        """Take in another video's tally."""
        self.scores |= other.scores
        self.agreement += other.agreement
        self.seconds += other.seconds
        self.most_tokens = max(self.most_tokens, other.most_tokens)
        self.stored_bytes += other.stored_bytes
        self.tracked += other.tracked
        self.object_frames += other.object_frames

    def summary(self) -> dict:
        """Return the numbers that `vos` returns for a tracker."""
        scored = [score for score in self.scores.values() if score is not None]
        return mean_scores(scored) | {
            "unscored": len(self.scores) - len(scored),
            "agreement": float(np.mean(self.agreement)),
            "frames_per_s": 1 / statistics.median(self.seconds or [math.nan]),
            "memory_tokens": self.most_tokens,
            "bytes_per_object": self.stored_bytes / self.tracked,
            "bytes_per_object_frame": self.stored_bytes / self.object_frames,
        }


def vos(
    trackers: dict[str, Sam3TrackerVideoModel],
    videos: Iterable[VosVideo],
    protocol: str,
    *,
    showing: Showing = BY_MASK,
    appearing_later: bool = False,
    predictions: Path | None = None,
    pictures: Path | None = None,
    max_pictures: int = 4,
) -> dict:
    """Track and score the objects of `videos` with each of `trackers` ({name: model}).

    A video that cannot be read, tracked or scored is left out for all trackers, and named in `failed`.

    Args:
        protocol: `davis` (each pixel goes to the object of the highest logit; ids that a PNG of ids cannot hold, such
            as SA-V's 0, make the video's objects count from 1) or `sav` (objects may overlap).
        showing: how each object is shown to the trackers.
        appearing_later: also track objects that the video's first annotated frame does not show, each from the first
            annotated frame that does; otherwise they are only counted. DAVIS scores no such objects.
        predictions: a folder for the masks of all frames, `<tracker>/<video>/...` as the official evaluators read it.
        pictures: a folder for contact sheets of the first `max_pictures` videos.

    Returns:
        `protocol`, `prompt` (its kind), `device`; `videos` scored; `failed` {video: reason}; `appearing_later`, the
        number of objects left out; `objects`, one row for each tracker and object. `trackers` has for each name the
        means of `jaccard.mean_scores` and `unscored` (objects absent from all frames that count); `agreement`, the
        mean J with the first tracker's masks; `frames_per_s`, by the median time of a frame with all its objects and
        no prompt (NaN if there is none); `memory_tokens`, the most that one object attended to; `bytes_per_object`,
        what a session holds at the end of a video, and `bytes_per_object_frame`, the same for each frame that was
        tracked.

    Raises:
        UserError: an unknown protocol, no video is left, or no object of any can be scored.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol: there is no {protocol!r}{did_you_mean(protocol, PROTOCOLS)}")
    rules = PROTOCOLS[protocol]
    tallies = {name: Tally() for name in trackers}
    failed: dict[str, str] = {}
    count, left_out = 0, 0
    for video in videos:
        try:
            if not rules.overlap and not all(0 < number <= HIGHEST_ID for number in video.objects):
                video = video.numbered_from_one()  # SA-V's objects begin at 0, which is background in DAVIS' PNGs
            with ExitStack() as folders:  # an error leaves what an earlier run has predicted
                keepers: list[PredictionFolder | ContactSheet] = []
                into = {} if predictions is None else {name: predictions / name / video.name for name in trackers}
                for name, target in into.items():
                    folder = folders.enter_context(atomic_folder(target))
                    keepers.append(PredictionFolder(folder, video, name, rules.overlap))
                if pictures is not None and count < max_pictures:
                    keepers.append(ContactSheet(pictures / f"{video.name}.png", video.name, video.annotated))
                found, later = _one_video(trackers, video, rules, showing, appearing_later, keepers)
                scores = {
                    name: {number: score for (_, number), score in tally.scores.items()}
                    for name, tally in found.items()
                }
                for keeper in keepers:
                    keeper.finish(scores)
        except (UserError, OSError) as error:
            failed[video.name] = str(error)
            continue
        for name, tally in found.items():
            tallies[name].add(tally)
        count, left_out = count + 1, left_out + later
    if not count:
        reason = next(iter(failed.values()), "there are none")
        raise UserError(f"none of the {len(failed)} videos could be scored; the first: {reason}")
    if not any(score for tally in tallies.values() for score in tally.scores.values()):
        kept = "set evaluate.predictions=true" if predictions is None else f"the predictions are in {predictions}"
        raise UserError(
            f"none of the {count} videos has the masks that scores take, of three frames or more, with an object in "
            f"between; where a server scores (MOSE and YouTube-VOS, valid) it takes predictions: {kept}"
        )
    return {
        "protocol": protocol,
        "prompt": showing.kind,
        "device": device_name(next(iter(trackers.values())).device),
        "videos": count,
        "failed": failed,
        "appearing_later": left_out,
        "trackers": {name: tally.summary() for name, tally in tallies.items()},
        "objects": [
            {"tracker": name, "video": video, "object": number, "J&F": (score.J + score.F) / 2} | asdict(score)
            for name, tally in tallies.items()
            for (video, number), score in tally.scores.items()
            if score is not None
        ],
    }


def _one_video(
    trackers: dict[str, Sam3TrackerVideoModel],
    video: VosVideo,
    rules: Protocol,
    showing: Showing,
    appearing_later: bool,
    keepers: list,
) -> tuple[dict[str, Tally], int]:
    """Return each tracker's tally, and how many objects of the video were left out."""
    about = (video.frames, video.size, rules.overlap, showing, video.name)
    runs = {name: TrackerRun(tracker, *about) for name, tracker in trackers.items()}
    tallies = {name: Tally() for name in trackers}
    scorers = {name: rules.scorer(video.name) for name in trackers}
    empty_HW = np.zeros(video.size, dtype=bool)
    shown: set[int] = set()
    tracked: set[int] = set()
    for frame in track(runs, video, appearing_later):
        tracked |= frame.prompted
        for keeper in keepers:
            keeper.add(frame)
        if frame.truths is None:
            continue
        shown |= {number for number, mask in frame.truths.items() if mask.any()}
        first, *_ = frame.masks.values()
        for name, masks in frame.masks.items():
            scorers[name].add(frame.truths, dict.fromkeys(frame.truths, empty_HW) | masks)
            after = masks.keys() - frame.prompted
            tallies[name].agreement += [region_similarity(masks[number], first[number]) for number in after]
    left_out = shown - tracked
    for name, run in runs.items():
        # SA-V scores what is tracked; DAVIS has named its objects after the first frame, tracked or not.
        scores = scorers[name].scores()
        if rules.scorer is SavScorer:
            scores = {number: score for number, score in scores.items() if number in tracked}
        tallies[name].scores = {(video.name, number): score for number, score in scores.items()}
        tallies[name].seconds, tallies[name].most_tokens = run.seconds, run.most_tokens
        tallies[name].stored_bytes, tallies[name].object_frames = run.stored_bytes(), run.object_frames
        tallies[name].tracked = len(tracked)
    return tallies, len(left_out)


class PredictionFolder:
    """One tracker's masks of one video as PNGs: `<object>/<frame>.png`, or one of ids, `<frame>.png`.

    A frame's PNG has the name of its image, as the annotated masks do, for the official evaluators pair files by name.
    The folder of all videos' folders is the `pred_root` of the official evaluators.
    """

    def __init__(self, folder: Path, video: VosVideo, tracker: str, per_object: bool):
        """`folder` is that of the video, empty."""
        self.folder, self.files, self.size = folder, [f"{name}.png" for name in video.frame_names], video.size
        self.video, self.tracker, self.per_object = video.name, tracker, per_object
        self.written: list[str] = []

    def add(self, frame: TrackedFrame) -> None:
        """Write a frame's masks."""
        masks = frame.masks[self.tracker]
        if not self.per_object and max(masks, default=0) > HIGHEST_ID:
            raise UserError(
                f"{self.video}: {len(masks)} objects do not fit into PNGs of ids, which end at {HIGHEST_ID}; set "
                "evaluate.evaluator: sav, which writes a PNG for each object, or evaluate.predictions: false"
            )
        file = self.files[frame.index]
        self.written.append(file)
        if self.per_object:
            for number, mask in masks.items():
                folder = self.folder / f"{number:03d}"
                folder.mkdir(exist_ok=True)
                Image.fromarray(mask).save(folder / file)
            return
        ids = np.zeros(self.size, np.uint8)
        for number, mask in masks.items():
            ids[mask] = number
        write_palette_png(ids, self.folder / file)

    def finish(self, _) -> None:
        """Put empty masks where an object had not been shown yet."""
        for folder in (folder for folder in self.folder.iterdir() if folder.is_dir()):
            for file in (file for file in self.written if not (folder / file).exists()):
                Image.fromarray(np.zeros(self.size, bool)).save(folder / file)


def add_vos(
    results: Results,
    trackers: dict[str, Sam3TrackerVideoModel],
    videos: Sequence[VosVideo],
    asked: Any,
    folder: Path,
    showing: Showing = BY_MASK,
) -> None:
    """Measure trackers as a section `evaluate` asks for it, and add it to the results of the run in `folder`."""
    result = vos(
        trackers,
        videos[: asked.max_videos],
        asked.evaluator,
        showing=showing,
        appearing_later=asked.appearing_later,
        predictions=folder / "eval" / "predictions" if asked.predictions else None,
        pictures=folder / "pictures",
        max_pictures=asked.pictures,
    )
    result["available"] = len(videos)
    write_objects(result, folder / "eval" / "objects.csv")
    results.add("vos", result)
    results.pictures = sorted((folder / "pictures").glob("*.png"))


def vos_tables(results: dict[str, dict]) -> list[str]:
    """Return what `add_vos` has found as Markdown, and what it has left out."""
    result = results["vos"]
    parts, tracked = [vos_table(result)], result["videos"] + len(result["failed"])
    if tracked < result["available"]:
        parts.append(f"The first {tracked} of {result['available']} videos (evaluate.max_videos).")
    return parts


def write_objects(result: dict, path: Path) -> None:
    """Write `objects` of a result of `vos` as CSV, one line for each tracker, video and object; scores are 0..1."""
    text = io.StringIO()
    writer = csv.DictWriter(text, result["objects"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["objects"])
    write_text(path, text.getvalue())


def vos_table(result: dict) -> str:
    """A result of `vos` as a Markdown table, a row for each tracker, and a line on what is missing from it."""
    trackers = result["trackers"]
    first = next(iter(trackers))
    columns: list[Column] = [
        *((key, key, percent) for key in ("J&F", "J", "F")),
        (f"J with {first}", "agreement", percent),
        ("frames/s", "frames_per_s", "{:.1f}".format),
        ("memory tokens", "memory_tokens", str),
        ("MiB per object", "bytes_per_object", lambda size: f"{size / 2**20:.2f}"),
        ("KiB per object and frame", "bytes_per_object_frame", lambda size: f"{size / 2**10:.1f}"),
    ]
    objects = trackers[first]["objects"]
    title = f"{result['protocol']}, {result['videos']} videos, {objects} objects, {result['device']}"
    # Results of earlier versions do not say it.
    if (prompt := result.get("prompt", "mask")) != "mask":
        title += f", shown by {prompt}"
    lines = [result_table(title, trackers, columns)]
    if result["failed"]:
        lines.append(f"Left out: {len(result['failed'])} videos ({', '.join(result['failed'])}).")
    if result["appearing_later"]:
        lines.append(f"Not tracked: {result['appearing_later']} objects that the first annotated frame does not show.")
    unscored = max(one["unscored"] for one in trackers.values())
    if unscored:
        lines.append(f"Not scored: {unscored} objects that are in no annotated frame that counts.")
    return "\n\n".join(lines)
