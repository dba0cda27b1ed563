# SPDX-License-Identifier: Apache-2.0
"""The verb `data check`: recognise data, count what is in it, and list everything that is wrong, before training.

effsam3 data check data/walks --pictures walks.png
effsam3 data check annotations.json --json report.json
"""

from __future__ import annotations

import contextlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from effsam3.benchmarks.pictures.drawing import CELL_WIDTH, contact_sheet, evenly, paint, save_png
from effsam3.data.concepts.files import looks_like_concepts
from effsam3.data.concepts.training import instances_of, open_asked
from effsam3.data.images import pairs
from effsam3.data.images.checking import check_pairs
from effsam3.data.images.pair_batches import MOST_INSTANCES
from effsam3.data.images.pairs import Pair
from effsam3.data.problems import Note, amount, meaning, problems_of
from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.checking import VideoCheck, check_video
from effsam3.data.videos.coco_video import tells_of_videos
from effsam3.data.videos.vos import FORMATS, JSON_FORMATS, open_frames, open_vos, recognise
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError
from effsam3.files import refuse_unwritable, write_json
from effsam3.models.text.tokens import Tokenizer

SHOWN = 3  # of each kind of problem
SHEET_VIDEOS, SHEET_FRAMES = 12, 4  # on the contact sheet, whose rows have four pictures
Panel = tuple[str, np.ndarray, dict[int, np.ndarray]]  # title, image (H, W, 3), masks
BLANK: Panel = ("", np.full((1, 1, 3), 255, np.uint8), {})
LEAST_WIDTH = 200  # pixels of a picture on the sheet: its title needs them


@dataclass(frozen=True)
class Report:
    """What is known of data; `panels` are what the contact sheet shows."""

    format: str
    counts: dict[str, Any]
    lines: list[str]  # the same in words
    problems: list[Note]
    recipe: str | None  # shipped one that fits; None: nothing could be read
    keys: dict[str, Any]  # for it
    panels: Iterator[Panel]


def run(
    path: Path,
    kind: str | None = None,
    split: str | None = None,
    images: Path | None = None,
    view: str | None = None,
    pictures: Path | None = None,
    json: Path | None = None,
) -> int:
    """Print what is in `path` and what is wrong with it.

    Args:
        path: what `data.path` of a recipe may be.
        kind: videos, images or concepts; None: what it looks like.
        split: only the videos of this list.
        images, view: as `data.images` and `data.view` of a recipe.
        pictures: a PNG to draw.
        json: a file for the whole report.

    Returns:
        1 if something hurts training, else 0.

    Raises:
        UserError: there is nothing, or nothing known.
    """
    for file, option in ((pictures, "--pictures"), (json, "--json")):
        if file is not None:
            refuse_unwritable(file.parent, option)
    kind = kind or recognised(path)
    if kind == "concepts":
        report = of_concepts(path, images)
    elif kind == "images":
        report = of_images(path, images, view)
    else:
        report = of_videos(path, split)
    print(f"{path}: {report.format}")
    print("\n".join(f"  {line}" for line in report.lines))
    print(listing(report.problems, json))
    if report.recipe is not None:
        print(f"for a recipe (effsam3 new NAME --from {report.recipe}):")
        print("\n".join(f"  {key}: {value}" for key, value in report.keys.items()))
    if pictures is not None:
        draw(report.panels, pictures)
    if json is not None:
        rows = [{**one._asdict(), "hurts": one.hurts} for one in report.problems]
        about = {"path": str(path), "format": report.format, "counts": report.counts}
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, {**about, "problems": rows, "recipe": report.recipe, "keys": report.keys})
    return int(any(problem.hurts for problem in report.problems))


def recognised(path: Path) -> str:
    """Return what data look like: concepts (only if they have phrases, as COCO's may be either), images or videos."""
    if looks_like_concepts(path):
        return "concepts"
    return "images" if looks_like_images(path) else "videos"


def looks_like_images(path: Path) -> bool:
    """Say whether data are images with masks rather than videos.

    A COCO JSON may be either: frames are known by a video, a place in it, or objects that are followed.
    """
    if pairs.recognise(path) is None:
        return False
    if path.is_dir() and (path / pairs.MASKS).is_dir():
        return True
    return not tells_of_videos(recognise(path).content)


