# SPDX-License-Identifier: Apache-2.0
"""Reads what wandb wrote offline: records in LevelDB's log format (blocks of 32 KiB), each a protocol buffer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
MAGIC = 7  # bytes at the beginning of the file


def read_wandb(folder: Path) -> dict:
    """Return {"id", "history": [{name: value}], "config": {name: value}} of an `offline-run-*` folder."""
    (file,) = folder.glob("*.wandb")
    found = {"id": None, "history": [], "config": {}}
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found["history"].append(_values(record.history.item))
        elif kind == "run":
            found["id"] = record.run.run_id
            found["config"] |= _values(record.run.config.update)
        elif kind == "config":
            found["config"] |= _values(record.config.update)
    return found


def _values(items) -> dict:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator:
    from wandb.proto.wandb_internal_pb2 import Record

    assert content.startswith(b":W&B")
    position, parts = MAGIC, []
    while position + HEADER.size <= len(content):
        if BLOCK - position % BLOCK < HEADER.size:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        parts.append(content[position : position + length])
        position += length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record
