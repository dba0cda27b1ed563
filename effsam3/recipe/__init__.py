# SPDX-License-Identifier: Apache-2.0
"""What a recipe may contain, and how its YAML is read, checked and typed."""
