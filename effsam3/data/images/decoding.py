# SPDX-License-Identifier: Apache-2.0
"""Decode image files of any kind that photographs come in to upright RGB, or say why not."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from effsam3.data.images import image_ends
from effsam3.data.unreadable import Unreadable, UnreadableImage

CONVERSIONS = ("grayscale", "palette", "cmyk", "16bit", "alpha", "exif")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # the content decides, not the extension
MAX_PIXELS = 178_956_970  # above this Pillow itself refuses to open an image

MODES: dict[str, tuple[str, ...]] = {  # Pillow mode: conversions needed to reach RGB
    **dict.fromkeys(("RGB", "RGBX", "YCbCr"), ()),
    **dict.fromkeys(("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N"), ("grayscale",)),
    "LA": ("grayscale", "alpha"),
    "P": ("palette",),
    "PA": ("palette", "alpha"),
    "RGBA": ("alpha",),
    "CMYK": ("cmyk",),  # Pillow decodes YCCK to CMYK
}
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
TRANSPOSE = {  # EXIF orientation: what makes it upright; 5 to 8 swap width and height
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on damaged files, whatever their format.
PILLOW_FAULTS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


def check_image(data: bytes, max_pixels: int = MAX_PIXELS, key: str = "") -> list[str]:
    """Return the conversions that `decode_image` would name, and raise UnreadableImage where it would.

    A JPEG is decoded at an eighth of its size: its scans are read to the end all the same, in a third of the time.
    """
    return decode_image(data, max_pixels, key, small=True)[1]


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, key: str = "", small: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Decode any supported file to uint8 RGB [H, W, 3], upright, and name the conversions this took (CONVERSIONS).

    Alpha is dropped, not blended; 16-bit grey is divided by 257. `small` decodes a JPEG at an eighth of its size.
    Raises UnreadableImage.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata and on big images
        image, kinds = _open(data, max_pixels, key)
        if small:
            image.draft(None, (1, 1))
        pixels_HWC = None if small else _plain_jpeg(data, image)
        if pixels_HWC is not None and not image_ends.lacks_end(data):
            return pixels_HWC, kinds
        turned_by_pillow = image.format == "TIFF"  # while loading, and then it forgets the tag
        try:
            if not turned_by_pillow:
                image.load()
            orientation = _orientation(image)
            image.load()
            # Upright here, once: masks and boxes are drawn on what people see.
            if orientation in TRANSPOSE and not turned_by_pillow:
                image = image.transpose(TRANSPOSE[orientation])
            if image.mode.startswith("I"):
                image = _eight_bit(image, key)
            pixels_HWC = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except Unreadable:
            raise
        except PILLOW_FAULTS as fault:
            raise UnreadableImage(key, "truncated", f"does not decode to its end: {fault}") from fault
    if lack := image_ends.lacks_end(data):  # as a download that stopped in a preallocated file
        raise UnreadableImage(key, "truncated", lack)
    return pixels_HWC, kinds + ["exif"] * (orientation in TRANSPOSE)


def _plain_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """Return the pixels of an upright JPEG in colour, as Pillow decodes them, in two thirds of its time.

    None for all other files, and where it fails: Pillow then says why.
    """
    # Only where torch is loaded anyway: to the processes that check an index it would add 300 MB each.
    if "torchvision" not in sys.modules or image.format != "JPEG" or image.mode != "RGB":
        return None
    if _orientation(image) in TRANSPOSE:
        return None
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        pixels_CHW = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None
    return np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())


def image_header(data: bytes, max_pixels: int = MAX_PIXELS, key: str = "") -> tuple[int, int, list[str]]:
    """Return (width, height, conversions) as decode_image would give them, from the header. Raises UnreadableImage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, kinds = _open(data, max_pixels, key)
        orientation = _orientation(image)
    width, height = image.size
    if orientation in (5, 6, 7, 8) and image.format != "TIFF":  # for TIFF, Pillow has already swapped them
        width, height = height, width
    return width, height, kinds + ["exif"] * (orientation in TRANSPOSE)


def _open(data: bytes, max_pixels: int, key: str) -> tuple[Image.Image, list[str]]:
    if not data:
        raise UnreadableImage(key, "empty", "the file has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as fault:
        raise UnreadableImage(key, "huge", str(fault)) from fault
    except UnidentifiedImageError as fault:
        raise UnreadableImage(key, "corrupt", f"not an image in {', '.join(FORMATS)}") from fault
    except PILLOW_FAULTS as fault:
        raise UnreadableImage(key, "corrupt", str(fault)) from fault
    if image.width * image.height > max_pixels:
        raise UnreadableImage(key, "huge", f"{image.width}x{image.height} px is more than {max_pixels} pixels")
    # Pillow keeps the high byte of 16-bit RGB while decoding; only the raw mode of the tiles tells.
    deep = any(";16" in str(tile[3]) for tile in image.tile[:1])
    if image.mode not in MODES or (image.mode.startswith("I") and not deep):
        raise UnreadableImage(key, "unsupported_mode", f"Pillow mode {image.mode}")
    kinds = set(MODES[image.mode])
    kinds |= {"16bit"} if deep else set()
    kinds |= {"alpha"} if "transparency" in image.info else set()
    return image, [kind for kind in CONVERSIONS if kind in kinds]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except PILLOW_FAULTS:  # damaged metadata does not tell how to turn the image
        return 1


def _eight_bit(image: Image.Image, key: str) -> Image.Image:
    values_HW = np.array(image).astype(np.int64)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        raise UnreadableImage(key, "unsupported_mode", "integers outside 0..65535")
    return Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255, rounded
