# SPDX-License-Identifier: Apache-2.0
"""The slot vision: a student in the place of SAM 3's trunk and of both necks on it."""
