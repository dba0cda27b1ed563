# SPDX-License-Identifier: Apache-2.0
"""A release: parts that were trained separately, merged into one SAM 3."""
