# SPDX-License-Identifier: Apache-2.0
"""Download captions of Recap-DataComp-1B.

python scripts/fetch_recap.py --out data/recap [--fraction 0.01]
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="fetch recap"))
