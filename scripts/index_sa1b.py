# SPDX-License-Identifier: Apache-2.0
"""Index SA-1B, or any photographs, for training.

python scripts/index_sa1b.py SOURCE [SOURCE ...] --out data/sa1b-1p.parquet
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="index sa1b"))
