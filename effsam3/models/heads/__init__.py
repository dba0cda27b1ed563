# SPDX-License-Identifier: Apache-2.0
"""SAM 3's own heads on the features of any trunk, differentiable: what a student's features are for."""
