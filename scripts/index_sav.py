# SPDX-License-Identifier: Apache-2.0
"""python scripts/index_sav.py FOLDER [FOLDER ...] --out data/sav.parquet

Index SA-V's training set: folders with <id>_manual.json, <id>_auto.json and <id>.mp4, or folders <id> of the frames
that scripts/extract_frames.py extracts. Run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effsam3.data.videos.index import build_index, summary
from effsam3.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="FOLDER", nargs="+", type=Path, help="searched with its subfolders")
    parser.add_argument("--out", required=True, type=Path, help="the index to write, .parquet")
    parser.add_argument(
        "--val-fraction", type=float, default=0.02, help="share held out, by a hash of the video's id (default 0.02)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--check",
        choices=("decode", "header"),
        default="decode",
        help="decode every video to its end, or only count its frames: fast, and damage passes (default decode)",
    )
    arguments = parser.parse_args()
    try:
        report = build_index(**vars(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the finished parts are kept: run the same command again to go on", file=sys.stderr)
        return 130
    print(summary(report))
    print(f"index   {arguments.out}  ({report['seconds']} s)")
    print(f"report  {arguments.out.with_name(arguments.out.stem + '.report.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
