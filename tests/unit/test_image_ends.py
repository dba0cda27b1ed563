# SPDX-License-Identifier: Apache-2.0
"""Whole JPEGs and PNGs are read whatever follows their end; cut ones are refused wherever they were cut."""

import io

import numpy as np
import pytest
from PIL import Image

from effsam3.data.images.decoding import decode_image
from effsam3.data.images.image_ends import jpeg_is_whole
from effsam3.data.unreadable import UnreadableImage

MP4 = b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\0\1\0mdat" + bytes(range(248)) + b"\0\0\0\xc8free" + bytes(192)
TRAILERS = {
    "nothing": b"", "zeros": bytes(500), "mp4": MP4, "text": b"camera trailer" + bytes(100), "marker": b"\xff\xda\xff",
    "pixels": bytes([0xFF, 0x00] * 300),
}  # fmt: skip


def encoded(side: int = 48, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def with_thumbnail() -> bytes:
    """The EXIF of a camera: a whole JPEG, with its own scan and end, in a segment of this one."""
    data, thumbnail = encoded(), encoded(16)
    content = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content
    assert segment.count(b"\xff\xd9") == 1
    return data[:2] + segment + data[2:]


def two_pictures() -> bytes:
    """A multi-picture file (MPF): a second image behind the first, and a segment that says where."""
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(encoded(side))) for side in (48, 32))
    first.save(file, "MPO", save_all=True, append_images=[second])
    return file.getvalue()


WHOLE = {
    "baseline": encoded(),
    "progressive": encoded(progressive=True),
    "restarts": encoded(restart_marker_blocks=1),
    "progressive with restarts": encoded(progressive=True, restart_marker_rows=1),
    "grey": encoded(mode="L"),
    "comment": encoded(comment=b"\xff\xd9 is no end here \xff\xda"),
    "thumbnail": with_thumbnail(),
}


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("kind", WHOLE)
def test_what_follows_the_end_does_not_matter(kind, trailer):
    data = WHOLE[kind]
    pixels_HWC, _ = decode_image(data + TRAILERS[trailer])
    np.testing.assert_array_equal(pixels_HWC, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_of_two_pictures_in_a_file_the_first_is_read():
    data = two_pictures()
    assert data.count(b"\xff\xd8\xff") == 2 and b"MPF" in data
    assert decode_image(data)[0].shape == decode_image(data + bytes(100))[0].shape == (48, 48, 3)
    end = len(data) - data[::-1].index(b"\xff\xd8\xff"[::-1]) - 3  # where the second begins
    assert jpeg_is_whole(data[: end + 40]), "the second is not looked at"


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_jpeg_is_refused_wherever_it_was_cut(kind):
    data = WHOLE[kind]
    for length in [*range(0, len(data) - 40, 23), *range(len(data) - 40, len(data))]:
        assert not jpeg_is_whole(data[:length]), length
        # As it is, in a file of its final size, and before bytes that are no end.
        for rest in (b"", bytes(len(data) - length), bytes(3000), b"\0<html>" + bytes(range(64)) * 4):
            with pytest.raises(UnreadableImage, match="truncated|corrupt|empty"):
                decode_image(data[:length] + rest)


def test_a_thumbnail_is_not_the_image():
    """Cut behind the thumbnail, which has its own end, there is no end left."""
    data = with_thumbnail()
    inner_end = data.index(b"\xff\xd9") + 2
    assert inner_end < len(data) - 2
    with pytest.raises(UnreadableImage):
        decode_image(data[: inner_end + 700] + bytes(2000))


def test_restarts_and_stuffed_bytes_are_in_the_scan():
    scan = WHOLE["restarts"][WHOLE["restarts"].index(b"\xff\xda") :]
    assert b"\xff\xd0" in scan and b"\xff\x00" in scan
    assert WHOLE["progressive"].count(b"\xff\xda") > 5


def test_a_length_that_lies_does_not_loop():
    rng = np.random.default_rng(2)
    for _ in range(400):
        data = bytearray(WHOLE["progressive with restarts"])
        for place in rng.integers(2, len(data), 3):
            data[place] = rng.integers(256)
        jpeg_is_whole(bytes(data))
    assert not jpeg_is_whole(b"\xff\xd8" + b"\xff\xe0\0\0" * 50) and not jpeg_is_whole(b"\xff\xd8\xff\xd9")


@pytest.mark.parametrize("rest", [b"", bytes(4000)], ids=["short", "zeros"])
def test_a_cut_png_is_refused_wherever_it_was_cut(rest):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    data = file.getvalue()
    assert (decode_image(data + rest)[0] == pixels).all()
    for length in range(40, len(data) - 8, 29):
        with pytest.raises(UnreadableImage):
            decode_image(data[:length] + rest)
