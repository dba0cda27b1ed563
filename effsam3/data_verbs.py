# SPDX-License-Identifier: Apache-2.0
"""The verbs that prepare data: their rows of the table of verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from effsam3.verb import Verb, arg, count


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


STORE = arg("root", type=Path, metavar="STORE", help="folder of the store")
WORKERS = arg("--workers", type=count, help="processes (default: one per core)")
INDEX = arg("--out", required=True, type=Path, help="the index to write, .parquet")
SPEED = {"choices": ("decode", "header"), "default": "decode"}
RESUMES = "The same command resumes after an interruption."

DATA_VERBS = {
    "index sa1b": Verb(
        "index SA-1B, or any photographs, for training",
        index_sa1b,
        [
            arg("sources", metavar="SOURCE", nargs="+", type=Path, help="folder or .tar"),
            INDEX,
            arg("--val-fraction", type=float, default=0.1, help="share held out, by a hash of the key (default 0.1)"),
            arg(
                "--own",
                action="store_true",
                help="photographs of your own: named by their paths, divided by their content, copies left out; what "
                "data.source: folder does by itself",
            ),
            WORKERS,
            arg(
                "--check",
                **SPEED,
                help="decode every image to its end (default), or read headers, which does not notice truncated ones",
            ),
            arg("--min-side", type=int, default=16, help="pixels of the shorter side (default 16)"),
            arg("--max-pixels", type=int, default=178_956_970, help="of an image (default: Pillow's limit)"),
        ],
        more=": folders (also images/{train,val} + annotations/{train,val}), tars as downloaded (read in place), or "
        f"folders of tars. {RESUMES}",
    ),
    "index sav": Verb(
        "index SA-V's training set",
        index_sav,
        [
            arg("sources", metavar="FOLDER", nargs="+", type=Path, help="searched with its subfolders"),
            INDEX,
            arg("--val-fraction", type=float, default=0.02, help="share held out, by a hash of the id (default 0.02)"),
            WORKERS,
            arg(
                "--check",
                **SPEED,
                help="decode every video to its end (default), or only count frames, which does not notice damage",
            ),
        ],
        more=": folders with <id>_manual.json, <id>_auto.json and <id>.mp4, or folders <id> of the frames that "
        f"`effsam3 extract frames` writes. {RESUMES}",
    ),
    "fetch recap": Verb(
        "download captions of Recap-DataComp-1B",
        "data.captions.fetch:fetch",
        [
            arg("--out", required=True, type=Path, help="folder for the parquet files"),
            arg("--fraction", type=float, default=0.01, help="of the train files (default 0.01)"),
            arg("--repo", help="dataset on the Hub (default: Recap-DataComp-1B)"),
            arg("--revision", help="commit, branch or tag (default: the newest)"),
            arg("--verify", action="store_true", help="also check the files that are already there"),
        ],
        more=": the first 1 % of its train files, about 9 million captions. The same command, or one with a larger "
        "fraction, keeps whole files. HF_ENDPOINT names a mirror, HF_TOKEN (or `hf auth login`) a login.",
    ),
    "extract frames": Verb(
        "extract frames of videos as JPEGs",
        extract_frames,
        [
            arg("sources", metavar="VIDEO_OR_FOLDER", nargs="+", type=Path, help="folders with subfolders"),
            arg("--out", required=True, type=Path, help="folder for a folder of frames per video"),
            arg(
                "--every", type=int, default=4, metavar="N", help="frames 0, N, 2N ... (default 4: 24 to 6 per second)"
            ),
            arg("--quality", type=int, default=95, help="of the JPEGs, 1 to 95 (default 95)"),
            WORKERS,
        ],
        more=", FOLDER/<video>/<number of the frame>.jpg: every fourth frame of SA-V's 24 per second are the "
        "annotated ones. A video's folder appears when it is complete; run again, complete ones are kept.",
    ),
    "store show": Verb("tell what a store of embeddings holds", "data.store.tool:show", [STORE]),
    "store verify": Verb(
        "read every record of a store and compare its checksum",
        store_verify,
        [
            STORE,
            arg(
                "--index",
                type=Path,
                help="also read every image of this index and check that its features are of these bytes",
            ),
        ],
    ),
    "store import": Verb(
        "make upstream's rank*-values.bin readable without copying them",
        "data.store.tool:import_",
        [
            arg("source", type=Path, help="folder that upstream's exporter wrote"),
            arg("root", type=Path, help="new folder for the manifest"),
            arg("--channels", type=int, help="channels of a record, where its size is not a known one"),
            arg("--grid", type=int, help="rows and columns of a record, given with --channels"),
        ],
    ),
}
