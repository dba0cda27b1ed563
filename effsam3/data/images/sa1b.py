# SPDX-License-Identifier: Apache-2.0
"""SA-1B as released (photographs, COCO RLE masks), and any photographs, read through a parquet index.

The index has one row per usable image (COLUMNS). Files are named relative to the parquet's own folder; a member of a
tar is the tar's name with the member's byte offset and size, so tars are read in place and never extracted.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from effsam3.data import coco, indexing
from effsam3.data.images import image_ends
from effsam3.errors import UserError

COLUMNS = {  # name: Arrow type
    "key": "string",  # the file's stem, `sa_123`, of one's own photographs the path below their folder; unique
    "split": "string",  # train | val
    "image_file": "string",  # posix path relative to the parquet's folder
    "image_offset": "int64",  # bytes; 0 for a plain file
    "image_bytes": "int64",
    "image_digest": "string",  # xxh3_64 of those bytes, 16 hex digits; see digest_of
    "annotation_file": "string",  # null: the image has no usable annotations
    "annotation_offset": "int64",
    "annotation_bytes": "int64",
    "width": "int32",  # pixels, as decode_image gives them (after EXIF rotation)
    "height": "int32",
    "num_masks": "int32",
    "converted": "string",  # comma list of CONVERSIONS, or ""
}
SPLITS = ("train", "val")
CONVERSIONS = ("grayscale", "palette", "cmyk", "16bit", "alpha", "exif")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # the content decides, not the extension
MAX_PIXELS = 178_956_970  # above this Pillow itself refuses to open an image

MODES = {  # Pillow mode: conversions needed to reach RGB
    "RGB": (),
    "RGBX": (),
    "YCbCr": (),
    "1": ("grayscale",),
    "L": ("grayscale",),
    "LA": ("grayscale", "alpha"),
    "I;16": ("grayscale",),
    "I;16B": ("grayscale",),
    "I;16L": ("grayscale",),
    "I;16N": ("grayscale",),
    "I": ("grayscale",),
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


class Unreadable(UserError):
    """One file that cannot be used: `reason` is one word for reports, `detail` the full explanation."""

    what = ""

    def __init__(self, key: str, reason: str, detail: str = ""):
        super().__init__(key, reason, detail)
        self.key, self.reason, self.detail = key, reason, detail

    def __str__(self) -> str:
        return f"{self.what} {self.key!r}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class UnreadableImage(Unreadable):
    """Reasons: empty, corrupt, truncated, huge, too_small, unsupported_mode, unreadable, changed."""

    what = "image"


class UnreadableAnnotations(Unreadable):
    """Reasons: bad_json, not_sa1b or not_sav, bad_mask, bad_box, bad_point, object_ids, size_mismatch, frame_count,
    unreadable, changed; of a benchmark's PNGs those that `data.vos` gives."""

    what = "annotations of"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a killed writer, sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_of(data: bytes) -> str:
    """Return what tells an image's bytes from all others: their xxh3_64, 16 hex digits."""
    import xxhash

    return xxhash.xxh3_64_hexdigest(data)


def split_of(key: str, val_fraction: float) -> str:
    """Return train or val from the key only, so that neither other files nor their order matter."""
    return "val" if split_code(key) < val_fraction * 2**64 else "train"


def split_code(key: str) -> int:
    """Return the number below 2**64 that decides a key's split: the lowest are held out."""
    import xxhash

    return xxhash.xxh3_64_intdigest(key.encode())


# ---- index


def load_index(path: str | Path, split: str | None = None, limit: int | None = None):
    """Return the index as a Hugging Face `datasets.Dataset`, rows in key order.

    The table (about 100 bytes a row) is held in memory: no cache file that several ranks could race for, or that
    would outlive a rebuilt index. `split` keeps train or val, `limit` the first rows of what is left.
    Raises UserError when the file is missing, is damaged, is not such an index, or has no row in the split.
    """
    import pyarrow.compute as compute
    from datasets import Dataset

    path = Path(path)
    command = f"effsam3 index sa1b FOLDER_OR_TARS --out {path}"
    table = indexing.read_index(path, command)
    found = {field.name: str(field.type) for field in table.schema}
    wrong = [f"{name} ({kind}, found {found.get(name)})" for name, kind in COLUMNS.items() if found.get(name) != kind]
    if wrong:
        raise UserError(
            f"{path} is no index of images, or an older version's: {', '.join(wrong)}; make it anew, with the options "
            f"it was made with: {command}"
        )
    if split is not None:
        if split not in SPLITS:
            raise UserError(f"split {split!r} does not exist; choose from {', '.join(SPLITS)}")
        counts = {name: compute.sum(compute.equal(table["split"], name)).as_py() or 0 for name in SPLITS}
        table = table.filter(compute.equal(table["split"], split))
        if not table.num_rows:
            raise UserError(f"{path} has no image in split {split} ({counts}); rebuild it with another --val-fraction")
    return Dataset(table.select(list(COLUMNS)).slice(0, limit).combine_chunks())


