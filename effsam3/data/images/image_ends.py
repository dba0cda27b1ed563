# SPDX-License-Identifier: Apache-2.0
"""Whether an image file is whole, by its own marks: decoders silently paint what is missing grey or black.

Only JPEG and PNG mark their end. Of a WebP, BMP or TIFF that ends in zeros nothing tells that they are not its own.
"""

from __future__ import annotations

import re

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # how they begin
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
# 0xFF and a code. 0xFF00 is a byte of a scan that happens to be 0xFF, 0xFFFF is padding; 01 and D0 to D8 (TEM, restart
# marks, SOI) have no content. All others but the end are followed by their length, which counts its own two bytes.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


def lacks_end(data: bytes) -> str:
    """Return what a JPEG or PNG lacks; empty if it is whole or neither."""
    if data.startswith(JPEG) and not jpeg_is_whole(data):
        return "no end marker (FF D9) follows the JPEG's scan"
    if data.startswith(PNG) and not png_is_whole(data):
        return "the PNG has no chunk IEND"
    return ""


def png_is_whole(data: bytes) -> bool:
    """Return whether the chunks of a PNG lead to its last, IEND, whatever comes after it (PNG specification, 5.3)."""
    place = len(PNG)
    while len(kind := data[place + 4 : place + 8]) == 4:
        if kind == b"IEND":
            return True
        place += 12 + int.from_bytes(data[place : place + 4], "big")  # length, kind, content, checksum
    return False


def jpeg_is_whole(data: bytes) -> bool:
    """Return whether an end marker follows the scans of a JPEG (ITU-T T.81, annex B), whatever comes after it.

    Segments are skipped by their lengths, so that the end of a thumbnail inside of one does not count. Cameras append
    videos, second images and padding to their files: none of it is looked at.
    """
    place, scanned = len(JPEG), False
    while (marker := MARKER.search(data, place)) is not None:
        code, place = marker[1][0], marker.end()
        if code == END_OF_IMAGE:
            return scanned
        scanned |= code == START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return False
