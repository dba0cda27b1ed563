# SPDX-License-Identifier: Apache-2.0
"""The faster decoder of plain JPEGs gives Pillow's pixels bit for bit, and refuses what Pillow refuses."""

import io

import numpy as np
import pytest
import torchvision  # noqa: F401  it is used where it is loaded
from PIL import Image

from effsam3.data.images import decoding
from effsam3.data.images.decoding import ORIENTATION, check_image, decode_image
from effsam3.data.unreadable import UnreadableImage

pytestmark = pytest.mark.filterwarnings("ignore")  # decode_image holds back the decoder's remarks
RNG = np.random.default_rng(0)


def photograph(height: int, width: int) -> np.ndarray:
    """Edges, gradients and noise in colour."""
    rows, columns = np.mgrid[:height, :width]
    image_HW3 = np.stack([rows * 255 / height, columns * 255 / width, (rows // 7 + columns // 5) % 2 * 200], -1)
    return (image_HW3 + RNG.normal(0, 12, image_HW3.shape)).clip(0, 255).astype(np.uint8)


def jpeg(image_HW3: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, "JPEG", **options)
    return file.getvalue()


def outcome(data: bytes) -> tuple:
    """Return all that a caller sees of a file."""
    try:
        pixels_HWC, kinds = decode_image(data, key="k")
    except UnreadableImage as fault:
        return fault.reason, fault.detail
    return pixels_HWC.shape, pixels_HWC.tobytes(), kinds, pixels_HWC.flags.writeable


def checked(data: bytes) -> tuple:
    """Return what the check of an index says."""
    try:
        return (check_image(data, key="k"),)
    except UnreadableImage as fault:
        return fault.reason, fault.detail


def by_pillow(data: bytes, monkeypatch) -> tuple:
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "_plain_jpeg", lambda *_: None)
        return outcome(data)


FORMS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 95},
    "coarse": {"quality": 5},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
    "profile": {"icc_profile": b"p" * 70_000},
    "comment": {"comment": b"c" * 1000},
    "dpi": {"dpi": (300, 300)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (16, 16), (241, 357)])
def test_pixels_are_pillows(form, size, monkeypatch):
    data = jpeg(photograph(*size), **FORMS[form])
    assert decoding._plain_jpeg(data, Image.open(io.BytesIO(data))) is not None
    assert outcome(data) == by_pillow(data, monkeypatch) and checked(data) == ([],)


def test_what_is_not_plain_is_left_to_pillow():
    grey, colour = photograph(20, 30)[..., 0], photograph(20, 30)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    files = [jpeg(grey), jpeg(colour, exif=turned)]
    for image, kind in ((Image.fromarray(colour).convert("CMYK"), "JPEG"), (Image.fromarray(colour), "PNG")):
        file = io.BytesIO()
        image.save(file, kind)
        files.append(file.getvalue())
    assert [decoding._plain_jpeg(data, Image.open(io.BytesIO(data))) for data in files] == [None] * 4


@pytest.mark.parametrize("form", ["4:2:0", "4:4:4", "progressive", "restarts"])
def test_damaged_files_end_as_with_pillow(form, monkeypatch):
    data = jpeg(photograph(61, 83), **FORMS[form])
    outcomes = []
    for number in range(150):
        damaged = bytearray(data)
        for place in RNG.integers(2, len(data), number % 4):
            damaged[place] = RNG.integers(256)
        damaged = bytes(damaged[: RNG.integers(len(data))] if number % 3 == 0 else damaged)
        outcomes.append(outcome(damaged))
        assert outcomes[-1] == by_pillow(damaged, monkeypatch), number
        told = outcomes[-1][2:3] if len(outcomes[-1]) == 4 else outcomes[-1]
        assert checked(damaged) == told, number
    refused = sum(len(one) == 2 for one in outcomes)
    assert 40 < refused < 140


@pytest.mark.parametrize("tail", [b"", b"\0" * 100, b"\xff\xd8\xff\xe0 another image", b"video" * 1000])
def test_what_follows_the_end_is_ignored(tail, monkeypatch):
    data = jpeg(photograph(40, 50)) + tail
    assert outcome(data) == by_pillow(data, monkeypatch) and outcome(data)[0] == (40, 50, 3)
