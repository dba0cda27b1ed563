# SPDX-License-Identifier: Apache-2.0
"""SAM 3's processor: the files that a release carries, and the processor itself, for any image size."""

from __future__ import annotations

from pathlib import Path

from effsam3.checked_files import read_json
from effsam3.files import write_json
from effsam3.models.text.tokens import clip_tokenizer

# Of images and videos, both in one file or each in one of its own.
RESIZING_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# What a student's release inherits: image and video processors, tokenizer.
PROCESSOR_FILES = (
    *RESIZING_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def resize_processor(folder: Path, side: int) -> None:
    """Let the processors in a folder bring images and prompts to `side` pixels; files that do already stay untouched.

    Raises:
        UserError: one is damaged.
    """
    wanted = {"size": {"height": side, "width": side}, "target_size": side}
    for path in (folder / name for name in RESIZING_FILES if (folder / name).is_file()):
        content = read_json(path, dict, "restore it, or fetch the SAM 3 again")
        changed = False
        for part in (content, *(part for part in content.values() if isinstance(part, dict))):
            own = {key: value for key, value in wanted.items() if part.get(key, value) != value}
            part.update(own)
            changed = changed or bool(own)
        if changed:
            write_json(path, content)


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
