# SPDX-License-Identifier: Apache-2.0
"""Prompts in the loop: a student trunk learns to give SAM 3's own masks through SAM 3's frozen heads."""
