# SPDX-License-Identifier: Apache-2.0
"""The slot memory: SAM 3's tracker with an efficient memory."""

# What recipes call it: the part of the tracker that is replaced, and the term of the loss by which it learns.
NAME = "memory"
