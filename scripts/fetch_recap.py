# SPDX-License-Identifier: Apache-2.0
"""python scripts/fetch_recap.py --out data/recap [--fraction 0.01]

Download a part of the captions of Recap-DataComp-1B: the first 1 % of its train files, about 9 million captions.
Run again after an interruption, or with a larger fraction, it keeps whole files. HF_ENDPOINT names a mirror, HF_TOKEN
(or `hf auth login`) a login.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effsam3.data.captions.fetch import REPO, fetch
from effsam3.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the parquet files")
    parser.add_argument("--fraction", type=float, default=0.01, help="of the train files (default 0.01)")
    parser.add_argument("--repo", default=REPO, help=f"dataset on the Hub (default {REPO})")
    parser.add_argument("--revision", help="commit, branch or tag (default: the newest)")
    parser.add_argument("--verify", action="store_true", help="read the files that are there again, too")
    try:
        fetch(**vars(parser.parse_args()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; whole files are kept: run the same command again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
