# SPDX-License-Identifier: Apache-2.0
"""Synthetic videos in the folders of SA-V's validation set and of DAVIS."""

from pathlib import Path

import numpy as np
from PIL import Image

from effsam3.data.synthetic.videos import make_video
from effsam3.data.videos.sav import FRAME_STRIDE


def write_vos_trees(folder: Path, videos: int, frames: int = 48, side_px: int = 128, objects: int = 3) -> None:
    """Write the same videos as `folder/sav_val` (a PNG for every object and fourth frame) and `folder/davis`.

    DAVIS has one palette PNG for every frame; where objects overlap, the last one has the pixel.
    """
    names = [f"sav_{number:06d}" for number in range(1, videos + 1)]
    sav, davis = folder / "sav_val", folder / "davis"
    for number, name in enumerate(names, 1):
        video = make_video(number, frames, side_px, objects)
        for index, (image_HW3, masks_NHW) in enumerate(zip(video.frames, video.masks, strict=True)):
            for place in (sav / "JPEGImages_24fps", davis / "JPEGImages/480p"):
                save(Image.fromarray(image_HW3), place / name / f"{index:05d}.jpg", quality=95)
            save(palette_image(masks_NHW), davis / "Annotations/480p" / name / f"{index:05d}.png")
            for position, mask_HW in enumerate(masks_NHW if index % FRAME_STRIDE == 0 else ()):
                file = sav / "Annotations_6fps" / name / f"{position:03d}" / f"{index:05d}.png"
                save(Image.fromarray(mask_HW), file)
    for path in (sav / "sav_val.txt", davis / "ImageSets/2017/val.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))


def save(image: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def palette_image(masks_NHW: np.ndarray) -> Image.Image:
    """A palette image of masks: 0 is background, object n of the N has the value n + 1."""
    ids_HW = np.zeros(masks_NHW.shape[1:], np.uint8)
    for position, mask_HW in enumerate(masks_NHW):
        ids_HW[mask_HW] = position + 1
    image = Image.fromarray(ids_HW)
    colours = np.random.default_rng(0).integers(64, 256, (256, 3), dtype=np.uint8)
    colours[0] = 0
    image.putpalette(colours.tobytes())
    return image
