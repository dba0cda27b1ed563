# SPDX-License-Identifier: Apache-2.0
"""Texts out of files that people make: .txt, .json, .jsonl, .csv, .tsv and .parquet, whatever column and encoding.

Nothing is guessed where two guesses are possible: the error lists what there is and the key that chooses.
"""

from __future__ import annotations

import codecs
import csv
import glob
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from effsam3.errors import UserError, did_you_mean

# Recap-DataComp's columns that `mix` reads: per row one of the two captions, by a hash of `key`.
MIX = ("key", "re_caption", "org_caption")
# Columns of texts that need no naming, however they are capitalised; `re_caption` comes before every other.
KNOWN = (
    "caption", "captions", "text", "texts", "phrase", "phrases", "prompt", "sentence", "description", "expression",
    "noun_phrase", "text_input", "recaption", "org_caption",
)  # fmt: skip
JSON_NAMES = ("text_annotations", "phrases", "captions", "texts", "annotations")  # of the list in .json
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
ROWS = 10_000  # of a parquet read at a time
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are no UTF-8
SAVE_AS_UTF8 = "save the file as UTF-8, such as by iconv -f WINDOWS-1252 -t UTF-8"
NUL = "NUL characters; if the file is UTF-16 or UTF-32, it has no byte order mark. Save the file as UTF-8"


class TextColumn(NamedTuple):
    """A column's name, empty where a file has none, and its values, unclean and in order."""

    name: str
    values: Iterator[object]


@dataclass(frozen=True)
class Unusable:
    """In the place of a row's text, why the row has none."""

    reason: str
    shown: object

    def __repr__(self) -> str:
        return repr(self.shown)


