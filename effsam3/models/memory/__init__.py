# SPDX-License-Identifier: Apache-2.0
"""The slot memory: SAM 3's tracker with an efficient memory."""
