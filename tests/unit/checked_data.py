# SPDX-License-Identifier: Apache-2.0
"""Small data for the dataset doctor, and what it says of them."""

import json

import numpy as np
from own_videos import H, W, box, coco_video, moving, write_frames, write_json
from PIL import Image
from vos_folders import save

from effsam3.cli import main

FRAMES = [f"{k:05d}.png" for k in range(5)]
EMPTY = {"size": [H, W], "counts": [H * W]}


def folder(root, masks_TNHW=None, names=FRAMES):
    """A video `walk` with frames and, for each object, mask PNGs."""
    masks_TNHW = moving() if masks_TNHW is None else masks_TNHW
    write_frames(root / "walk/frames", names)
    for name, masks_NHW in zip(names, masks_TNHW, strict=True):
        for n, mask_HW in enumerate(masks_NHW, 1):
            save(Image.fromarray(mask_HW), root / f"walk/masks/{n}" / name)
    return root / "walk"


def davis(root, change=None):
    """A video `walk` with one PNG of ids for each frame."""
    write_frames(root / "JPEGImages/walk", FRAMES)
    for name, (one, two) in zip(FRAMES, moving(), strict=True):
        ids_HW = (one + 2 * (two & ~one)).astype(np.uint8)
        save(Image.fromarray(ids_HW if change is None else change(ids_HW)), root / "Annotations/walk" / name)
    return root / "Annotations/walk"


def coco(root, change=None, make=coco_video, masks_TNHW=None):
    """A JSON, changed, and its frames."""
    write_frames(root / "walk", [f"{k:05d}.jpg" for k in range(5)])
    content = make(moving() if masks_TNHW is None else masks_TNHW)
    if change is not None:
        change(content)
    write_json(root / "walk.json", content)
    return root / "walk"


def check(root, *options):
    """Return the exit code and the report."""
    code = main(["data", "check", str(root), "--json", str(root / "report.txt"), *options])
    return code, json.loads((root / "report.txt").read_text())


def segmentation(value):
    """The last annotation has this one."""
    return lambda content: content["annotations"][-1].update(segmentation=value)


# ---- images with masks


def image_folder(root, change=lambda masks: None):
    """Five images with two objects in a PNG of ids; `change` gets {name: ids}."""
    write_frames(root / "images", FRAMES)
    masks = {
        name: (one + 2 * (two & ~one)).astype(np.uint8) for name, (one, two) in zip(FRAMES, moving(), strict=True)
    }
    change(masks)
    for name, ids_HW in masks.items():
        save(Image.fromarray(ids_HW), root / "masks" / name)


def coco_images(root, change=lambda content: None):
    """Images in a COCO JSON: nothing tells of a video."""
    write_frames(root / "images", FRAMES)
    content = coco_video(moving())
    for row in content["images"]:
        del row["video_id"], row["order_in_video"]
        row["file_name"] = row.pop("path").removeprefix("walk/").replace("jpg", "png")
    for row in content["annotations"]:
        del row["track_id"]
    change(content)
    write_json(root / "walk.json", content)


def damaged_image(root):
    image_folder(root)
    (root / "images/00002.png").write_bytes(b"no image")


def gone_image(root):
    coco_images(root)
    (root / "images/00002.png").unlink()


def swapped_folders(root):
    """Photographs in masks/, their masks in images/."""
    image_folder(root)
    (root / "masks").rename(root / "other")
    (root / "images").rename(root / "masks")
    (root / "other").rename(root / "images")
    for file in (root / "masks").iterdir():
        file.rename(file.with_suffix(".jpg"))


IMAGE_CASES = [
    (swapped_folders, "no_png", "{root}/masks"),
    (damaged_image, "corrupt", "00002"),
    (gone_image, "missing_image", "00002.png"),
    (
        lambda root: image_folder(root, lambda masks: masks.update({"00001.png": masks["00001.png"][1:]})),
        "size_mismatch",
        "00001",
    ),
    (lambda root: image_folder(root, lambda masks: masks.pop("00003.png")), "no_objects", "{root}/images/00003.png"),
    (
        lambda root: image_folder(root, lambda masks: masks.update({"7.png": masks["00003.png"]})),
        "no_image",
        "{root}/masks/7.png",
    ),
    (
        lambda root: image_folder(root, lambda masks: [mask.fill(0) for mask in masks.values()]),
        "no_object",
        "all images",
    ),
    (lambda root: coco_images(root, segmentation(EMPTY)), "empty_mask", "walk.json, annotation 7"),
    (lambda root: coco_images(root, segmentation([])), "no_mask", "walk.json, annotation 7"),
    (
        lambda root: coco_images(root, segmentation({"size": [H, W], "counts": [3, 4]})),
        "bad_mask",
        "walk.json, annotation 7",
    ),
    (lambda root: coco_images(root, segmentation([box(2, 2, 3, 4)])), "tiny_mask", "00004.png, object 2"),
    (
        lambda root: coco_images(root, lambda content: content["images"][1].update(file_name="00000.png")),
        "not_opened",
        "{root}",
    ),
    (lambda root: coco_images(root, lambda content: content["images"][1].update(id=1)), "not_opened", "{root}"),
    (lambda root: coco_images(root, lambda content: content["images"][1].update(width="x")), "not_opened", "{root}"),
]
