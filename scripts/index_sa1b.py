# SPDX-License-Identifier: Apache-2.0
"""python scripts/index_sa1b.py SOURCE [SOURCE ...] --out data/sa1b-1p.parquet

Index SA-1B, or any photographs, for training: folders (also images/{train,val} + annotations/{train,val}), tars as
downloaded (read in place), or folders of tars. Run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effsam3.data.images.index import build_index, summary
from effsam3.data.images.sa1b import MAX_PIXELS
from effsam3.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="folder or .tar")
    parser.add_argument("--out", required=True, type=Path, help="the index to write, .parquet")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share held out, by a hash of the key (default 0.1)"
    )
    own_help = "photographs of your own: named by their paths, divided by their content, copies left out"
    parser.add_argument("--own", action="store_true", help=f"{own_help}; what data.source: folder does by itself")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--check",
        choices=("decode", "header"),
        default="decode",
        help="decode every image to its end, or read headers only: fast, and truncated images pass (default decode)",
    )
    parser.add_argument("--min-side", type=int, default=16, help="pixels of the shorter side (default 16)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=f"of an image (default {MAX_PIXELS})")
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
