# SPDX-License-Identifier: Apache-2.0
"""Reading SA-1B: decoding every kind of image file, annotations, masks, and rows of the index."""

import io
import json
import pickle
import struct
import warnings
import zlib

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from effsam3.data.images import sa1b
from effsam3.data.images.decoding import ORIENTATION, decode_image, image_header
from effsam3.data.images.index import build_index
from effsam3.data.splits import split_of
from effsam3.data.synthetic.images import make_synthetic_sa1b, sa1b_record
from effsam3.data.unreadable import UnreadableAnnotations, UnreadableImage
from effsam3.errors import UserError

RNG = np.random.default_rng(0)
SMOOTH = np.stack([*np.meshgrid(np.linspace(0, 255, 40), np.linspace(255, 0, 24)), np.full((24, 40), 90)], -1)
SMOOTH = SMOOTH.astype(np.uint8)  # [24, 40, 3]; survives JPEG


def encode(image, kind, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows: np.ndarray, colour_type: int, size: tuple[int, int] | None = None) -> bytes:
    """Return a 16-bit PNG of values [H, W, channels], by hand: Pillow writes none with colours. The header may lie."""
    height, width = size or rows.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_plain_jpeg_and_png_are_as_pillow_decodes_them():
    for data in (encode(SMOOTH, "JPEG"), encode(SMOOTH, "PNG"), encode(SMOOTH, "BMP"), encode(SMOOTH, "TIFF")):
        pixels, kinds = decode_image(data)
        assert kinds == [] and pixels.dtype == np.uint8 and pixels.flags.writeable
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_header(data) == (40, 24, [])


GREY = SMOOTH[..., 0]
ALPHA = np.dstack([SMOOTH, RNG.integers(0, 255, (24, 40), dtype=np.uint8)])
DEEP = RNG.integers(0, 65536, (24, 40, 4))
PALETTE = Image.fromarray(SMOOTH).quantize(256)


@pytest.mark.parametrize(
    "data, expected_HWC, kinds, tolerance",
    [
        (encode(GREY, "JPEG", quality=100), GREY[..., None], ["grayscale"], 2),
        (encode(Image.fromarray(GREY).convert("1"), "PNG"), None, ["grayscale"], 0),
        (encode(Image.fromarray(ALPHA).convert("LA"), "PNG"), None, ["grayscale", "alpha"], 0),
        (encode(ALPHA, "PNG"), SMOOTH, ["alpha"], 0),
        (encode(ALPHA, "WEBP", lossless=True, exact=True), SMOOTH, ["alpha"], 0),
        (encode(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), ["palette"], 0),
        (encode(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB")), ["palette", "alpha"], 0),
        (encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=100), SMOOTH, ["cmyk"], 8),
        (png(DEEP[..., :1], 0), np.round(DEEP[..., :1] / 257), ["grayscale", "16bit"], 0),
        (encode(DEEP[..., 0].astype(np.uint16), "TIFF"), np.round(DEEP[..., :1] / 257), ["grayscale", "16bit"], 0),
        (png(DEEP[..., :3], 2), DEEP[..., :3] / 257, ["16bit"], 1),
        (png(DEEP, 6), DEEP[..., :3] / 257, ["16bit", "alpha"], 1),
    ],
    ids="grey bilevel grey-alpha png-alpha webp-alpha palette palette-alpha cmyk png16 tiff16 rgb16 rgba16".split(),
)  # fmt: skip
def test_other_kinds_become_rgb_and_are_named(data, expected_HWC, kinds, tolerance):
    pixels, found = decode_image(data)
    assert found == kinds and pixels.shape == (24, 40, 3) and pixels.dtype == np.uint8
    assert image_header(data) == (40, 24, kinds)
    if expected_HWC is None:
        expected_HWC = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[..., None]
    assert abs(pixels.astype(float) - expected_HWC).max() <= tolerance


def test_ycck_jpeg():
    # Adobe's marker with transform 2 turns the four channels into YCCK; Pillow inverts what carries the marker.
    data = encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG")
    at = data.index(b"Adobe")
    pixels, kinds = decode_image(data[: at + 11] + b"\2" + data[at + 12 :])
    assert kinds == ["cmyk"] and pixels.shape == (24, 40, 3)


FIRST_ROW_AND_COLUMN = {  # the EXIF standard's own words: which side of the upright image they show
    2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation(kind, orientation):
    row, column = FIRST_ROW_AND_COLUMN[orientation]
    upright = SMOOTH
    stored = upright.transpose(1, 0, 2) if row in ("left", "right") else upright
    stored = stored[:: -1 if row in ("right", "bottom") else 1, :: -1 if column in ("right", "bottom") else 1]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encode(np.ascontiguousarray(stored), kind, exif=exif, **options)
    pixels, kinds = decode_image(data)
    assert kinds == ["exif"] and pixels.shape == upright.shape
    assert abs(pixels.astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)
    assert image_header(data) == (upright.shape[1], upright.shape[0], ["exif"])


def test_damaged_exif_leaves_the_image_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode(SMOOTH, "WEBP", exif=exif)
    pixels, kinds = decode_image(data.replace(b"MM\0*", b"XX\0*"))
    assert kinds == [] and pixels.shape == SMOOTH.shape


NOISY_JPEG = encode(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8), "JPEG")


HUGE = png(DEEP[..., :3], 2, (30000, 30000))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"this is not an image\n" * 10, "corrupt"),
        (b"\xff\xd8\xff", "corrupt"),
        (encode(SMOOTH, "GIF"), "corrupt"),
        (NOISY_JPEG[: len(NOISY_JPEG) // 2], "truncated"),
        (NOISY_JPEG[:1500] + bytes(len(NOISY_JPEG) - 1500), "truncated"),
        (encode(SMOOTH, "PNG")[:-40], "truncated"),
        (encode(SMOOTH.astype(np.float32)[..., 0], "TIFF"), "unsupported_mode"),
        (encode(SMOOTH.astype(np.int32)[..., 0], "TIFF"), "unsupported_mode"),
        (HUGE, "huge"),
    ],
)
def test_unusable_images_are_named_errors(data, reason):
    with pytest.raises(UnreadableImage) as error:
        decode_image(data, key="sa_7")
    assert error.value.reason == reason and error.value.key == "sa_7" and "sa_7" in str(error.value)


