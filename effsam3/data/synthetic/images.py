# SPDX-License-Identifier: Apache-2.0
"""Synthetic SA-1B: scenes of textured, overlapping shapes whose masks are true by construction, in SA-1B's own files.

For smoke runs and tests, only where a recipe asks for it by name (`data.source: synthetic`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from effsam3.files import atomic_file, write_text

MIN_VISIBLE = 24  # pixels of a shape that later shapes must leave
MIN_SHARE = 0.35  # of a shape, likewise


def make_synthetic_sa1b(folder: str | Path, num_images: int, side_px: int = 192, seed: int = 0) -> None:
    """Write `sa_1` to `sa_<num_images>` (.jpg and .json) into `folder`; the longest side has `side_px` pixels.

    Image N depends on (seed, N, side_px) only; complete files are kept, so that a larger `num_images` adds to them.
    Another seed or size is for `files.stamp` to refuse.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, num_images + 1):
        image_file, json_file = folder / f"sa_{number}.jpg", folder / f"sa_{number}.json"
        if image_file.exists() and json_file.exists():
            continue
        pixels_HWC, masks_NHW = make_scene(side_px, np.random.default_rng([seed, number]))
        with atomic_file(image_file) as file:
            Image.fromarray(pixels_HWC).save(file, "JPEG", quality=92)
        write_text(json_file, json.dumps(sa1b_record(number, masks_NHW)))


def sa1b_record(number: int, masks_NHW: np.ndarray) -> dict:
    """Return what SA-1B's JSON holds for bool masks [N, H, W]."""
    from pycocotools import mask

    height, width = masks_NHW.shape[1:]
    annotations = []
    for index, mask_HW in enumerate(masks_NHW):
        rle = mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
        annotations.append(
            {
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                "bbox": mask.toBbox(rle).tolist(),
                "area": int(mask_HW.sum()),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "crop_box": [0.0, 0.0, float(width), float(height)],
                "point_coords": [innermost_point(mask_HW)],
                "id": number * 1000 + index,
            }
        )
    image = {"image_id": number, "width": width, "height": height, "file_name": f"sa_{number}.jpg"}
    return {"image": image, "annotations": annotations}


def innermost_point(mask_HW: np.ndarray) -> list[float]:
    """Return [x, y] of a pixel that survives peeling the mask longest, so one far from its border."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    inside = np.pad(mask_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    while inside.any():
        last = inside
        inside = inside.copy()
        inside[1:-1, 1:-1] &= last[:-2, 1:-1] & last[2:, 1:-1] & last[1:-1, :-2] & last[1:-1, 2:]
    y, x = np.argwhere(last)[last.sum() // 2]
    return [float(x - 1 + columns[0]), float(y - 1 + rows[0])]


# ---- scenes. All lengths are in units of the image's longest side; y points down.


def make_scene(side_px: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint8 RGB [H, W, 3], bool masks [N, H, W] of what is visible of each of 3 to 8 shapes)."""
    short = round(side_px * rng.uniform(0.55, 1.0))
    height, width = (short, side_px) if rng.random() < 0.6 else (side_px, short)
    yx_2HW = np.mgrid[0.5:height, 0.5:width] / side_px
    light = rng.uniform(0, 2 * np.pi)  # where it comes from, the same for all shapes
    image_HWC = _texture(yx_2HW, rng) * _slope(yx_2HW, light, 0.25)[..., None]
    wanted = rng.integers(3, 9)
    visible: list[np.ndarray] = []
    areas: list[int] = []  # before later shapes hid a part
    while len(visible) < wanted:
        big = len(visible) < wanted // 2  # big ones first: they would hide the others
        size = rng.uniform(0.16, 0.32) if big else 0.04 * 4 ** rng.uniform()
        centre = rng.uniform(0.05, 0.95, 2) * (height, width) / side_px
        mask_HW, relief_HW = _shape(yx_2HW - centre[:, None, None], size, rng)
        left = [mask & ~mask_HW for mask in visible]
        # Redrawn otherwise: an object that is hidden but for a rim would be a mask that no model can find.
        enough = [mask.sum() >= max(MIN_VISIBLE, MIN_SHARE * area) for mask, area in zip(left, areas, strict=True)]
        if mask_HW.sum() < MIN_VISIBLE or not all(enough):
            continue
        visible, areas = [*left, mask_HW], [*areas, int(mask_HW.sum())]
        shading_HW = _slope((yx_2HW - centre[:, None, None]) / size, light, 0.3) * relief_HW
        surface_HWC = _texture(yx_2HW, rng) * shading_HW[..., None]
        throw_px = 0.25 * size * side_px
        shadow_HW = _blur(mask_HW, throw_px / 2, (throw_px * np.sin(light), throw_px * np.cos(light)))
        image_HWC = image_HWC * (1 - 0.5 * shadow_HW[..., None])
        edge_HW1 = _blur(mask_HW, 0.6)[..., None]
        image_HWC = image_HWC * (1 - edge_HW1) + surface_HWC * edge_HW1
    image_HWC = image_HWC + rng.normal(0, rng.uniform(0.002, 0.02), image_HWC.shape)
    return (image_HWC.clip(0, 1) * 255).round().astype(np.uint8), np.stack(visible)


