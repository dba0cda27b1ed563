# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say, and how its YAML is read, checked and typed."""