def test_big_images_are_judged_by_max_pixels_and_pillow_keeps_quiet():
    data = png(DEEP[..., :3], 2, (12000, 12000))  # between Pillow's warning and its error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_header(data)[:2] == (12000, 12000)
        with pytest.raises(UnreadableImage, match="huge"):
            image_header(data, max_pixels=10_000_000)
        with pytest.raises(UnreadableImage, match="huge"):
            decode_image(encode(SMOOTH, "PNG"), max_pixels=24 * 40 - 1)
        decode_image(encode(SMOOTH, "PNG"), max_pixels=24 * 40)


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    deep = encode(GREY.astype(np.uint16), "TIFF")
    good = [encode(SMOOTH, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")] + [
        deep,
        encode(SMOOTH, "BMP"),
    ]
    for _ in range(3000):
        data = bytearray(good[rng.integers(len(good))])
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(min(len(data), 400))] = rng.integers(256)
        data = bytes(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
        try:
            pixels, kinds = decode_image(data, max_pixels=1_000_000)
        except UnreadableImage:
            continue
        assert pixels.ndim == 3 and pixels.shape[2] == 3
        assert image_header(data) == (pixels.shape[1], pixels.shape[0], kinds)


# ---- annotations


def test_masks_equal_pycocotools_and_the_truth():
    truth = RNG.random((6, 40, 30)) < np.array([0, 0.02, 0.5, 0.98, 1, 0.3])[:, None, None]
    truth[5] = False
    truth[5, 10:20, 5:25] = True
    record = sa1b_record(1, truth[1:])
    annotations = sa1b.parse_annotations(json.dumps(record).encode(), 40, 30)
    assert annotations == record["annotations"]
    for annotation, mask in zip(annotations, truth[1:], strict=True):
        got = sa1b.mask_of(annotation, 40, 30)
        assert got.dtype == bool
        np.testing.assert_array_equal(got, mask)
        np.testing.assert_array_equal(got, coco_mask.decode(annotation["segmentation"]))


def damaged(change) -> bytes:
    record = sa1b_record(1, np.eye(20, dtype=bool)[None])
    change(record, record["annotations"][0])
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "bad_json"),
        (b'{"annotations": [', "bad_json"),
        (b"\xff\xfe\x00", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"[3]", "not_sa1b"),
        (b"3", "not_sa1b"),
        (b'{"images": []}', "not_sa1b"),
        (damaged(lambda record, _: record.update(image={"height": 20})), "not_sa1b"),
        (damaged(lambda record, _: record.update(annotations={})), "not_sa1b"),
        (damaged(lambda record, _: record.update(annotations=[3])), "not_sa1b"),
        (damaged(lambda _, annotation: annotation.pop("segmentation")), "not_sa1b"),
        (damaged(lambda _, annotation: annotation["segmentation"].update(counts=[3, 4])), "bad_mask"),
        (damaged(lambda _, annotation: annotation["segmentation"].update(counts="0")), "bad_mask"),
        (damaged(lambda _, annotation: annotation["segmentation"].update(size=[20, 21])), "size_mismatch"),
        (damaged(lambda record, _: record["image"].update(width=21)), "size_mismatch"),
    ],
)
def test_other_json_is_a_named_error(data, reason):
    with pytest.raises(UnreadableAnnotations) as error:
        sa1b.parse_annotations(data, 20, 20, "sa_1")
    assert error.value.reason == reason


def test_json_without_annotations_is_fine():
    assert sa1b.parse_annotations(damaged(lambda record, _: record.update(annotations=[])), 20, 20) == []


def test_mask_of_refuses_another_size():
    annotation = sa1b_record(1, np.eye(20, dtype=bool)[None])["annotations"][0]
    with pytest.raises(UserError, match="20"):
        sa1b.mask_of(annotation, 20, 21)
    annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"][:-1]
    with pytest.raises(UserError):  # pycocotools itself would fill the rest with old memory
        sa1b.mask_of(annotation, 20, 20)


