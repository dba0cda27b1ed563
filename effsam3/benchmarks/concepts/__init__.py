# SPDX-License-Identifier: Apache-2.0
"""How well all instances of a noun phrase are found: SAM 3's cgF1, mask AP by texts, what presence loses."""
