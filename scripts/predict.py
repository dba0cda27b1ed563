# SPDX-License-Identifier: Apache-2.0
"""Find or track things on an image or in a video by text, boxes or points.

python scripts/predict.py runs/stage1-image-es_rv_m photo.jpg --text "a dog"
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="predict"))
