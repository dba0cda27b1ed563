# SPDX-License-Identifier: Apache-2.0
"""python scripts/reorg_sa1b.py TARS_DIR OUT [--val-fraction 0.1]

Extract SA-1B's tars into OUT/images/{train,val} and OUT/annotations/{train,val}. Training does not need it: the index
reads tars in place. Run again after an interruption, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effsam3.data.images.reorganise import reorganise
from effsam3.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", metavar="TARS_DIR", type=Path, help="folder of .tar files, or one .tar")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write into")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share held out, by a hash of the key (default 0.1)"
    )
    arguments = parser.parse_args()
    try:
        report = reorganise(**vars(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished files are kept: run the same command again to go on", file=sys.stderr)
        return 130
    images = report.pop("images")
    print(f"{images['train']:,} train and {images['val']:,} val images in {arguments.out}")
    print(f"{report.pop('files'):,} files, {report.pop('already_there'):,} of them were already there")
    for kind, found in report.items():
        more = ", ..." if found["count"] > 3 else ""
        print(f"{kind.replace('_', ' ')}: {found['count']:,} ({', '.join(found['files'][:3])}{more})")
    print(f"report  {arguments.out / 'reorganise.report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
