# SPDX-License-Identifier: Apache-2.0
"""SAM 3's processor: the files a release carries unchanged, and the processor itself for any image size."""

from __future__ import annotations

from effsam3.models.text.tokens import clip_tokenizer

# What a student's release inherits unchanged: image and video processors, tokenizer.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def processor(config):
    """SAM 3's video processor (images, videos, text) for a `Sam3VideoConfig`'s image size.

    The tokenizer is CLIP's byte-pair encoding, whose vocabulary open_clip ships.
    """
    from transformers import Sam3ImageProcessor, Sam3VideoProcessor
    from transformers.models.sam2_video.video_processing_sam2_video import Sam2VideoVideoProcessor

    side = config.tracker_config.image_size
    size = {"height": side, "width": side}
    half = [0.5, 0.5, 0.5]
    return Sam3VideoProcessor(
        image_processor=Sam3ImageProcessor(size=size, image_mean=half, image_std=half),
        video_processor=Sam2VideoVideoProcessor(size=size, image_mean=half, image_std=half),
        tokenizer=clip_tokenizer(),
    )
