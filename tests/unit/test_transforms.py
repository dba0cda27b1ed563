# SPDX-License-Identifier: Apache-2.0
"""Preprocessing against SAM 3's own processor and against torch's interpolation."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from effsam3.data import transforms
from effsam3.data.images.decoding import decode_image

RNG = np.random.default_rng(0)


def noise(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1).astype(np.uint8)


def jpeg(height, width):
    file = io.BytesIO()
    Image.fromarray(gradient(height, width)).save(file, "JPEG", quality=80)
    return decode_image(file.getvalue())[0]


@pytest.mark.parametrize(
    "image",
    [
        noise(1500, 2250),
        gradient(1500, 2250),
        noise(1008, 1008),
        gradient(2016, 1008),
        noise(300, 417),
        noise(1200, 640),
        noise(40, 1700),
        noise(1, 1),
        jpeg(848, 480),
    ],
    ids=lambda image: "x".join(map(str, image.shape[:2])),
)
def test_square_equals_sam3s_own_processor(image):
    from transformers import Sam3ImageProcessor

    processor = Sam3ImageProcessor()
    pixels, size = transforms.resize_image(image, 1008, "square")
    resized = processor(Image.fromarray(image), do_rescale=False, do_normalize=False, return_tensors="pt")
    assert size == (1008, 1008) and pixels.dtype == torch.uint8
    assert resized["pixel_values"].dtype == torch.uint8 and torch.equal(pixels, resized["pixel_values"][0])
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    normalised = transforms.normalise(pixels[None])
    assert normalised.dtype == torch.float32 and (normalised - expected).abs().max() <= 1e-6
    assert normalised.min() >= -1 and normalised.max() <= 1


def test_normalise_is_the_formula():
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = (pixels.double() / 255 - transforms.IMAGE_MEAN) / transforms.IMAGE_STD
    assert (transforms.normalise(pixels) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "height, width, rows, columns", [(150, 225, 64, 96), (225, 150, 96, 64), (30, 20, 96, 64), (7, 500, 1, 96)]
)
def test_longest_side_keeps_the_aspect_and_pads(height, width, rows, columns):
    image = noise(height, width)
    pixels, size = transforms.resize_image(image, 96, "longest_side")
    assert size == (rows, columns) and pixels.shape == (3, 96, 96) and pixels.dtype == torch.uint8
    assert (pixels[:, rows:] == 128).all() and (pixels[:, :, columns:] == 128).all()
    float_HW = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(), (rows, columns), mode="bilinear", antialias=True
    )
    assert (pixels[None, :, :rows, :columns] - float_HW).abs().max() <= 1


def test_read_only_and_strided_images_are_taken_without_a_warning():
    image = noise(30, 40)
    flipped = image[:, ::-1]
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = transforms.resize_image(image, 32, "square")
        turned, _ = transforms.resize_image(flipped, 32, "square")
    assert whole.shape == turned.shape and not torch.equal(whole, turned)


@pytest.mark.parametrize(
    "image_size, grid", [(1008, 72), (1024, 64), (1008, 63), (1008, 50), (224, 17), (100, 24), (96, 37), (64, 100)]
)
def test_valid_mask_equals_interpolated_ones(image_size, grid):
    sizes = RNG.integers(0, image_size + 1, (60, 2)).tolist()
    sizes += [[0, 0], [1, 1], [image_size, image_size], [image_size, 1]]
    sizes += [[side, image_size] for side in range(0, image_size, max(1, image_size // 40))]
    masks = transforms.valid_mask(torch.tensor(sizes), image_size, grid)
    assert masks.shape == (len(sizes), 1, grid, grid) and masks.dtype == torch.float32
    for (rows, columns), mask in zip(sizes, masks, strict=True):
        ones = torch.zeros(1, 1, image_size, image_size)
        ones[..., :rows, :columns] = 1
        expected = torch.nn.functional.interpolate(ones, (grid, grid), mode="bilinear", align_corners=False) > 0.5
        assert torch.equal(mask, expected[0].float()), (rows, columns)
    assert not masks[60].any() and masks[62].all()
