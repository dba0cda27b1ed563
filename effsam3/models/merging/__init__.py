# SPDX-License-Identifier: Apache-2.0
"""Parts, slots and checkpoint formats: what a merge is made of."""
