# SPDX-License-Identifier: Apache-2.0
"""Extract frames of videos as JPEGs.

python scripts/extract_frames.py VIDEO_OR_FOLDER [...] --out FOLDER [--every 4]
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="extract frames"))