def of_images(path: Path, images: Path | None, view: str | None) -> Report:
    """Read all images and their masks."""
    opened: list[Pair] = []
    problems: list[Note] = []
    kind = pairs.recognise(path)
    try:
        opened, notes = pairs.open_pairs(path, images, view)
        problems += notes
    except UserError as fault:
        if kind is None or images is not None or view is not None:
            raise
        problems += problems_of(fault, str(path), "not_opened")
    check = check_pairs(tqdm(opened, unit="image", disable=None))
    keys: dict[str, Any] = {"data.path": str(path)}
    keys |= {f"data.{name}": str(value) for name, value in (("images", images), ("view", view)) if value is not None}
    keys |= {"data.objects": max(1, min(check.most, 8))}
    counts: dict[str, Any] = {
        "images": check.images,
        "empty_images": check.empty,
        "objects": check.objects,
        "most_on_an_image": check.most,
        "categories": dict(check.categories.most_common()),
        "views": dict(check.views.most_common()),
        "sizes": sizes(check.sizes.elements()),
    }
    lines = [
        f"{amount(check.images, 'image')}, {check.empty / max(check.images, 1):.0%} of them without an object",
        f"pixels: {most_common(counts, 'sizes')}",
        f"{amount(check.objects, 'object')}, at most {check.most} on an image",
        *(f"{name}: {most_common(counts, name)}" for name in ("categories", "views") if any(counts[name])),
    ]
    fits = "adapt/lora" if check.objects or check.empty else None
    return Report(
        f"images with masks: {kind}", counts, lines, problems + check.problems, fits, keys, image_panels(opened)
    )


def of_concepts(path: Path, folder: Path | None) -> Report:
    """Read all phrases as stage concepts does, and look for the images."""
    folders = [] if folder is None else [folder]
    opened, problems = open_asked(path, folders, Tokenizer().why_not, MOST_INSTANCES, "data.path")
    for image in tqdm(opened, unit="image", disable=None):
        try:
            image.subset.read_image(image.name, image.size)
        except Unreadable as fault:
            problems += problems_of(fault, image.name)
    present = [pair for image in opened for pair in image.present]
    counts: dict[str, Any] = {
        "images": len(opened),
        "phrases_there": len(present),
        "phrases_absent": sum(len(image.absent) for image in opened),
        "different_phrases": len({pair.phrase for pair in present}),
        "instances": sum(len(instances_of(pair)) for pair in present),
        "sizes": sizes(image.size for image in opened),
    }
    lines = [
        f"{amount(counts['images'], 'image')}; pixels: {most_common(counts, 'sizes')}",
        f"{counts['phrases_there']} phrases that are there ({counts['different_phrases']} different ones, "
        f"{counts['instances']} instances), {counts['phrases_absent']} that were looked for and are not",
    ]
    keys: dict[str, Any] = {"data.path": str(path)} | ({"data.images": f"[{folder}]"} if folder else {})
    return Report("images with annotated phrases", counts, lines, problems, None, keys, iter(()))


def of_videos(path: Path, split: str | None) -> Report:
    """Read all videos, one after the other."""
    tree = recognise(path)
    checks: list[VideoCheck] = []
    waiting: list[VosVideo] = []
    problems: list[Note] = []
    try:
        waiting = (open_frames(path) if tree.format == "frames" else open_vos(path, split))[::-1]
    except UserError as fault:  # of what is known by its form
        if split is not None and not isinstance(fault, Unreadable):
            raise
        problems += problems_of(fault, str(tree.path), "not_opened")
    shown = {waiting[place].name for place in evenly(list(range(len(waiting))), SHEET_VIDEOS)}
    kept = []
    with tqdm(total=len(waiting), unit="video", disable=None) as progress:
        while waiting:
            video = waiting.pop()  # what is read of it goes with it
            checks.append(check_video(video))
            problems += checks[-1].problems
            kept += [video] if video.name in shown else []
            progress.update()
    if tree.format == "frames":
        problems.append(Note("no_masks", str(tree.path), "data.masks=synthetic would draw shapes over them"))
    most = max((check.most for check in checks), default=1)
    lengths = [check.annotated for check in checks if check.annotated]
    keys: dict[str, Any] = {"data.path": str(path)} | ({"data.split": split} if split else {})
    keys |= {"data.frames": min(8, round(statistics.median(lengths))) if lengths else 8}
    keys |= {"data.objects": max(1, min(most, 8))}
    counts, fits = counts_of(checks), None
    if any(check.most or check.empty or (check.size and not check.annotated) for check in checks):  # could be read
        fits = "adapt/video_coco" if tree.format in JSON_FORMATS else "adapt/video_frames"
    return Report(FORMATS[tree.format], counts, video_lines(counts), problems, fits, keys, video_panels(kept))


def counts_of(checks: list[VideoCheck]) -> dict[str, Any]:
    """Return what is in videos; spans are [least, median, most]."""
    shown = [count for check in checks for count in check.shown.values() if count]
    return {
        "videos": len(checks),
        "frames": sum(check.frames for check in checks),
        "frames_of_a_video": span(check.frames for check in checks),
        "annotated_frames": sum(check.annotated for check in checks),
        "empty_frames": sum(check.empty for check in checks),
        "objects": sum(len(check.shown) for check in checks),
        "most_on_a_frame": max((check.most for check in checks), default=0),
        "object_frames": sum(shown),
        "frames_of_an_object": span(shown),
        "sizes": sizes(check.size for check in checks if check.size),
        "fps": sorted({round(check.fps, 3) for check in checks if check.fps}),
    }


