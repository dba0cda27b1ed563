# SPDX-License-Identifier: Apache-2.0
"""Index SA-V's training set.

python scripts/index_sav.py FOLDER [FOLDER ...] --out data/sav.parquet
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="index sav"))
