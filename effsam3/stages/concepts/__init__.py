# SPDX-License-Identifier: Apache-2.0
"""Concepts: parts of a SAM 3's detector learn in place, through its heads, from phrases on images."""
