# SPDX-License-Identifier: Apache-2.0
"""Extract SA-1B's tars into `images/{train,val}` + `annotations/{train,val}`, for tools that want that tree.

The index reads tars in place, so this trainer itself does not need it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from effsam3.data.images.sa1b import EXTENSIONS, split_of, write_atomic
from effsam3.data.images.sa1b_folders import check_sources, printable, scan_tar
from effsam3.errors import UserError
from effsam3.training.report import refuse_unwritable


class Member(NamedTuple):
    """A file in a tar and where it goes."""

    tar: Path
    offset: int  # bytes
    size: int  # bytes
    target: Path


def reorganise(tars: str | Path, out: str | Path, val_fraction: float = 0.1, progress: bool = True) -> dict:
    """Extract a tar, or all tars below a folder, into the tree `out`; the split is the index's own.

    Files that are there with the right size are kept, so that a re-run goes on where a killed one stopped.
    Returns the report that `<out>/reorganise.report.json` holds: images per split, and by kind the count and names of
    what has no partner or was refused. Raises UserError when there is no tar or nothing could be extracted.
    """
    from tqdm import tqdm

    tars, out = Path(tars), Path(out)
    check_sources([tars])
    paths = [tars] if tars.is_file() else sorted(tars.rglob("*.tar"))
    if not paths:
        raise UserError(f"no .tar below {tars}; give the folder of sa_000020.tar and its like")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must be at least 0 and below 1")

    refuse_unwritable(out, "OUT")
    members, problems = _plan(paths, out, val_fraction)
    for kind in ("images", "annotations"):
        for split in ("train", "val"):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
    kept = 0
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds; without a terminal each update is a line of a log
    with tqdm(total=len(members), desc="files", mininterval=interval, disable=not progress) as bar:
        for member in members:
            if member.target.exists() and member.target.stat().st_size == member.size:
                kept += 1
            else:
                with open(member.tar, "rb") as file:
                    file.seek(member.offset)
                    write_atomic(member.target, file.read(member.size))
            bar.update()
    images = [member.target.parent.name for member in members if member.target.parent.parent.name == "images"]
    report = {
        "images": {split: images.count(split) for split in ("train", "val")},
        "files": len(members),
        "already_there": kept,
        **{kind: {"count": len(names), "files": names} for kind, names in problems.items() if names},
    }
    write_atomic(out / "reorganise.report.json", json.dumps(report, indent=1).encode())
    if not images:
        raise UserError(f"no image in {len(paths)} tars below {tars}; see {out / 'reorganise.report.json'}")
    return report


def _plan(paths: Iterable[Path], out: Path, val_fraction: float) -> tuple[list[Member], dict[str, list[str]]]:
    members: list[Member] = []
    problems: dict[str, list[str]] = {
        kind: [] for kind in ("bad_tars", "unsafe_path", "duplicate", "images_without_json", "json_without_image")
    }
    taken: set[str] = set()
    for path in paths:
        scan = scan_tar(path)
        if scan.problem:
            problems["bad_tars"].append(f"{printable(str(path))}: {scan.problem}")
        pairs: dict[str, dict[str, Member]] = {}  # key: {"images": member, "annotations": member}
        for name, offset, size in scan.members:
            inner = PurePosixPath(name)
            kind = {".json": "annotations"} | dict.fromkeys(EXTENSIONS, "images")
            if inner.suffix.lower() not in kind or inner.name.startswith("."):
                continue
            if inner.is_absolute() or ".." in inner.parts:
                problems["unsafe_path"].append(printable(f"{path}:{name}"))
                continue
            folder = kind[inner.suffix.lower()]
            target = out / folder / split_of(printable(inner.stem), val_fraction) / inner.name
            member = Member(path, offset, size, target)
            if inner.stem in taken or folder in pairs.setdefault(inner.stem, {}):
                problems["duplicate"].append(printable(f"{path}:{name}"))
            else:
                pairs[inner.stem][folder] = member
        for key, pair in pairs.items():
            if "images" not in pair:
                problems["json_without_image"].append(printable(f"{path}:{key}.json"))
                continue
            if "annotations" not in pair:
                problems["images_without_json"].append(printable(f"{path}:{pair['images'].target.name}"))
            members.extend(pair.values())
            taken.add(key)
    return members, problems
