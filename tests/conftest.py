# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: no network, one thread, no memory of the machine's own caches and logins."""

import os
import tempfile

# Before torch is imported anywhere: with more threads tiny models get slower, not faster.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["EFFSAM3_CACHE"] = tempfile.mkdtemp(prefix="effsam3-cache-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
