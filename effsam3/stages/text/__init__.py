# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: a student learns the features of SAM 3's text encoder."""
