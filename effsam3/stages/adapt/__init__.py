# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a SAM 3, or of a release, to a domain: low-rank adapters learn from images with masks."""
