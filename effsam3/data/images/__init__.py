# SPDX-License-Identifier: Apache-2.0
"""Images: files, their index, samples with teacher features."""
