# SPDX-License-Identifier: Apache-2.0
"""Pairs of an image and a noun phrase, with all instances annotated: files, pairs, images."""