def read_texts(file: str, column: str | None = None, key: str = "data.column") -> TextColumn:
    """Return one column of a file.

    Args:
        column: its name, or `mix` of Recap-DataComp; None: the one that is known to hold texts.
        key: the recipe's, for messages.

    Raises:
        UserError: there is no such column, or several that could be meant; and while its values are read, a line that
            cannot be.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{file} must end in {', '.join(READERS)}")
    if not Path(file).is_file():
        raise UserError(f"there is no file {file}")
    return READERS[suffix](file, column, key)


def choose(names: Iterable[str], column: str | None, file: str, key: str) -> str:
    """Return the column of texts.

    Raises:
        UserError: there is none by that name, or no single one whose name is known.
    """
    names = list(names)
    listed = ", ".join(map(repr, names)) or "none"
    wanted = [column] if column is not None else KNOWN
    found = [name for name in names if _folded(name) in map(_folded, wanted)]
    # What the data set was made for; the alt text next to it has a known name, too.
    if column is None and (recap := [name for name in names if _folded(name) == "re_caption"]):
        return recap[0]
    if column in names:
        return column
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{file} has several columns of texts, {', '.join(map(repr, found))}; choose one with {key}")
    if column is not None:
        raise UserError(f"{key}: {file} has no column {column!r}{did_you_mean(column, names)}; it has {listed}")
    raise UserError(
        f"{file} has no column that is known to hold texts ({', '.join(KNOWN[:6])} and the like); it has {listed}. "
        f"Name one with {key}; a list without a header line is a .txt, one text a line"
    )


def _folded(name: str) -> str:
    return name.strip().casefold()


def _is_known(name: str) -> bool:
    return _folded(name) in (*KNOWN, "re_caption")


def caption_files(captions: str) -> list[str]:
    """Return the files of a folder, a pattern or a file, sorted.

    Of a folder they are the parquet files if it has any, else those of the one kind that it has. Hidden folders are
    left out.

    Raises:
        UserError: there is nothing by that name, or a folder has files of several kinds.
    """
    path, files = Path(captions), []
    if path.is_dir():
        files = _files_in(path)
    elif glob.has_magic(captions):
        files = sorted(glob.glob(captions, recursive=True))
    elif path.is_file():
        files = [captions]
    if not files:
        found = (
            "is not there" if not path.exists() and not glob.has_magic(captions) else f"has no {', '.join(READERS)}"
        )
        raise UserError(
            f"captions: {captions} {found}; name a folder, a file or a pattern of files. `effsam3 fetch recap --out "
            "data/recap` gets Recap-DataComp-1B"
        )
    return files


def _files_in(folder: Path) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in READERS and file.is_file() and not _hidden(file.relative_to(folder)):
            by_kind.setdefault(file.suffix.lower(), []).append(str(file))
    if ".parquet" not in by_kind and len(by_kind) > 1:
        kinds = ", ".join(f"{len(files)} {kind}" for kind, files in by_kind.items())
        raise UserError(
            f"captions: {folder} has files of several kinds ({kinds}); name one of them or a pattern, such as "
            f"data.captions='{folder}/*{next(iter(by_kind))}'"
        )
    return by_kind.get(".parquet", next(iter(by_kind.values()), []))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# ---- text files


def lines(file: str) -> Iterator[str]:
    """Yield a file's lines with their ends: UTF-8, or as a byte order mark declares.

    Raises:
        UserError: the file is not in its encoding; the message names the line.
    """
    with open(file, "rb") as opened:
        start = opened.read(4)
    # UTF-8 unless a mark says otherwise: an encoding guessed from bytes is wrong now and then, for a whole list.
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    number, name = 0, encoding.removesuffix("-sig").upper()
    try:
        with open(file, encoding=encoding, errors=errors, newline="") as opened:
            for number, line in enumerate(opened, 1):
                if "\0" in line:
                    raise UserError(f"{file}:{number}: {NUL}")
                if bad := ESCAPED.findall(line):
                    shown = " ".join(f"{ord(one) - 0xDC00:02x}" for one in bad[:4])
                    raise UserError(f"{file}:{number}: the bytes {shown} are not {name}; {SAVE_AS_UTF8}")
                yield line
    except UnicodeDecodeError as error:  # decoded in blocks, so that the line is not known
        raise UserError(f"{file}: it is not {name} after line {number} ({error.reason}); {SAVE_AS_UTF8}") from error


def _read_txt(file: str, column: str | None, key: str) -> TextColumn:
    return TextColumn("", (line.rstrip("\r\n") for line in lines(file)))


def _read_json(file: str, column: str | None, key: str) -> TextColumn:
    text = "".join(lines(file))
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    if isinstance(content, dict):
        content = next((content[name] for name in JSON_NAMES if name in content), None)
    if not isinstance(content, list):
        raise UserError(f"{file} must be a list, or an object with a list named {' or '.join(JSON_NAMES)}")
    return _records(iter(content), file, column, key)


def _read_jsonl(file: str, column: str | None, key: str) -> TextColumn:
    return _records(_json_lines(file), file, column, key)


def _json_lines(file: str) -> Iterator[object]:
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            yield ""
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number} is not JSON ({error}); a .jsonl has one value a line") from error


def _records(values: Iterator[object], file: str, column: str | None, key: str) -> TextColumn:
    """Texts as they are, or of objects one of their values, under the name that the first object gives it."""
    head = []  # up to the first value that is not null or blank: it tells which of the two they are
    for value in values:
        head.append(value)
        if value is not None and value != "":
            break
    values = chain(head, values)
    if not head or not isinstance(head[-1], dict):
        return TextColumn("", values)
    chosen = choose(head[-1], column, file, key)
    return TextColumn(chosen, (value.get(chosen) if isinstance(value, dict) else value for value in values))


def _read_table(file: str, column: str | None, key: str) -> TextColumn:
    """A .csv or .tsv. Its header is the first line that is not blank, divided by the delimiter that does it best."""
    rest = lines(file)
    first, header = next(((number, line) for number, line in enumerate(rest, 1) if line.strip()), (1, ""))
    divided = {mark: _cells(header, mark) for mark in DELIMITERS[Path(file).suffix.lower()]}
    # The one that makes most columns of the header; text below it may be full of the others.
    mark = max(divided, key=lambda mark: len(divided[mark]))
    names = divided[mark]
    if not any(names):
        raise UserError(f"{file}: its first line must be a header line, it is {header.strip()!r}")
    chosen = choose(names, column, file, key)
    return TextColumn(chosen, _column(rest, first, mark, names.index(chosen), len(names), file))


def _cells(line: str, mark: str) -> list[str]:
    """Return the cells of a header line; none if this delimiter cannot be its."""
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=mark, skipinitialspace=True, strict=True))]
    except csv.Error:
        return []


def _column(rest: Iterator[str], header_line: int, mark: str, place: int, width: int, file: str) -> Iterator[object]:
    # strict: else a quote that is never closed makes one cell of all that follows.
    rows = csv.reader(rest, delimiter=mark, skipinitialspace=True, strict=True)
    try:
        for row in rows:
            if not row:
                yield ""
            elif len(row) != width:
                yield Unusable("cells", mark.join(row))
            else:
                yield row[place]
    except csv.Error as error:
        raise UserError(
            f"{file}:{header_line + rows.line_num}: {error}; a cell with quotes in it is quoted itself, and its "
            "quotes doubled"
        ) from error


# ---- parquet


def _read_parquet(file: str, column: str | None, key: str) -> TextColumn:
    import pyarrow.parquet as parquet

    with whole_parquet(file), open(file, "rb") as opened:
        schema = parquet.ParquetFile(opened).schema_arrow
    if column == "mix":
        if missing := [name for name in MIX if name not in schema.names]:
            raise UserError(
                f"{key}: {file} has no column {' and no column '.join(missing)}, which `mix` reads; it has "
                f"{', '.join(schema.names)}"
            )
        return TextColumn("mix", (texts[_coin(row_key)] for row_key, *texts in _parquet_rows(file, MIX)))
    texts = [field.name for field in schema if _is_text(field.type)]
    if column is None and len(texts) == 1 and not any(map(_is_known, schema.names)):
        chosen = texts[0]
    else:
        # A column of another type with a known name is not passed over for one of texts, such as ids, without.
        among = texts if column is None and any(map(_is_known, texts)) else schema.names
        chosen = choose(among, column, file, key)
    return TextColumn(chosen, (value for (value,) in _parquet_rows(file, (chosen,))))


def _coin(key: object) -> int:
    """Return 0 or 1, always the same for a key; having none (null) is a key, too."""
    import xxhash

    return xxhash.xxh3_64_intdigest(key if isinstance(key, bytes) else str(key).encode()) >> 63


@contextmanager
def whole_parquet(name: str) -> Iterator[None]:
    """Turn Arrow's errors into one that names the file."""
    import pyarrow

    errors = (pyarrow.ArrowException, OSError)  # looked up now: a generator may be closed when the interpreter ends
    try:
        yield
    except errors as error:
        raise UserError(
            f"{name} cannot be read ({error}); if a download was cut short, effsam3 fetch recap --verify "
            "with the same --out fetches it again"
        ) from error


def _parquet_rows(file: str, names: tuple[str, ...]) -> Iterator[tuple]:
    """Yield the rows of some columns. Texts come as bytes, so that wrong UTF-8 is one bad row and not an exception."""
    import pyarrow.parquet as parquet

    with whole_parquet(file), open(file, "rb") as opened:
        # The buffer would keep all that was read, to the end of the file.
        for batch in parquet.ParquetFile(opened, pre_buffer=False).iter_batches(ROWS, columns=list(names)):
            yield from zip(*(_values(batch.column(name)) for name in names), strict=True)


def _is_text(kind) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _values(column) -> list:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return (column.cast(pyarrow.large_binary()) if _is_text(column.type) else column).to_pylist()


READERS = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
