# SPDX-License-Identifier: Apache-2.0
"""Extract frames of videos as JPEGs, in parallel: training from them needs no decoder and no seeking."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from PIL import Image

from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.decoder import pictures_in_a_row
from effsam3.data.videos.files import VIDEO_EXTENSIONS
from effsam3.data.workers import run_jobs
from effsam3.errors import UserError
from effsam3.files import atomic_folder, stamp


def extract_frames(
    sources: list[Path],
    out: Path,
    every: int = 4,
    quality: int = 95,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[int, int, list[str]]:
    """Write `out`/<video>/<number>.jpg for frames 0, `every`, 2 `every` ... of the videos in files and folders.

    A video's folder appears when it is complete; complete ones are kept.

    Returns:
        How many videos were extracted, how many were there, and what is wrong with the others.

    Raises:
        UserError: sources or values that cannot be used, a folder with frames of other values, or a worker that was
            killed.
    """
    if every < 1 or not 1 <= quality <= 95:
        raise UserError(f"--every {every} must be 1 or more, --quality {quality} from 1 to 95")
    videos = list_videos(sources)
    stamp(out / ".extracted.json", {"every": every, "quality": quality}, "frames", "--out")
    # A folder is there only once it is complete, so its name is all that a resumed run must look at.
    waiting = {name: path for name, path in videos.items() if not (out / name).is_dir()}
    jobs = [(path, out / name, every, quality) for name, path in waiting.items()]
    bad = list(itertools.chain(*run_jobs(_extract, jobs, workers or os.cpu_count() or 1, "videos", progress)))
    return len(waiting) - len(bad), len(videos) - len(waiting), bad


def list_videos(sources: list[Path]) -> dict[str, Path]:
    """Return the videos of files and folders by their names, which become folders.

    Raises:
        UserError: a source that is not there, two videos of one name, or none.
    """
    videos: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} does not exist; give videos or folders of them")
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.suffix.lower() in VIDEO_EXTENSIONS and not path.name.startswith("."):
                if videos.setdefault(path.stem, path).resolve() != path.resolve():
                    raise UserError(
                        f"{videos[path.stem]} and {path} would be the same folder; give them one at a time"
                    )
    if not videos:
        raise UserError(f"no video ({', '.join(VIDEO_EXTENSIONS)}) in {', '.join(map(str, sources))}")
    return videos


def _extract(path: Path, folder: Path, every: int, quality: int) -> list[str]:
    """Write a video's frames; return [what is wrong] instead when it cannot be read to its end."""
    try:
        with atomic_folder(folder) as partial:
            for number, image_HW3 in pictures_in_a_row(path, every):
                Image.fromarray(image_HW3).save(partial / f"{number:05d}.jpg", quality=quality)
    except Unreadable as error:
        return [str(error)]
    return []
