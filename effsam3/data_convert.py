# SPDX-License-Identifier: Apache-2.0
"""The verb `data convert`: write videos with masks in another format, losing nothing unless that is asked for.

effsam3 data convert walks.json --to davis --out data/walks
effsam3 data convert data/DAVIS --to coco_video --out data/davis_json --frames link
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from effsam3.data.problems import amount
from effsam3.data.videos.vos import open_vos
from effsam3.data.videos.writing import LOSSES, WRITERS, Writer, put_frames
from effsam3.errors import UserError
from effsam3.files import atomic_folder, refuse_unwritable


def run(path: Path, to: str, out: Path, frames: str = "copy", split: str | None = None, lossy: bool = False) -> str:
    """Write the videos of `path` into the new folder `out`, which appears when it is complete.

    Args:
        path: as `open_vos`.
        to: a key of WRITERS.
        frames: copy, link (symbolic links) or none.
        lossy: write even what the format cannot hold completely.

    Returns:
        What was written, and what was lost.

    Raises:
        UserError: data that cannot be read, a folder that is there, or something would be lost.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is there; name a new folder")
    refuse_unwritable(out, "--out")
    waiting = open_vos(path, split)[::-1]
    count, masks = len(waiting), 0
    with atomic_folder(out) as partial, tqdm(total=count, unit="video", disable=None) as progress:
        writer = WRITERS[to](partial)
        while waiting:
            video = waiting.pop()  # so that no more than one is in memory
            files = writer.add(video)
            masks += len(video.annotated)
            if frames != "none" and (lossy or not writer.lost):  # else only the losses are left to count
                put_frames(video, files, partial, frames, writer.keeps_mp4)
            progress.update()
        writer.close()
        if writer.lost and not lossy:
            advice = "Give --lossy to write the rest, or another --to"
            raise UserError(f"--to {to} cannot hold all of {path}:\n{losses(writer)}\n{advice}")
    are = "is" if count == 1 else "are"
    text = f"{amount(count, 'video')} with {amount(masks, 'annotated frame')} {are} in {out} as {to}"
    if writer.renamed:
        text += f"\nnew names and ids of {amount(len(writer.renamed), 'video')}: {out / 'renamed.json'}"
    return text + (f"\nlost:\n{losses(writer)}" if writer.lost else "")


def losses(writer: Writer) -> str:
    """Return a line for each kind of loss."""
    return "\n".join(
        f"  {count} {LOSSES[reason]} (first: {writer.first[reason]})" for reason, count in writer.lost.items()
    )
