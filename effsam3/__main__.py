# SPDX-License-Identifier: Apache-2.0
"""`python -m effsam3` is the command `effsam3`."""

import sys

from effsam3.cli import main

sys.exit(main())
