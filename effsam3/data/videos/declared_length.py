# SPDX-License-Identifier: Apache-2.0
"""How long a video file is by its own header, to tell one that was cut."""

from __future__ import annotations


def declared_bytes(head: bytes) -> int | None:
    """Return the length that an AVI, Matroska or WebM file declares; None without one."""
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        return length + 8 if length else None
    if head[:4] == b"\x1a\x45\xdf\xa3":
        header, start = _vint(head, 4)
        segment = start + (header or 0)
        if head[segment : segment + 4] == b"\x18\x53\x80\x67":
            content, start = _vint(head, segment + 4)
            return None if content is None else start + content
    return None


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """Return a Matroska length, None for one that is not known, and where it ends."""
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), at + width
