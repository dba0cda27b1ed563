# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image: a student trunk learns SAM 3's vision features."""