def _shape(yx_2HW: np.ndarray, size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (mask, relief: brightness of a surface that bends away at its rim) of a shape around the origin."""
    turn, flat = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 1.0)
    v_HW = (yx_2HW[0] * np.cos(turn) - yx_2HW[1] * np.sin(turn)) / (size * flat)
    u_HW = (yx_2HW[0] * np.sin(turn) + yx_2HW[1] * np.cos(turn)) / size
    angle_HW, radius_HW = np.arctan2(v_HW, u_HW), np.hypot(u_HW, v_HW)
    kind = rng.choice(["ellipse", "ring", "rectangle", "polygon", "star", "blob"])
    inner = 0.0
    if kind == "rectangle":
        radius_HW = np.maximum(abs(u_HW), abs(v_HW))
    elif kind == "polygon":
        sector = 2 * np.pi / rng.integers(3, 8)
        radius_HW = radius_HW * np.cos(angle_HW % sector - sector / 2) / np.cos(sector / 2)
    elif kind == "star":
        radius_HW = radius_HW / (0.72 + 0.28 * np.cos(rng.integers(4, 8) * angle_HW))
    elif kind == "blob":
        waves = [rng.uniform(0.05, 0.2) * np.cos(k * angle_HW + rng.uniform(0, 6)) for k in (2, 3, 5)]
        radius_HW = radius_HW / (0.8 + sum(waves))
    elif kind == "ring":
        inner = rng.uniform(0.45, 0.7)
    mask_HW = (radius_HW < 1) & (radius_HW >= inner)
    rim_HW = abs(2 * (radius_HW - inner) / (1 - inner) - 1) if inner else radius_HW
    return mask_HW, 0.6 + 0.4 * np.sqrt(1 - rim_HW.clip(0, 1) ** rng.choice([2, 8]))


def _texture(yx_2HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return colours 0..1 [H, W, 3]: a random pattern between two random colours."""
    dark, bright = rng.uniform(0, 0.9, 3), rng.uniform(0.1, 1.0, 3)
    turn, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.12)
    v_HW = (yx_2HW[0] * np.cos(turn) - yx_2HW[1] * np.sin(turn)) / period
    u_HW = (yx_2HW[0] * np.sin(turn) + yx_2HW[1] * np.cos(turn)) / period
    noise_HW = _noise(yx_2HW.shape[1:], rng)
    kind = str(rng.choice(["stripes", "checks", "dots", "noise", "gradient", "wood", "plain"]))
    pattern_HW = {
        "stripes": 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * u_HW)),
        "checks": 0.5 + 0.5 * np.sign(np.sin(np.pi * u_HW) * np.sin(np.pi * v_HW)),
        "dots": ((u_HW % 1 - 0.5) ** 2 + (v_HW % 1 - 0.5) ** 2 < 0.08).astype(float),
        "noise": noise_HW,
        "gradient": (u_HW - u_HW.min()) / np.ptp(u_HW),
        "wood": 0.5 + 0.5 * np.sin(2 * np.pi * (u_HW / 2 + 2 * noise_HW)),
        "plain": np.zeros_like(u_HW),
    }[kind]
    grain_HW1 = 0.85 + 0.3 * noise_HW[..., None]
    return (dark + (bright - dark) * pattern_HW[..., None]) * grain_HW1


def _noise(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise 0..1 [H, W]: three octaves."""
    total_HW = np.zeros(size)
    for octave, cells in enumerate((5, 11, 23)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total_HW += np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)) / 2**octave
    return (total_HW - total_HW.min()) / np.ptp(total_HW)


def _slope(yx_2HW: np.ndarray, light: float, strength: float) -> np.ndarray:
    """Return brightness around 1 [H, W] that rises towards the light."""
    along_HW = yx_2HW[0] * np.sin(light) + yx_2HW[1] * np.cos(light)
    return 1 + strength * (along_HW - along_HW.mean()).clip(-1, 1)


def _blur(mask_HW: np.ndarray, radius_px: float, away_yx: tuple[float, float] = (0, 0)) -> np.ndarray:
    image = Image.fromarray(mask_HW.astype(np.uint8) * 255)
    image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, away_yx[1], 0, 1, away_yx[0]))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius_px))) / 255
