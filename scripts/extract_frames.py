# SPDX-License-Identifier: Apache-2.0
"""python scripts/extract_frames.py VIDEO_OR_FOLDER [...] --out FOLDER [--every 4]

Extract frames of videos as JPEGs, FOLDER/<video>/<number of the frame>.jpg: every fourth frame of SA-V's 24 per second
are the annotated ones. A video's folder appears when it is complete; run again, complete ones are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effsam3.data.videos.extract_frames import extract_frames
from effsam3.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", metavar="VIDEO_OR_FOLDER", nargs="+", type=Path, help="folders with subfolders")
    parser.add_argument("--out", required=True, type=Path, help="folder for a folder of frames per video")
    parser.add_argument(
        "--every", type=int, default=4, help="extract frames 0, N, 2N ... (default 4: 24 to 6 per second)"
    )
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 95 (default 95)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    arguments = parser.parse_args()
    try:
        extracted, kept, bad = extract_frames(**vars(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; complete videos are kept: run the same command again to go on", file=sys.stderr)
        return 130
    for name in bad:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{extracted} videos extracted to {arguments.out}, {kept} were there, {len(bad)} could not be read")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
