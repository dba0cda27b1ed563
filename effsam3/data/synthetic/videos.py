# SPDX-License-Identifier: Apache-2.0
"""Synthetic SA-V: textured shapes that move, turn, grow, hide each other, leave and come back, with true masks.

In the files of SA-V's training set: `sav_000001.mp4` at 24 frames/s, `sav_000001_manual.json` at 6. For smoke runs
and tests, only where a recipe asks for it by name.

Letters: T frames, N objects, H W rows and columns. Lengths are in units of the video's longest side; y points down.
"""

from __future__ import annotations

import colorsys
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from effsam3.data.coco import text_rles
from effsam3.data.videos import sav
from effsam3.data.videos.sav import FRAME_STRIDE, VIDEO_FPS
from effsam3.files import write_bytes, write_text

FEWEST_PIXELS = 12  # of an object that counts as visible; fewer are not annotated


class Video(NamedTuple):
    """frames: uint8 RGB (T, H, W, 3); masks: bool (T, N, H, W), what is visible of every object."""

    frames: np.ndarray
    masks: np.ndarray


def make_synthetic_sav(
    folder: str | Path,
    videos: int,
    frames: int = 48,
    side_px: int = 128,
    objects: int = 3,
    seed: int = 0,
    look: str = "textures",
) -> None:
    """Write `sav_000001` to `sav_<videos>` (.mp4 and _manual.json) into `folder`; the longest side has `side_px` px.

    Video K depends on (seed, K, frames, side_px, objects, look) only; complete ones are kept, so that a larger
    `videos` adds to them. Other settings are for `files.stamp` to refuse.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, videos + 1):
        name = f"sav_{number:06d}"
        video_file, json_file = folder / f"{name}.mp4", folder / f"{name}_manual.json"
        if video_file.exists() and json_file.exists():
            continue
        video = make_video(number, frames, side_px, objects, seed, look)
        write_bytes(video_file, mp4_bytes(video.frames))
        write_text(json_file, json.dumps(sav_record(name, video.masks)))


def mp4_bytes(frames_THW3: np.ndarray) -> bytes:
    """Encode uint8 RGB frames (T, H, W, 3), H and W even, as H.264 in MP4."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # One thread: the same bytes on every machine, as long as PyAV is the same.
        options = {"crf": "16", "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames_THW3.shape[1:3], "yuv420p"
        for image_HW3 in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HW3, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def sav_record(name: str, masks_TNHW: np.ndarray) -> dict:
    """Return what SA-V's manual JSON holds for the masks of all frames; every fourth frame is annotated."""
    count, objects, *size = masks_TNHW.shape
    masklet = [text_rles(masks_NHW) for masks_NHW in masks_TNHW[::FRAME_STRIDE]]
    return sav.sav_record(name, count, tuple(size), list(range(objects)), masklet, "Synthetic")


# ---- scenes


def make_video(number: int, frames: int, side_px: int, objects: int, seed: int = 0, look: str = "textures") -> Video:
    """Draw video `number`; the first object stays in view, others may leave it.

    `look` is a key of LOOKS; in every third video of `textures` the last object is part of the first.
    """
    assert side_px >= 32 and objects >= 1, (side_px, objects)
    # By all that the video depends on: another length is another video, not a longer one.
    rng = np.random.default_rng([seed, number, frames, side_px, objects])
    short, long = _even(side_px * rng.uniform(0.6, 1.0)), _even(side_px)
    height, width = (short, long) if rng.random() < 0.6 else (long, short)
    yx_2HW = (np.mgrid[0.5:height, 0.5:width] / side_px).astype(np.float32)
    extent = np.array([height, width]) / side_px
    hue = rng.uniform()
    surface = LOOKS[look]
    background = surface(hue, rng, plain=True)
    pan = rng.uniform(-0.2, 0.2, 2)
    shapes = shapes_of(objects, extent, hue, rng, surface)
    part = objects >= 3 and number % 3 == 0 and surface is _Surface
    noise = rng.uniform(0.005, 0.02)
    images, masks_TNHW = [], np.zeros((frames, objects, height, width), bool)
    for index in range(frames):
        time = index / VIDEO_FPS
        image_HW3 = background.colours(*(yx_2HW + (pan * time).astype(np.float32)[:, None, None]))
        whole = shapes[: objects - part]
        masks_TNHW[index, : len(whole)] = paint(image_HW3, whole, yx_2HW, time)
        if part:  # of the first object, and so in the masks of both
            mask_HW, colours_P3 = shapes[0].draw(yx_2HW, time, hue + objects / (objects + 1), scale=0.45)
            image_HW3[mask_HW] = colours_P3
            masks_TNHW[index, -1] = mask_HW
        images.append(image_HW3 + rng.normal(0, noise, image_HW3.shape))
    masks_TNHW[masks_TNHW.sum((2, 3)) < FEWEST_PIXELS] = False
    return Video((np.stack(images).clip(0, 1) * 255).round().astype(np.uint8), masks_TNHW)


def shapes_of(
    objects: int, extent: np.ndarray, hue: float, rng: np.random.Generator, surface: type[_Surface] | None = None
) -> list[_Shape]:
    """Draw shapes for frames of `extent` (height, width), of other hues than the one behind them."""
    # Spread over the circle, so that objects differ from each other, too.
    hues = hue + (1 + np.arange(objects)) / (objects + 1)
    return [_Shape(position, extent, hues[position], rng, surface or _Surface) for position in range(objects)]


def paint(image_HW3: np.ndarray, shapes: list[_Shape], yx_2HW: np.ndarray, time: float) -> np.ndarray:
    """Paint shapes into an image of colours 0..1, the first in front; return what is visible of each, (N, H, W).

    `yx_2HW` are the pixels' places, `time` is in seconds.
    """
    masks_NHW = np.zeros((len(shapes), *image_HW3.shape[:2]), bool)
    for position in reversed(range(len(shapes))):
        mask_HW, colours_P3 = shapes[position].draw(yx_2HW, time)
        image_HW3[mask_HW] = colours_P3
        masks_NHW[position + 1 :] &= ~mask_HW
        masks_NHW[position] = mask_HW
    return masks_NHW


def _even(side_px: float) -> int:
    """Round to what H.264 can hold: even numbers."""
    return round(side_px / 2) * 2


class _Surface:
    """A pattern of two shades of one hue."""

    def __init__(self, hue: float, rng: np.random.Generator, plain: bool = False):
        saturation = 0.35 if plain else 0.85
        self.dark = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, rng.uniform(0.25, 0.45)), np.float32)
        self.bright = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, rng.uniform(0.7, 0.95)), np.float32)
        self.kind = rng.choice(["stripes", "checks", "dots"])
        self.period = rng.uniform(0.3, 0.5) if plain else rng.uniform(0.5, 0.9)

    def colours(self, v: np.ndarray, u: np.ndarray, rim: np.ndarray | None = None) -> np.ndarray:
        """Return colours 0..1 (..., 3) at coordinates (...) on the surface; `rim` goes from 0 to 1 at its edge."""
        v, u = v * (2 * np.pi / self.period), u * (2 * np.pi / self.period)
        if self.kind == "stripes":
            wave = np.sin(u)
        elif self.kind == "checks":
            wave = np.sin(u) * np.sin(v)
        else:
            wave = np.cos(u) + np.cos(v) - 1
        share = (0.5 + 0.5 * np.tanh(3 * wave))[..., None]
        return self.dark + (self.bright - self.dark) * share


