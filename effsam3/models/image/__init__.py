# SPDX-License-Identifier: Apache-2.0
"""The slot image: SAM 3's ViT trunk as a teacher, timm trunks as students."""
