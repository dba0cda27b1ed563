# SPDX-License-Identifier: Apache-2.0
"""SAM 3 on disk: find it, read it, check it, make a tiny one."""
