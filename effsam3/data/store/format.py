# SPDX-License-Identifier: Apache-2.0
"""What an embedding store looks like on disk: fields, manifest and journals (see the package)."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.files import write_text

if TYPE_CHECKING:
    import pyarrow

FORMAT, VERSION = "effsam3-store", 1
INPUTS = "inputs"  # entry of a description: how records are tied to what their features were made of
RESTORE = "restore it, or embed into an empty folder"
MANIFEST_FORM = {
    "format": str,
    "version": int,
    "fields": [{"name": str, "dtype": str, "shape": [int]}],
    "description": dict,
    "expected?": (int, None),
    "records?": (int, None),
    "skipped": [{"key": str, "reason": str}],
    "statistics?": (dict, None),
    "whole?": {str: int},
    "shards": [{"file": str, "keys": str, "records": int, "stride": int, "offset?": int, "journal?": bool}],
}
DTYPES = {"float16": 2, "float32": 4, "int8": 1, "uint8": 1, "int32": 4}  # name -> bytes of an element


class StoreError(UserError):
    """An embedding store that cannot be used as asked; names the file, record or setting, and what to do."""


@dataclass(frozen=True)
class Field:
    """One array of a record; `shape` has no batch axis: ("features", "float16", (1024, 72, 72))."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype not in DTYPES:
            raise StoreError(f"field {self.name}: cannot store dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")

    def __str__(self):
        return f"{self.name} {self.dtype}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


def stride(fields: Iterable[Field]) -> int:
    """Return the bytes from one record of these fields to the next: whole pages for images, cache lines for text."""
    payload = sum(field.nbytes for field in fields)
    # Whole pages, so that no read touches a neighbour's page; in a text's record most of a page would be empty.
    unit = 4096 if payload >= 64 << 10 else 64
    return -(-payload // unit) * unit


@dataclass(frozen=True)
class Shard:
    """A file of records: record i starts at byte `i * stride + offset` of `file`, its key is on line i of `keys`."""

    file: str  # relative to the store, absolute when the file belongs to somebody else
    keys: str
    records: int
    stride: int
    offset: int = 0
    journal: bool = True  # `keys` is a journal of ours (header line, checksums), not a bare list of keys


@dataclass(frozen=True)
class Manifest:
    """The only truth about a store; `records` is None until it is finished."""

    fields: tuple[Field, ...]
    description: dict
    expected: int | None = None  # keys that it was started for, if known
    records: int | None = None
    skipped: tuple[dict[str, str], ...] = ()  # key, reason
    statistics: dict | None = None
    whole: dict[str, int] = field(default_factory=dict)  # data sets all of whose records it has, see key_index.sum_of
    shards: tuple[Shard, ...] = ()

    @property
    def ties_inputs(self) -> bool:
        """Whether records are tied to what their features were made of; imported and older stores are not."""
        return INPUTS in self.description

    @property
    def finished(self) -> bool:
        return self.records is not None

    @property
    def payload(self) -> int:
        """Bytes of one record without padding."""
        return sum(field.nbytes for field in self.fields)

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return stride(self.fields)

    @property
    def header(self) -> str:
        """First line of every journal: a shard that meets another store's manifest is recognised by it."""
        return f"key\t{', '.join(map(str, self.fields))}"


# ---- manifest


def create_store(
    root: str | Path, fields: Sequence[Field], description: dict, expected: int | None = None
) -> Manifest:
    """Starts the store, or checks that the one already there has the same fields and description.

    One process calls this before any writer opens. `expected`, the number of keys to come, only serves messages.
    Raises StoreError naming every entry that differs, stored value -> new value.
    """
    root = Path(root)
    manifest = Manifest(tuple(fields), json.loads(json.dumps(description)), expected)
    if not (root / "manifest.json").exists():
        # Shards that lost their manifest may be days of work: a fresh store next to them would number its own like
        # them.
        if orphans := sorted(root.glob("shard-*")):
            raise StoreError(f"{root} holds {orphans[0].name} but no manifest.json: restore it or empty the folder")
        root.mkdir(parents=True, exist_ok=True)
        write_manifest(root, manifest)
        return manifest
    stored = open_manifest(root)
    old, new = _settings(stored), _settings(manifest)
    # All differences at once: whoever restores settings one by one would start as many passes.
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if names:
        changes = "; ".join(f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names)
        raise StoreError(
            f"{root} was embedded with other settings (stored -> new): {changes}. "
            "Restore the settings, embed into another folder, or delete this one"
        )
    if not stored.finished and stored.expected != expected:
        stored = replace(stored, expected=expected)
        write_manifest(root, stored)
    return stored


def _settings(manifest: Manifest) -> dict[str, str]:
    """All that two passes into one store must agree on, as flat name -> JSON."""
    agreed = {"fields": [str(field) for field in manifest.fields], "description": manifest.description}
    return {name: json.dumps(value) for name, value in flat(agreed).items()}


def flat(entries: dict, prefix: str = "") -> dict:
    """Return a description's entries by dotted names."""
    found: dict = {}
    for name, value in entries.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def storable(key: str) -> bool:
    """Return whether a text can be a key: journals hold one a line, between tabs."""
    return bool(key) and not any(unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs") for letter in key)


def open_manifest(root: str | Path) -> Manifest:
    """Raises StoreError when the manifest is missing, malformed or of another version."""
    path = Path(root) / "manifest.json"
    if not path.exists():
        raise StoreError(
            f"{root} is not an embedding store: no manifest.json in it. `effsam3 embed RECIPE` makes a store, "
            f"`effsam3 store import SOURCE {root}` makes one of upstream's shards"
        )
    content = read_json(path, MANIFEST_FORM, RESTORE, StoreError)
    if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
        raise StoreError(f"{path} is not version {VERSION} of {FORMAT}: embed again, into an empty folder")
    try:
        content["fields"] = tuple(Field(**entry) for entry in content["fields"])
        content["shards"] = tuple(Shard(**entry) for entry in content["shards"])
        content["skipped"] = tuple(content["skipped"])
        return Manifest(**content)
    except (TypeError, StoreError) as error:  # a name or a value that Field, Shard or Manifest cannot have
        raise StoreError(f"{path} is damaged ({error}); {RESTORE}") from error


def ties_inputs(root: str | Path) -> bool:
    """Return whether the store ties its records to what their features were made of; one still to be made does."""
    return not (Path(root) / "manifest.json").exists() or open_manifest(root).ties_inputs


def untied(root: str | Path) -> str:
    """Return what to say of a store that does not."""
    return (
        f"{root} was imported or made by an older version and does not know what its features were made of: an input "
        "that was replaced since under the same name is not noticed"
    )


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    """Replaces manifest.json atomically."""
    write_text(
        Path(root) / "manifest.json", json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}, indent=1)
    )


