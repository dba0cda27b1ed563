# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the image path: from files to what a step is given, for `benchmark.py`.

The naive sides do what most training code does: Pillow decodes, torch resizes in float32 with antialiasing, normalises
and pads, torch's DataLoader stacks, and features are read by NumPy and turned into float32 in the main process. Ours
hands over uint8 pixels and the stored float16: both become floats on the device that trains.

Letters: B images of a batch, C H W colours, rows and columns, S side of the square input, G of the grid.
"""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from effsam3.data.images.decoding import decode_image
from effsam3.data.images.features import ImageFeatures
from effsam3.data.images.index import build_index
from effsam3.data.images.sa1b import load_index
from effsam3.data.loader import loader
from effsam3.data.store.format import INPUTS, Field, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store
from effsam3.data.transforms import normalise, resize_image

IMAGES, BATCH, WORKERS = 16, 8, 2

Sides = dict[str, Callable[[], object]]


def decoding(device: torch.device, tiny: bool) -> Sides:
    """Decode a JPEG as large as SA-1B's as training does, and as Pillow does."""
    data = drawn_jpeg(tiny)
    return {
        "decode_image": lambda: decode_image(data),
        "Pillow": lambda: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
    }


def pixels(device: torch.device, tiny: bool) -> Sides:
    """Turn such a JPEG into the input of a student, and read the same from a store made with `embed.pixels`."""
    data, side = drawn_jpeg(tiny), sizes(tiny)[0]
    reader = _store({"pixels": resize_image(decode_image(data)[0], side, "longest_side")[0]}, ["sa_1"])
    return {
        "decode, resize": lambda: resize_image(decode_image(data)[0], side, "longest_side"),
        "Pillow, float32": lambda: naive_pixels(data, side),
        "stored pixels": lambda: reader.read([0]),
    }


def image_loading(device: torch.device, tiny: bool) -> Sides:
    """Load batches of 8 photographs with their features by two data workers, to what the device is given."""
    side, (channels, grid), steps = sizes(tiny)
    folder = _folder()
    jpeg = drawn_jpeg(tiny)
    for number in range(IMAGES):
        (folder / f"sa_{number:02d}.jpg").write_bytes(jpeg)
    build_index([folder], folder / "index.parquet", val_fraction=0.0, workers=1, progress=False)
    rows = load_index(folder / "index.parquet", "train")
    values = np.random.default_rng(0).standard_normal((channels, grid, grid), np.float32).astype(np.float16)
    keys = ImageFeatures(rows, folder, side, "longest_side").record_keys(range(IMAGES))
    shown, size = resize_image(decode_image(jpeg)[0], side, "longest_side")
    features = _store({"features": values}, keys)
    both = _store({"features": values, "pixels": shown, "sizes": np.array(size, np.int32)}, keys)
    plain = folder / "features.bin"
    plain.write_bytes(values.tobytes() * IMAGES)
    batches = np.random.default_rng(1).integers(IMAGES, size=(steps, BATCH)).tolist()

    def ours(store: StoreReader) -> None:
        data = ImageFeatures(rows, folder, side, "longest_side", store)
        drain(loader(data, batches, workers=WORKERS, pin=False))

    class Samples(Dataset):
        def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
            image = naive_pixels((folder / f"sa_{position:02d}.jpg").read_bytes(), side)
            read = np.fromfile(plain, np.float16, values.size, offset=position * values.nbytes)
            return image, torch.from_numpy(read.reshape(values.shape))

    def naive() -> None:
        for _, features_BCGG in DataLoader(Samples(), batch_sampler=batches, num_workers=WORKERS):
            features_BCGG.float()

    return {"loader": lambda: ours(features), "DataLoader": naive, "stored pixels": lambda: ours(both)}


def naive_pixels(data: bytes, side: int) -> torch.Tensor:
    """Decode by Pillow, resize the longest side in float32 with antialiasing, normalise and pad: (3, S, S)."""
    image_HWC = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1).float()
    scale = side / max(image_CHW.shape[1:])
    size = [int(length * scale + 0.5) for length in image_CHW.shape[1:]]
    resized_CHW = F.interpolate(image_CHW[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return F.pad(normalise(resized_CHW), (0, side - size[1], 0, side - size[0]))


@functools.cache
def drawn_jpeg(tiny: bool) -> bytes:
    """Return a JPEG as large as SA-1B's: 1500 x 2250, quality 87."""
    side = 64 if tiny else 1500
    rows, columns = np.mgrid[:side, : side * 3 // 2]
    noise = np.random.default_rng(0).normal(0, 9, (*rows.shape, 3))
    shown = np.stack([rows % 256, columns % 256, (rows // 40 + columns // 60) % 2 * 160 + 40], -1) + noise
    file = io.BytesIO()
    Image.fromarray(shown.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=87)
    return file.getvalue()


def sizes(tiny: bool) -> tuple[int, tuple[int, int], int]:
    """Return the side of the input in pixels, channels and grid of the features, and how many batches are loaded."""
    return (32, (64, 8), 2) if tiny else (1008, (1024, 72), 6)


def drain(batches: Iterable) -> None:
    """Load all batches."""
    for _ in batches:
        pass


def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="effsam3-benchmark-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def _store(record: dict, keys: list[str]) -> StoreReader:
    """Make a store with the same record under all keys."""
    root = _folder()
    values = {name: np.asarray(value) for name, value in record.items()}
    create_store(
        root, [Field(name, value.dtype.name, value.shape) for name, value in values.items()], {INPUTS: "digest"}
    )
    with StoreWriter(root, 0) as out:
        for key in keys:
            out.write(key, values)
    finish_store(root, keys)
    return StoreReader(root)
