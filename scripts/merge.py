# SPDX-License-Identifier: Apache-2.0
"""Put the trained student into SAM 3 and write one transformers folder.

python scripts/merge.py recipes/stage1/image/es_rv_m.yaml
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="merge"))
