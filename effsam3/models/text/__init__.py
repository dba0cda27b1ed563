# SPDX-License-Identifier: Apache-2.0
"""The slot text: SAM 3's text encoder as a teacher, MobileCLIP towers as students."""
