# SPDX-License-Identifier: Apache-2.0
"""Whether a JPEG is whole, by its markers; libjpeg paints what is missing grey and says nothing."""

from __future__ import annotations

import re

START = b"\xff\xd8"  # SOI: how every JPEG begins
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
# 0xFF and a code. 0xFF00 is a byte of a scan that happens to be 0xFF, 0xFFFF is padding; 01 and D0 to D8 (TEM, restart
# marks, SOI) stand alone. All others but the end are followed by their length, which counts its own two bytes.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


def is_whole(data: bytes) -> bool:
    """Return whether an end marker follows the scans of a JPEG (ITU-T T.81, annex B), whatever comes after it.

    Segments are skipped by their lengths, so that the end of a thumbnail inside of one does not count. Cameras append
    videos, second images and padding to their files: none of it is looked at.
    """
    place, scanned = len(START), False
    while (marker := MARKER.search(data, place)) is not None:
        code, place = marker[1][0], marker.end()
        if code == END_OF_IMAGE:
            return scanned
        scanned |= code == START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return False
