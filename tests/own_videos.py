# SPDX-License-Identifier: Apache-2.0
"""The same small videos in the files that annotation tools write."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from vos_folders import save

from effsam3.data.coco import rles_of

H, W = 20, 30


def square(top, left, side=6, size=(H, W)):
    mask = np.zeros(size, bool)
    mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
    return mask


def moving(frames=5):
    """Two squares that move right: masks bool (T, 2, H, W). The second comes on frame 2."""
    return np.stack(
        [np.stack([square(2, 2 + 2 * k), square(12, 4 + 3 * k) & (k >= 2)]) for k in range(frames)]
    )  # fmt: skip


def write_frames(folder: Path, names, size=(H, W)):
    """Write flat images: the k-th has brightness 10 + 20k, beyond 250 from 0 again."""
    for k, name in enumerate(names):
        save(Image.fromarray(np.full((*size, 3), (10 + 20 * k) % 250, np.uint8)), folder / name)


def rle(mask_HW):
    found = rles_of(mask_HW[None])[0]
    return {"size": list(mask_HW.shape), "counts": found["counts"].decode("ascii")}


def runs(mask_HW):
    """The uncompressed RLE, counted one by one."""
    counts, value = [0], False
    for pixel in mask_HW.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask_HW.shape), "counts": counts}


def box(top, left, bottom, right):
    """A polygon around the pixels from (top, left) to before (bottom, right)."""
    return [left, top, right, top, right, bottom, left, bottom]


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_video(masks_TNHW, video="walk", encode=rle, **keys):
    """COCO-video as documented, of frames <video>/00000.jpg ...; `track_id` 1, 2 ... unless `keys` say otherwise."""
    height, width = masks_TNHW.shape[2:]
    images = [
        {"id": k + 1, "video_id": video, "order_in_video": k, "path": f"{video}/{k:05d}.jpg",
         "width": width, "height": height}
        for k in range(len(masks_TNHW))
    ]  # fmt: skip
    annotations = [
        {"id": 1, "image_id": k + 1, "category_id": 1, "track_id": n + 1, "segmentation": encode(mask_HW), **keys}
        for k, masks_NHW in enumerate(masks_TNHW)
        for n, mask_HW in enumerate(masks_NHW)
        if mask_HW.any()
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def walks(folder: Path, count=4) -> Path:
    """Videos walk0, walk1 ... of five frames in one COCO-video JSON; their second object comes on the third frame."""
    content = {"images": [], "annotations": []}
    for number in range(count):
        one = coco_video(moving(), f"walk{number}")
        for kind, key in (("images", "id"), ("annotations", "image_id")):
            content[kind] += [entry | {key: entry[key] + 100 * number} for entry in one[kind]]
        write_frames(folder / f"walk{number}", [f"{k:05d}.jpg" for k in range(5)])
    return write_json(folder / "instances.json", content)


def own_videos(path: Path) -> list[str]:
    """What makes the smoke recipe of stage video one of the videos of a path."""
    return [f"data.path={path}", "data.source=videos", "data.synthetic_videos=0", "data.look=textures"]


def youtube_vis(masks_TNHW, video="walk", encode=rle):
    """YouTube-VIS, with null where an object is absent."""
    height, width = masks_TNHW.shape[2:]
    files = [f"{video}/{k:05d}.jpg" for k in range(len(masks_TNHW))]
    return {
        "videos": [{"id": 1, "file_names": files, "width": width, "height": height, "length": len(files)}],
        "annotations": [
            {"id": n + 1, "video_id": 1, "category_id": 1, "iscrowd": 0,
             "segmentations": [encode(mask_HW) if mask_HW.any() else None for mask_HW in masks_TNHW[:, n]]}
            for n in range(masks_TNHW.shape[1])
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
