# SPDX-License-Identifier: Apache-2.0
"""Run the teacher once over the images and store its features.

accelerate launch --config_file accelerate_configs/zero2.yaml scripts/embed.py recipes/stage1/image/es_rv_m.yaml
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="embed"))
