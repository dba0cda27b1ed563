# SPDX-License-Identifier: Apache-2.0
"""What is learned from and what is held out: decided by a hash of each key."""

from __future__ import annotations

SPLITS = ("train", "val")


def split_of(key: str, val_fraction: float) -> str:
    """Return train or val from the key only, so that neither other files nor their order matter."""
    return "val" if split_code(key) < val_fraction * 2**64 else "train"


def split_code(key: str) -> int:
    """Return the number below 2**64 that decides a key's split: the lowest are held out."""
    import xxhash

    return xxhash.xxh3_64_intdigest(key.encode())
