# SPDX-License-Identifier: Apache-2.0
"""Captions and noun phrases: files, downloads, batches of tokens."""
