# SPDX-License-Identifier: Apache-2.0
"""SA-1B as released (photographs, COCO RLE masks), and any photographs, read through a parquet index.

The index has one row per usable image (COLUMNS). Files are named relative to the parquet's own folder; a member of a
tar is the tar's name with the member's byte offset and size, so tars are read in place and never extracted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effsam3.data import coco, indexing
from effsam3.data.images.decoding import decode_image
from effsam3.data.mapped import load_rows
from effsam3.data.unreadable import UnreadableAnnotations, UnreadableImage

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
CODES = {  # more columns, by which images are found: the xxh3_64 of what these columns say
    "key_code": ("key",),
    "store_code": ("key", "image_digest"),  # joined as in the key of a store, see features.store_keys
}


def digest_of(data: bytes) -> str:
    """Return what tells an image's bytes from all others: their xxh3_64, 16 hex digits."""
    import xxhash

    return xxhash.xxh3_64_hexdigest(data)


# ---- index


def load_index(path: str | Path, split: str | None = None, limit: int | None = None):
    """Return the index as a Hugging Face `datasets.Dataset`, rows in key order, with the columns CODES, too.

    The rows are mapped (see mapped.py), so that no process holds them. `split` keeps train or val; None: train's rows,
    then val's. `limit` keeps the first rows of what is left.
    Raises UserError when the file is missing, is damaged, is not such an index, or has no row in the split.
    """
    path = Path(path)
    command = f"effsam3 index sa1b FOLDER_OR_TARS --out {path}"
    return load_rows(path, COLUMNS, "an index of images", command, "image", split, limit, codes=CODES)


def splits_in(path: str | Path) -> list[str]:
    """Return the splits that have rows, train first. Raises UserError as `load_index` does."""
    column = load_index(path).select_columns("split").with_format("arrow")[:]["split"]
    return column.unique().to_pylist()


def with_masks(rows) -> int:
    """Return how many rows of an index have masks."""
    import pyarrow.compute as compute

    column = rows.select_columns("num_masks").with_format("arrow")[:]["num_masks"]
    return compute.sum(compute.greater(column, 0)).as_py() or 0


def read_indexed(row: dict, folder: Path, what: str) -> bytes:
    """Return the bytes of a row's `image` or `annotation`. Raises the Unreadable of its kind.

    Of an image these are the very bytes that were indexed: a file replaced under the same name is noticed.
    """
    data = indexing.read_file(row, folder, what, {"image": UnreadableImage, "annotation": UnreadableAnnotations}[what])
    if what == "image" and digest_of(data) != row["image_digest"]:
        detail = f"{row['image_file']} is another file of the same size than when indexed; build the index again"
        raise UnreadableImage(row["key"], "changed", detail)
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
