# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the tracker learns to work with an efficient memory."""
