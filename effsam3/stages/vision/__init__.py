# SPDX-License-Identifier: Apache-2.0
"""Stage 1, vision: a student in the place of SAM 3's trunk and both necks."""
