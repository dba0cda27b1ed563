# SPDX-License-Identifier: Apache-2.0
"""What the training loop needs: optimizer, checkpoints, meters, loggers, reports."""