# ---- index


@pytest.fixture
def indexed(tmp_path):
    make_synthetic_sa1b(tmp_path / "data", 12, side_px=64)
    build_index([tmp_path / "data"], tmp_path / "index.parquet", val_fraction=0.3, workers=1, progress=False)
    return tmp_path / "index.parquet"


def test_rows_are_read_through_datasets(indexed):
    import datasets

    rows = sa1b.load_index(indexed)
    assert isinstance(rows, datasets.Dataset) and len(rows) == 12 and rows.column_names == [*sa1b.COLUMNS, *sa1b.CODES]
    train, val = sa1b.load_index(indexed, "train"), sa1b.load_index(indexed, "val")
    assert len(train) + len(val) == 12 and len(val) and set(val["split"]) == {"val"}
    assert sa1b.load_index(indexed, limit=5)["key"] == rows["key"][:5] == sorted(train["key"])[:5]
    assert sa1b.load_index(indexed, "train", limit=2)["key"] == train["key"][:2]
    by_datasets = datasets.load_dataset(
        "parquet", data_files=str(indexed), split="train", cache_dir=str(indexed.parent / "cache")
    )
    assert by_datasets.sort("split").to_list() == rows.remove_columns(list(sa1b.CODES)).to_list()
    assert pickle.loads(pickle.dumps(rows)).to_list() == rows.to_list()  # a spawned loader worker gets it so
    for row in rows:
        data = (indexed.parent / "data" / f"{row['key']}.jpg").read_bytes()
        np.testing.assert_array_equal(sa1b.read_image(row, indexed.parent), decode_image(data)[0])
        record = json.loads((indexed.parent / "data" / f"{row['key']}.json").read_bytes())
        assert sa1b.read_annotations(row, indexed.parent) == record["annotations"]
        assert row["num_masks"] == len(record["annotations"]) >= 3
        assert (row["width"], row["height"]) == (record["image"]["width"], record["image"]["height"])


def test_a_rebuilt_index_is_seen_at_once(indexed):
    assert len(sa1b.load_index(indexed)) == 12
    (indexed.parent / "data" / "sa_1.jpg").unlink()
    build_index([indexed.parent / "data"], indexed, workers=1, progress=False)
    assert len(sa1b.load_index(indexed)) == 11


def test_wrong_indexes_are_user_errors(indexed, tmp_path):
    import pyarrow

    with pytest.raises(UserError, match=r"effsam3 index sa1b .* --out .*none.parquet"):
        sa1b.load_index(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="not a parquet"):
        sa1b.load_index(tmp_path / "text.parquet")
    parquet.write_table(pyarrow.table({"key": ["a"], "width": [1.5]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="width .int32, found double"):
        sa1b.load_index(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="train, val"):
        sa1b.load_index(indexed, "test")
    build_index([tmp_path / "data"], indexed, val_fraction=0, workers=1, progress=False)
    with pytest.raises(UserError, match="--val-fraction"):
        sa1b.load_index(indexed, "val")


def test_an_index_without_digests_is_an_older_versions(indexed, tmp_path):
    old = parquet.read_table(indexed).drop_columns("image_digest")
    parquet.write_table(old, tmp_path / "old.parquet")
    with pytest.raises(UserError, match=r"older version's: image_digest .*make it again, with the options"):
        sa1b.load_index(tmp_path / "old.parquet")


def test_a_changed_file_is_never_read_as_the_indexed_one(indexed):
    first, second, third = sa1b.load_index(indexed, limit=3)
    folder = indexed.parent
    with open(folder / first["image_file"], "ab") as file:
        file.write(b"more")
    with pytest.raises(UnreadableImage, match="changed") as error:
        sa1b.read_image(first, folder)
    assert error.value.key == first["key"] and pickle.loads(pickle.dumps(error.value)).reason == "changed"
    with pytest.raises(UnreadableImage, match="changed"):
        sa1b.read_image(second | {"width": second["width"] + 1}, folder)
    (folder / third["image_file"]).unlink()
    (folder / third["annotation_file"]).unlink()
    with pytest.raises(UnreadableImage, match="unreadable"):
        sa1b.read_image(third, folder)
    with pytest.raises(UnreadableAnnotations, match="unreadable"):
        sa1b.read_annotations(third, folder)
    damaged_bytes = bytes(second["image_bytes"])
    (folder / second["image_file"]).write_bytes(damaged_bytes)
    with pytest.raises(UnreadableImage, match="another file of the same size"):
        sa1b.read_image(second, folder)


def test_split_depends_on_the_key_alone():
    keys = [f"sa_{n}" for n in range(20000)]
    val = {key for key in keys if split_of(key, 0.1) == "val"}
    assert 0.09 < len(val) / len(keys) < 0.11
    assert val <= {key for key in keys if split_of(key, 0.2) == "val"}
    assert {split_of(key, 0.0) for key in keys} == {"train"}
