# SPDX-License-Identifier: Apache-2.0
"""The rows of the table of verbs that are about data: indexes, downloads, stores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from effsam3.verb import Verb, arg, count, flag


def index_sa1b(**options: Any) -> str:
    """Index photographs."""
    from effsam3.data.images import index

    return _index(index, options)


def index_sav(**options: Any) -> str:
    """Index videos."""
    from effsam3.data.videos import index

    return _index(index, options)


def _index(index: Any, options: dict[str, Any]) -> str:
    out, report = options["out"], index.build_index(**options)
    return (
        f"{index.summary(report)}\nindex   {out}  ({report['seconds']} s)\n"
        f"report  {out.with_name(out.stem + '.report.json')}"
    )


def extract_frames(out: Path, **options: Any) -> int:
    """Extract frames; 1 where a video could not be read."""
    from effsam3.data.videos.extract_frames import extract_frames as extract

    extracted, kept, bad = extract(out=out, **options)
    for name in bad:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{extracted} videos extracted to {out}, {kept} were there, {len(bad)} could not be read")
    return 1 if bad else 0


def store_verify(root: Path, index: Path | None) -> int:
    """Verify a store, and the images of an index; 1 where anything is damaged."""
    from effsam3.data.store.tool import verify, verify_images

    damaged = verify(root)
    return damaged if index is None else max(damaged, verify_images(root, index))


# ---- arguments that several verbs have

STORE = arg("root", "folder of the store", type=Path, metavar="STORE")
WORKERS = arg("--workers", "processes (default: one per core)", type=count)
INDEX = arg("--out", "the index to write, .parquet", required=True, type=Path)
SPEED: dict[str, Any] = {"choices": ("decode", "header"), "default": "decode"}
VIDEOS = arg("path", "JSON or folder, as data.path of a recipe takes it", type=Path, metavar="PATH")
SPLIT = arg("--split", "only the videos of this list, <PATH>/NAME.txt or in ImageSets", metavar="NAME")
RESUMES = "The same command resumes after an interruption."

DATA_VERBS = {
    "data check": Verb(
        "recognise videos, images with masks or annotated phrases, count them, and list all that is wrong with them",
        "data_check:run",
        [
            VIDEOS,
            arg(
                "--as", "what a COCO JSON does not always tell", dest="kind", choices=("videos", "images", "concepts")
            ),
            SPLIT,
            arg("--images", "as data.images: the folder of the images of a COCO JSON", type=Path, metavar="FOLDER"),
            arg("--view", "as data.view: the column of the images' views", metavar="COLUMN"),
            arg("--pictures", "a contact sheet with masks to draw, .png", type=Path, metavar="FILE"),
            arg("--json", "the whole report", type=Path, metavar="FILE"),
        ],
        more=", before training does. They are read as training reads them. The exit code is 1 if something hurts "
        "training. docs/data_check.md explains what is found.",
    ),
    "data convert": Verb(
        "write videos with masks in another format",
        "data_convert:run",
        [
            VIDEOS,
            arg("--to", "the format", required=True, choices=("coco_video", "youtube_vis", "sav", "davis")),
            arg("--out", "the new folder", required=True, type=Path, metavar="FOLDER"),
            arg(
                "--frames",
                "copy them (default), link to them, or none",
                choices=("copy", "link", "none"),
                default="copy",
            ),
            SPLIT,
            flag("--lossy", "write it even if the format cannot hold everything; what is lost is listed"),
        ],
        more=". Nothing is written if something would be lost, unless --lossy allows it. docs/data_check.md tells "
        "what each format can hold.",
    ),
    "index sa1b": Verb(
        "index SA-1B, or any photographs, for training",
        index_sa1b,
        [
            arg("sources", "folder or .tar", metavar="SOURCE", nargs="+", type=Path),
            INDEX,
            arg("--val-fraction", "share held out, by a hash of the key (default 0.1)", type=float, default=0.1),
            flag("--own", "photographs of your own: named by path, divided by content, copies left out"),
            WORKERS,
            arg("--check", "decode every image (default), or read headers only: truncated ones pass", **SPEED),
            arg("--min-side", "pixels of the shorter side (default 16)", type=int, default=16),
            arg("--max-pixels", "of an image (default: Pillow's limit)", type=int, default=178_956_970),
        ],
        more=": folders (also images/{train,val} + annotations/{train,val}), tars as downloaded (read in place), or "
        f"folders of tars. {RESUMES}",
    ),
    "index sav": Verb(
        "index SA-V's training set",
        index_sav,
        [
            arg("sources", "searched with its subfolders", metavar="FOLDER", nargs="+", type=Path),
            INDEX,
            arg("--val-fraction", "share held out, by a hash of the id (default 0.02)", type=float, default=0.02),
            WORKERS,
            arg("--check", "decode every video (default), or only count frames: damage passes", **SPEED),
        ],
        more=": folders with <id>_manual.json, <id>_auto.json and <id>.mp4, or folders <id> of the frames that "
        f"`effsam3 extract frames` writes. {RESUMES}",
    ),
    "fetch recap": Verb(
        "download captions of Recap-DataComp-1B",
        "data.captions.fetch:fetch",
        [
            arg("--out", "folder for the parquet files", required=True, type=Path),
            arg("--fraction", "of the train files (default 0.01)", type=float, default=0.01),
            arg("--repo", "dataset on the Hub (default: Recap-DataComp-1B)"),
            arg("--revision", "commit, branch or tag (default: the newest)"),
            flag("--verify", "also check the files that are already there"),
        ],
        more=": the first 1 % of its train files, about 9 million captions. The same command, or one with a larger "
        "fraction, keeps whole files. HF_ENDPOINT names a mirror, HF_TOKEN (or `hf auth login`) a login.",
    ),
    "extract frames": Verb(
        "extract frames of videos as JPEGs",
        extract_frames,
        [
            arg("sources", "folders with subfolders", metavar="VIDEO_OR_FOLDER", nargs="+", type=Path),
            arg("--out", "folder for a folder of frames per video", required=True, type=Path),
            arg("--every", "frames 0, N, 2N ... (default 4: 24 to 6 per second)", type=int, default=4, metavar="N"),
            arg("--quality", "of the JPEGs, 1 to 95 (default 95)", type=int, default=95),
            WORKERS,
        ],
        more=", FOLDER/<video>/<number of the frame>.jpg: every fourth frame of SA-V's 24 per second are the "
        "annotated ones. A video's folder appears when it is complete; run again, complete ones are kept.",
    ),
    "store show": Verb("tell what a store of embeddings holds", "data.store.tool:show", [STORE]),
    "store verify": Verb(
        "read every record of a store and compare its checksum",
        store_verify,
        [STORE, arg("--index", "also compare the bytes of every image of this index", type=Path)],
    ),
    "store import": Verb(
        "make upstream's rank*-values.bin readable without copying them",
        "data.store.tool:import_",
        [
            arg("source", "folder that upstream's exporter wrote", type=Path),
            arg("root", "new folder for the manifest", type=Path),
            arg("--channels", "channels of a record, where its size is not a known one", type=int),
            arg("--grid", "rows and columns of a record, given with --channels", type=int),
        ],
    ),
}
