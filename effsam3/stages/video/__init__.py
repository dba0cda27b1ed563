# SPDX-License-Identifier: Apache-2.0
"""Own videos: modules of a tracker are fine-tuned in place."""
