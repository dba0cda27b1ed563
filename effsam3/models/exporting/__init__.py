# SPDX-License-Identifier: Apache-2.0
"""A model for other runtimes: its parts as functions of tensors, written as files, and the files checked."""
