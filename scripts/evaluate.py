# SPDX-License-Identifier: Apache-2.0
"""Measure the merged model against the teacher and the annotations.

python scripts/evaluate.py recipes/stage1/image/es_rv_m.yaml
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="evaluate"))
