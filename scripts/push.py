# SPDX-License-Identifier: Apache-2.0
"""Upload the merged model with its card, numbers and pictures to the Hugging Face Hub.

python scripts/push.py recipes/stage1/image/es_rv_m.yaml push.repo=OWNER/NAME --dry-run
"""

import sys

from effsam3.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="push"))
