# SPDX-License-Identifier: Apache-2.0
"""python scripts/fetch_recap.py --out data/recap [--fraction 0.01]

Download a part of the captions of Recap-DataComp-1B: the first 1 % of its train files, about 9 million captions.
Run again after an interruption, or with a larger fraction, it goes on where it stopped. Every file's size and SHA-256
are compared with the Hub's. HF_ENDPOINT names a mirror, HF_TOKEN (or `hf auth login`) a login.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effsam3.data.captions.fetch import REPO, Fetch, HubError, fetched_files
from effsam3.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the parquet files")
    parser.add_argument("--fraction", type=float, default=0.01, help="of the train files (default 0.01)")
    parser.add_argument("--repo", default=REPO, help=f"dataset on the Hub (default {REPO})")
    parser.add_argument("--revision", help="commit, branch or tag (default: the newest)")
    parser.add_argument("--verify", action="store_true", help="read the files that are there again, too")
    arguments = parser.parse_args()
    try:
        fetch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, HubError):
            here = fetched_files(arguments.out)
            print(f"{arguments.out} has {len(here)} whole files; what is there can be used as it is", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what has arrived is kept: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def fetch(arguments: argparse.Namespace) -> None:
    """List what is wanted and what is there, and download the difference."""
    files = Fetch(arguments.out, arguments.fraction, arguments.repo, arguments.revision)
    missing = files.missing(arguments.verify)
    size = sum(file.size for file in files.wanted)
    print(
        f"wanted   {len(files.wanted)} of {len(files.available)} train files of {files.repo} at {files.commit[:12]}, "
        f"{size / 1e9:.2f} GB"
    )
    for file in files.wanted:
        print(f"{'missing' if file in missing else 'have':<8} {file.name}  {file.size / 1e6:.1f} MB")
    if missing:
        files.download(missing)
    print(f"have     {len(files.wanted)} of {len(files.wanted)} files in {arguments.out}, SHA-256 as on the Hub")
    print(f"next     data.captions={arguments.out} in a recipe of stage text")


if __name__ == "__main__":
    sys.exit(main())
