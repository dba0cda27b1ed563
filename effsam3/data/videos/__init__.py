# SPDX-License-Identifier: Apache-2.0
"""Videos: files and frame folders, their index, clips."""
