# SPDX-License-Identifier: Apache-2.0
"""Damage to files, drawn from a seeded generator: bytes that flip, are lost or come in, and other values in JSON."""

import json
import zipfile
from copy import deepcopy

JUNK = (
    None,
    True,
    0,
    -1,
    3.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "\u2028junk\x00",
    "x" * 5000,
    "../../elsewhere",
    [],
    {},
    [[[[]]]],
    {"a": {"b": None}},
    [1, "a", None],
)
DEEP = "[" * 100_000


def mutate_bytes(data: bytes, rng) -> bytes:
    """Flip bits, cut, insert, double, or blank out a part."""
    kind, at = rng.integers(6), int(rng.integers(len(data)))
    end = at + int(rng.integers(1, 64))
    if kind == 0:
        changed = bytearray(data)
        for place in rng.integers(len(data), size=int(rng.integers(1, 4))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    return {
        1: data[:at],
        2: data[:at] + rng.bytes(end - at) + data[at:],
        3: data[:at] + data[end:],
        4: data[:end] + data[at:],
        5: data[:at] + bytes(min(end, len(data)) - at) + data[end:],
    }[int(kind)]


def mutate_content(content, rng):
    """Replace, take away or double one value, wherever it stands."""
    content = deepcopy(content)
    places = []

    def walk(value):
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in inside:
            places.append((value, key))
            walk(inner)

    walk(content)
    parent, key = places[int(rng.integers(len(places)))]
    if rng.integers(4) == 0 and isinstance(parent, dict):
        parent["other" if rng.integers(2) else "effsam3"] = parent.pop(key)
    elif rng.integers(6) == 0:
        del parent[key]
    else:
        parent[key] = JUNK[int(rng.integers(len(JUNK)))]
    return content


def mutate_json(data: bytes, rng) -> bytes:
    """Damage a JSON (or YAML) file in its bytes or in its values; now and then, replace it by something else."""
    kind = int(rng.integers(20))
    if kind == 0:
        return (b"", b"\xff\xfe" + data, DEEP.encode(), b"null", b"[]", b'"text"', b"\x00" * 40)[int(rng.integers(7))]
    if kind < 8:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_content(json.loads(data), rng)).encode()


def mutate_record(path, out, rng) -> str:
    """Write a zip of torch.save anew with one record damaged and every checksum right; returns the record's name."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    names = sorted(records, key=lambda name: not name.endswith("data.pkl"))
    chosen = names[0] if rng.integers(3) else names[int(rng.integers(len(names)))]
    if chosen.endswith("data.pkl") or "/data/" not in chosen or rng.integers(2):
        records[chosen] = mutate_bytes(records[chosen], rng)
    else:
        records[chosen] = records[chosen][: int(rng.integers(len(records[chosen])))]
    if rng.integers(8) == 0:
        del records[names[int(rng.integers(len(names)))]]
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return chosen
