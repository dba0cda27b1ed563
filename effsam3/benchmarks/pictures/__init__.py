# SPDX-License-Identifier: Apache-2.0
"""Pictures of what models see, and of predictions."""
