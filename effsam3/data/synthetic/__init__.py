# SPDX-License-Identifier: Apache-2.0
"""Drawn images and videos and made-up captions, in the exact formats of the real data sets."""