def video_lines(counts: dict[str, Any]) -> list[str]:
    """Say it in words."""
    fps = f"; {', '.join(f'{rate:g}' for rate in counts['fps'])} frames a second" if counts["fps"] else ""
    empty = counts["empty_frames"] / max(counts["annotated_frames"], 1)
    most = counts["most_on_a_frame"]
    return [
        f"{amount(counts['videos'], 'video')} of {in_words(counts['frames_of_a_video'])} frames, {counts['frames']} "
        "in all",
        f"pixels: {most_common(counts, 'sizes')}{fps}",
        f"{amount(counts['annotated_frames'], 'annotated frame')}, {empty:.0%} of them without an object",
        f"{amount(counts['objects'], 'object')}, at most {most} on a frame, {amount(counts['object_frames'], 'mask')}",
        f"an object is visible on {in_words(counts['frames_of_an_object'])} frames",
    ]


def span(values: Iterable[int]) -> list[float]:
    """Return [least, median, most], or nothing of nothing."""
    found = sorted(values)
    return [found[0], statistics.median(found), found[-1]] if found else []


def in_words(span: list[float]) -> str:
    if not span:
        return "0"
    least, median, most = span
    return f"{least:g}" if least == most else f"{least:g} to {most:g} (median {median:g})"


def sizes(found: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Return {width x height: how often}, the most common first; sizes come as (rows, columns)."""
    return dict(Counter(f"{columns} x {rows}" for rows, columns in found).most_common())


def most_common(counts: dict[str, Any], kind: str) -> str:
    """Return the first of what is counted of a kind, and how many others there are."""
    counted = counts[kind]
    shown = [f"{name} ({count})" for name, count in list(counted.items())[:SHOWN]]
    more = [f"{len(counted) - SHOWN} more {kind}"] if len(counted) > SHOWN else []
    return ", ".join(shown + more) or "0"


def listing(problems: list[Note], json: Path | None) -> str:
    """Return the problems by what they mean, those that hurt first, with how many there are and the first of each."""
    kinds: dict[str, list[Note]] = defaultdict(list)
    for problem in problems:
        kinds[problem.reason].append(problem)
    lines = []
    for title, hurts in (("hurts training:", True), ("worth knowing:", False)):
        found = {reason: some for reason, some in kinds.items() if some[0].hurts == hurts}
        lines += [title] if found else []
        for reason, some in found.items():
            lines.append(f"  {len(some)} x {reason}: {meaning(reason)}")
            lines += [f"      {one.where}" + (f": {one.detail}" if one.detail else "") for one in some[:SHOWN]]
            if len(some) > SHOWN:
                where = f" in {json}" if json else "; --json FILE lists them"
                lines.append(f"      and {len(some) - SHOWN} more{where}")
    return "\n".join(lines or ["nothing is wrong with it"])


# ---- pictures


def video_panels(videos: list[VosVideo]) -> Iterator[Panel]:
    """Yield a few frames of videos; what cannot be read is listed as a problem, and left out here."""
    for video in (video.with_gaps() for video in videos):
        drawn = 0
        with contextlib.suppress(UserError):  # of a video that cannot be opened
            for index in evenly(video.annotated, SHEET_FRAMES):
                with contextlib.suppress(UserError):  # of a frame
                    (image_3HW,), masks = video.read([index]), video.masks(index)
                    yield f"{video.name[-20:]}, frame {index}", image_3HW.transpose(1, 2, 0), masks
                    drawn += 1
            video.close()
        yield from [BLANK] * (SHEET_FRAMES - drawn if drawn else 0)  # the next one begins a row


def image_panels(opened: list[Pair]) -> Iterator[Panel]:
    """Yield some of the images; what cannot be read is listed as a problem, and left out here."""
    for place in evenly(list(range(len(opened))), SHEET_VIDEOS * SHEET_FRAMES):
        with contextlib.suppress(Unreadable):
            image_HW3 = opened[place].image()
            masks = opened[place].masks(*image_HW3.shape[:2])
            yield opened[place].name[-25:], image_HW3, {number: mask for number, (_, mask) in enumerate(masks, 1)}


def draw(panels: Iterator[Panel], file: Path) -> None:
    """Draw images with their masks as one sheet."""
    cells = []
    for title, image_HW3, masks in panels:
        picture = paint(image_HW3, masks, masks) if title else Image.fromarray(image_HW3)
        picture.thumbnail((CELL_WIDTH, 2 * CELL_WIDTH))
        cells.append((title, picture))
    if not cells:
        print("pictures: none, nothing can be read")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    save_png(contact_sheet(cells, LEAST_WIDTH), file)
    print(f"pictures: {file}")