class _Outline(_Surface):
    """Grey on grey inside a black line: without colour, shapes differ from what is behind them in brightness only."""

    def __init__(self, hue: float, rng: np.random.Generator, plain: bool = False):
        super().__init__(hue, rng, plain)
        self.dark = np.full(3, rng.uniform(0.2, 0.35) if plain else rng.uniform(0.55, 0.8), np.float32)
        self.bright = self.dark + np.float32(0.12)

    def colours(self, v: np.ndarray, u: np.ndarray, rim: np.ndarray | None = None) -> np.ndarray:
        """Return colours as the other surfaces do."""
        found = super().colours(v, u)
        if rim is not None:
            found[rim > 1 - LINE] = 0.0
        return found


LINE = 0.15  # of a shape's radius
LOOKS = {"textures": _Surface, "outlines": _Outline}


class _Shape:
    """A rigid outline with a surface on a smooth closed path, with its own size, turn and speed."""

    def __init__(
        self, position: int, extent: np.ndarray, hue: float, rng: np.random.Generator, surface: type[_Surface]
    ):
        self.surface = surface(hue, rng)
        self.size = rng.uniform(0.14, 0.2) * extent.min()  # radius
        self.flat = rng.uniform(0.6, 1.0)
        self.corners, self.depth = rng.integers(2, 7), rng.uniform(0.0, 0.3)
        self.turn, self.spin = rng.uniform(0, 2 * np.pi), rng.uniform(-1.2, 1.2)  # radians, radians per second
        self.breath, self.breath_rate = rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.5)
        # The others' paths go beyond the border: they leave and come back, and some are not there at first.
        inner, outer = (0.1, 0.25) if position == 0 else (0.35, 0.75)
        self.reach = rng.uniform(inner, outer, 2) * extent
        self.centre = extent * rng.uniform(0.4, 0.6, 2)
        self.phase = rng.uniform(0, 2 * np.pi, 2)  # anywhere: no moment of a video is unlike the others
        self.breath_phase = rng.uniform(0, 2 * np.pi)
        self.rate = rng.uniform(0.12, 0.3, 2) * rng.choice([-1, 1], 2)  # rounds per second

    def draw(
        self, yx_2HW: np.ndarray, time: float, hue: float | None = None, scale: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (mask (H, W), colours (P, 3) or (3,) of its P pixels) at a time in seconds.

        `hue` and `scale` make it a plain part in the middle of the shape.
        """
        centre = self.centre + self.reach * np.sin(2 * np.pi * self.rate * time + self.phase)
        size = scale * self.size * (1 + self.breath * np.sin(2 * np.pi * self.breath_rate * time + self.breath_phase))
        turn = self.turn + self.spin * time
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        y_HW, x_HW = (yx_2HW - centre.astype(np.float32)[:, None, None]) / np.float32(size)
        v_HW = (y_HW * cos - x_HW * sin) / self.flat
        u_HW = y_HW * sin + x_HW * cos
        outline_HW = 1 - self.depth + self.depth * np.cos(self.corners * np.arctan2(v_HW, u_HW))
        radius_HW = np.hypot(u_HW, v_HW)
        mask_HW = radius_HW < outline_HW
        if hue is None:
            rim_P = radius_HW[mask_HW] / outline_HW[mask_HW]
            return mask_HW, self.surface.colours(v_HW[mask_HW], u_HW[mask_HW], rim_P)
        return mask_HW, np.array(colorsys.hsv_to_rgb(hue % 1, 0.9, 0.95))