def read_indexed(row: dict, folder: Path, what: str) -> bytes:
    """Return the bytes of a row's `image` or `annotation`. Raises the Unreadable of its kind.

    Of an image these are the very bytes that were indexed: a file replaced under the same name is noticed.
    """
    data = read_file(row, folder, what)
    if what == "image" and digest_of(data) != row["image_digest"]:
        detail = f"{row['image_file']} is another file of the same size than when indexed; build the index again"
        raise UnreadableImage(row["key"], "changed", detail)
    return data


def read_file(row: dict, folder: Path, what: str) -> bytes:
    """Return the bytes where a row points to, as far as it has the size that was indexed."""
    error = {"image": UnreadableImage, "annotation": UnreadableAnnotations}[what]
    file = Path(folder) / row[f"{what}_file"]
    try:
        with open(file, "rb") as stream:
            stream.seek(row[f"{what}_offset"])  # 0: a plain file, which is read whole to notice that it has grown
            data = stream.read(row[f"{what}_bytes"] if row[f"{what}_offset"] else -1)
    except OSError as fault:
        raise error(row["key"], "unreadable", str(fault)) from fault
    if len(data) != row[f"{what}_bytes"]:
        detail = f"{file} has {len(data)} bytes, {row[f'{what}_bytes']} when indexed; build the index again"
        raise error(row["key"], "changed", detail)
    return data


# ---- images


def read_image(row: dict, folder: Path) -> np.ndarray:
    """Return the image of an index row, uint8 RGB [H, W, 3]; `folder` is the parquet's.

    Raises UnreadableImage when the file has gone, does not decode, or is not the one that was indexed.
    """
    pixels_HWC, _ = decode_image(read_indexed(row, folder, "image"), key=row["key"])
    if pixels_HWC.shape[:2] != (row["height"], row["width"]):
        size = f"{pixels_HWC.shape[1]}x{pixels_HWC.shape[0]} px, {row['width']}x{row['height']} when indexed"
        raise UnreadableImage(row["key"], "changed", f"{row['image_file']} is {size}; build the index again")
    return pixels_HWC


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, key: str = "") -> tuple[np.ndarray, list[str]]:
    """Decode any supported file to uint8 RGB [H, W, 3], upright, and name the conversions this took (CONVERSIONS).

    Alpha is dropped, not blended; 16-bit grey is divided by 257. Raises UnreadableImage.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata and on big images
        image, kinds = _open(data, max_pixels, key)
        turned_by_pillow = image.format == "TIFF"  # while loading, and then it forgets the tag
        try:
            if not turned_by_pillow:
                image.load()
            orientation = _orientation(image)
            image.load()
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


# ---- annotations


def read_annotations(row: dict, folder: Path) -> list[dict]:
    """Return the annotations of an index row, see `parse_annotations`; [] when it has none."""
    if row["annotation_file"] is None:
        return []
    data = read_indexed(row, folder, "annotation")
    return parse_annotations(data, row["height"], row["width"], row["key"])


def parse_annotations(data: bytes, height: int, width: int, key: str = "") -> list[dict]:
    """Return the annotations of an SA-1B JSON, checked and completed as `coco.check_annotations` does.

    Raises UnreadableAnnotations.
    """
    try:
        return coco.check_annotations(coco.load_json(data), height, width)
    except coco.Malformed as fault:
        raise UnreadableAnnotations(key, fault.reason or "not_sa1b", str(fault)) from fault


def mask_of(annotation: dict, height: int, width: int) -> np.ndarray:
    """Return the mask of an annotation, bool [height, width]. Raises UserError when it is not of this size."""
    return coco.decode(annotation["segmentation"], height, width)