# ---- journals


def whole_lines(path: Path) -> bytes:
    """Return the file without the line that a live or killed writer may have left half written."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def journal_lines(path: Path, manifest: Manifest) -> bytes:
    """Return the lines below the header of a journal; StoreError when the header is not of this manifest."""
    header, _, lines = whole_lines(path).partition(b"\n")
    if header and header.decode(errors="replace") != manifest.header:
        raise StoreError(
            f"wrong manifest: {path} belongs to records of {header.decode(errors='replace')!r}, manifest.json has "
            f"{manifest.header!r}; restore the manifest that was embedded with these shards"
        )
    return lines


def shards_on_disk(root: Path, manifest: Manifest) -> tuple[Shard, ...]:
    """All non-empty shards of all writers, also those of an unfinished pass."""
    counts = [(path, journal_lines(path, manifest).count(b"\n")) for path in sorted(root.glob("shard-*.tsv"))]
    return tuple(
        Shard(path.with_suffix(".bin").name, path.name, count, manifest.stride) for path, count in counts if count
    )


def list_shards(root: Path, manifest: Manifest) -> tuple[Shard, ...]:
    """Return the shards to read: those the manifest lists, or while it lists none, those on disk."""
    return manifest.shards or shards_on_disk(root, manifest)


def journal_column(root: Path, manifest: Manifest, shards: Iterable[Shard], column: str) -> pyarrow.Array:
    """Return the column "key" or "checksum" of all shards, in order, as strings."""
    import pyarrow
    from pyarrow import csv

    parts = []
    for shard in shards:
        path = root / shard.keys
        if not path.is_file():
            raise StoreError(f"{path} is missing; {remedy(shard)}")
        names = ["key", "checksum"] if shard.journal else ["key"]
        lines = journal_lines(path, manifest) if shard.journal else whole_lines(path)
        if (count := lines.count(b"\n")) < shard.records:
            raise StoreError(f"truncated journal {path}: has {count} of {shard.records} lines; {remedy(shard)}")
        try:
            table = csv.read_csv(
                pyarrow.BufferReader(lines),
                csv.ReadOptions(column_names=names, use_threads=False),  # no threads: data workers fork later
                csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
                csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()), include_columns=[column]),
            )
        except pyarrow.ArrowInvalid as error:
            raise StoreError(f"{path} is damaged ({error}); {remedy(shard)}") from error
        # A live writer may have added lines since the shards were listed.
        parts += table.column(0).slice(0, shard.records).chunks
    return pyarrow.concat_arrays(parts) if parts else pyarrow.array([], pyarrow.string())


def check_sizes(root: Path, manifest: Manifest, shards: Iterable[Shard]) -> None:
    """Raises StoreError naming a shard that is missing, too short for its journal, or of other records."""
    for shard in shards:
        path = root / shard.file
        if shard.stride != (manifest.stride if shard.journal else shard.offset + manifest.payload):
            raise StoreError(
                f"wrong manifest: {path} has a record every {shard.stride} bytes, but the fields "
                f"{', '.join(map(str, manifest.fields))} make records of {manifest.payload}; restore its manifest"
            )
        if not path.is_file():
            raise StoreError(f"shard {path} is missing; {remedy(shard)}")
        # Of the last record only the padding may be missing.
        size, needed = path.stat().st_size, (shard.records - 1) * shard.stride + shard.offset + manifest.payload
        if size < needed:
            raise StoreError(f"truncated shard {path}: has {size} of {needed} bytes; {remedy(shard)}")


def remedy(shard: Shard) -> str:
    """Return what to do about a damaged shard."""
    if not shard.journal:
        return "restore the imported files where they were, or delete the store and import again"
    return f"delete {shard.file} and {shard.keys} and run the same command again: it writes only what is missing"
