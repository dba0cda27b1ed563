# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of tensors, each with its formula."""
