# SPDX-License-Identifier: Apache-2.0
"""The parts of a SAM 3 that can be adapted, by the beginnings of their names in the whole model. Plain data."""

from __future__ import annotations

PARTS = {
    "trunk": ("detector_model.vision_encoder.backbone.",),  # detector and tracker both read it
    "text": ("detector_model.text_encoder.",),
    "detr": ("detector_model.geometry_encoder.", "detector_model.detr_encoder.", "detector_model.detr_decoder."),
    "detector_mask_decoder": ("detector_model.mask_decoder.",),
    "tracker_mask_decoder": ("tracker_model.mask_decoder.",),
}
BY_TEXT = ("text", "detr", "detector_mask_decoder")  # only run for text prompts
BY_POINT = ("tracker_mask_decoder",)  # only run for points and boxes
