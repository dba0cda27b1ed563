# SPDX-License-Identifier: Apache-2.0
"""Texts out of files that people and their programs write: encodings, dialects, columns, types of parquet."""

import csv
import io
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from effsam3.data.captions import text_files
from effsam3.data.captions.sources import open_captions
from effsam3.data.captions.text_files import READERS, Unusable, read_texts
from effsam3.errors import UserError

TEXTS = [
    "a red cat 0",
    "two dogs, on grass",
    'a 6" pipe',
    "caf\u00e9 \U0001f436",
    "\u05e9\u05dc\u05d5\u05dd",
    "the person\u2019s hat",
]


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def values(file, column=None):
    return [value.decode() if isinstance(value, bytes) else value for value in read_texts(file, column).values]


def table(header, rows, delimiter=",", line="\n", **options):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=line, **options)
    writer.writerows([header, *rows])
    return out.getvalue()


# ---- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark", "utf-32"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_every_encoding_with_a_mark_and_every_line_end(tmp_path, encoding, suffix, line):
    text = {
        ".txt": line.join(TEXTS) + line,
        ".jsonl": "".join(json.dumps(text, ensure_ascii=False) + line for text in TEXTS),
        ".json": json.dumps(TEXTS, ensure_ascii=False, indent=1).replace("\n", line),
        ".csv": table(["id", "Phrase"], enumerate(TEXTS), ",", line),
        ".tsv": table(["id", "Phrase"], enumerate(TEXTS), "\t", line),
    }[suffix]
    if encoding.startswith("utf-16-be"):
        text, encoding = "\ufeff" + text, "utf-16-be"
    assert values(written(tmp_path / f"x{suffix}", text, encoding)) == TEXTS


@pytest.mark.parametrize(("suffix", "number"), [(".txt", 3), (".jsonl", 3), (".json", 3), (".csv", 4), (".tsv", 4)])
def test_what_is_no_utf_8_is_an_error_with_its_line(tmp_path, suffix, number):
    text = {
        ".txt": "one\ntwo\ncaf\u00e9\n",
        ".jsonl": '"one"\n"two"\n"caf\u00e9"\n',
        ".json": '["one",\n"two",\n"caf\u00e9"]',
        ".csv": "text\none\ntwo\ncaf\u00e9\n",
        ".tsv": "text\none\ntwo\ncaf\u00e9\n",
    }[suffix]
    file = written(tmp_path / f"x{suffix}", text, "latin-1")
    with pytest.raises(UserError, match=rf"x{suffix}:{number}: the bytes e9 are not UTF-8; save the file as UTF-8"):
        values(file)
    (tmp_path / f"y{suffix}").write_bytes(text.encode("utf-16")[:-1])
    with pytest.raises(UserError, match=rf"y{suffix}: it is not UTF-16 after line \d .*; save the file as UTF-8"):
        values(str(tmp_path / f"y{suffix}"))
    with pytest.raises(UserError, match=rf"z{suffix}:1: NUL characters; if the file is UTF-16"):
        values(written(tmp_path / f"z{suffix}", text, "utf-16-le"))


def test_a_bad_byte_far_behind_the_first_block_is_found_in_its_line(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"a line of text\n" * 5000 + b"\xff\n" + b"a line of text\n" * 5000)
    with pytest.raises(UserError, match=r"x.txt:5001: the bytes ff are"):
        values(str(file))


# ---- tables


@pytest.mark.parametrize("header", ["phrase", "Phrase", "PHRASE", " phrase", "phrase ", " Text ", "caption"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", ", "])
def test_headers_in_capitals_with_blanks_and_every_delimiter(tmp_path, header, delimiter):
    text = table(["id", header, "n"], [(i, text, i) for i, text in enumerate(TEXTS)], delimiter[0])
    if delimiter == ", ":
        text = f"id, {header}, n\n" + "".join(f"{i}, a cat {i}, {i}\n" for i in range(3))
    wanted = TEXTS if delimiter != ", " else ["a cat 0", "a cat 1", "a cat 2"]
    assert values(written(tmp_path / "x.csv", text)) == wanted
    assert values(written(tmp_path / "x.csv", text), header.strip()) == wanted
    assert values(written(tmp_path / "x.csv", text), "ID") == [str(i) for i in range(len(wanted))]


def test_cells_over_several_lines_and_everything_quoted(tmp_path):
    texts = ["one\ntwo", "three, four", ""]
    text = table(["caption", "x"], [(text, 1) for text in texts], quoting=csv.QUOTE_ALL)
    assert values(written(tmp_path / "x.csv", text)) == texts
    assert values(written(tmp_path / "y.csv", table(["caption"], [[text] for text in texts[:2]]))) == texts[:2]


def test_rows_of_another_width_and_empty_ones_are_told_apart(tmp_path):
    file = written(tmp_path / "x.csv", "id,phrase\n0,a cat\n\n1,a cat, sleeping\n2\n3,\n")
    assert values(file) == ["a cat", "", Unusable("cells", "1,a cat,sleeping"), Unusable("cells", "2"), ""]
    captions = open_captions(None, None, (file,), 1.0, held_out=0.0)
    assert {reason: entry["count"] for reason, entry in captions.report.items()} == {"empty": 2, "cells": 2}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        (
            "x.csv",
            "id,name\n1,a cat\n",
            r"no column that is known to hold texts .caption, .* it has 'id', 'name'. Name",
        ),
        ("x.csv", "a red cat\na dog\n", "it has 'a red cat'. .* a list without a header line is a .txt"),
        ("x.csv", "Text,caption\n1,a cat\n", "several columns of texts, 'Text', 'caption'; choose one with data.colu"),
        ("x.csv", "", "its first line must be a header line, it is ''"),
        ("x.csv", 'id,text\n1,"a cat\n2,a dog\n', r"x.csv:\d: unexpected end of data; a cell with quotes"),
        ("x.csv", 'id,text\n1,a cat\n2,"a" dog\n', "x.csv:3: .*expected after"),
        ("x.jsonl", '{"caption": "a cat"}\n{"caption": \n', "x.jsonl:2 is not JSON"),
        ("x.jsonl", '{"id": 1, "url": "u"}\n', "it has 'id', 'url'"),
        ("x.json", "{", "x.json is not JSON"),
        ("x.json", '{"words": ["a"]}', "text_annotations or phrases"),
        ("x.xlsx", "", "x.xlsx must end in .txt, .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_what_is_not_clear_is_refused_with_what_there_is(tmp_path, name, text, complaint):
    with pytest.raises(UserError, match=complaint):
        values(written(tmp_path / name, text))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    for name, text in (("x.csv", "id,caption\n1,a\n"), ("x.jsonl", '{"id": 1, "caption": "a"}')):
        with pytest.raises(
            UserError, match="k: .* no column 'captoin'; did you mean caption.*; it has 'id', 'caption'"
        ):
            read_texts(written(tmp_path / name, text), "captoin", "k")
    parquet.write_table(pa.table({"id": [1], "caption": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="it has 'id', 'caption'"):
        read_texts(str(tmp_path / "x.parquet"), "captoin")


# ---- JSON


def test_json_of_strings_of_objects_and_of_annotations(tmp_path):
    objects = [{"id": i, "Caption": text} for i, text in enumerate(TEXTS)]
    for content in (TEXTS, objects, {"annotations": objects, "images": []}, {"phrases": TEXTS}):
        assert values(written(tmp_path / "x.json", json.dumps(content))) == TEXTS
    rows = [json.dumps(row) for row in (*objects, "a text", {"id": 3}, None, 7)]
    found = values(written(tmp_path / "x.jsonl", "\n".join([*rows, ""])))
    assert found == [*TEXTS, "a text", None, None, 7]
    assert values(written(tmp_path / "y.jsonl", '"a"\n\n"b"\n')) == ["a", "", "b"]
    assert read_texts(str(tmp_path / "x.jsonl")).name == "Caption"


def test_blank_and_null_lines_before_the_first_text(tmp_path):
    rows = "".join(json.dumps({"id": number, "caption": text}) + "\n" for number, text in enumerate(TEXTS))
    assert values(written(tmp_path / "x.jsonl", "\nnull\n" + rows)) == ["", None, *TEXTS]
    text = "\n \n" + table(["id", "caption"], enumerate(TEXTS))
    assert values(written(tmp_path / "x.csv", text)) == TEXTS
    with pytest.raises(UserError, match=r"y\.csv:4: "):
        values(written(tmp_path / "y.csv", '\nid,caption\n1,"a"\n2,"b" c\n'))


def test_nothing_but_faults_says_what_they_are(tmp_path):
    file = written(tmp_path / "x.csv", "caption\n" + "".join(f"{number} dogs, running\n" for number in range(9)))
    with pytest.raises(UserError, match=r"9 cells \(rows with more or fewer cells than their header; quote"):
        open_captions(file, None, (), 0.0)


# ---- parquet

TYPES = {
    "string": lambda texts: pa.array(texts),
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
    "string_view": lambda texts: pa.array(texts, pa.string_view()),
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "dictionary of large strings": lambda texts: pa.array(texts, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_text_in_parquet(tmp_path, kind):
    file = str(tmp_path / "x.parquet")
    column = TYPES[kind]([*TEXTS, None, "", TEXTS[0]])
    for table in ({"anything": column, "id": range(9)}, {"id": column, "PHRASE": column}):
        parquet.write_table(pa.table(table), file)
        assert values(file) == [*TEXTS, None, "", TEXTS[0]]
    captions = open_captions(None, None, (file,), 1.0, held_out=0.0)
    assert captions.train.texts(range(len(captions.train))) == TEXTS
    counts = {reason: entry["count"] for reason, entry in captions.report.items()}
    assert counts == {"null": 1, "empty": 1, "duplicate": 1} and captions.columns["phrases"] == "PHRASE"


def test_ids_are_not_read_in_place_of_captions_of_another_type(tmp_path):
    """Lists of captions, and texts that are stored as bytes, beside the only column of strings."""
    file, ids = str(tmp_path / "x.parquet"), [str(number) for number in range(6)]
    parquet.write_table(pa.table({"id": ids, "captions": [[text] for text in TEXTS]}), file)
    with pytest.raises(UserError, match=r"6 not_text \(lists.*data\.column"):
        open_captions(file, None, (), 0.0)
    parquet.write_table(pa.table({"id": ids, "Phrase": pa.array(TEXTS).cast(pa.binary())}), file)
    assert values(file) == TEXTS and read_texts(file).name == "Phrase"


def test_recaps_own_column_comes_first_and_mix_is_not_a_name(tmp_path):
    file = str(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"re_caption": ["a"], "org_caption": ["b"], "url": ["u"], "key": ["k"]}), file)
    assert values(file) == ["a"] and values(file, "org_caption") == ["b"] and values(file, "url") == ["u"]
    assert read_texts(file).name == "re_caption" and values(file, "mix")[0] in "ab"


def test_every_kind_is_captions_too(tmp_path):
    """A file, and a folder of files of one kind: own captions without keys or ids."""
    folder = tmp_path / "own"
    folder.mkdir()
    for suffix in READERS:
        file = folder / f"x{suffix}"
        content = {
            ".txt": "\n".join(TEXTS),
            ".json": json.dumps(TEXTS),
            ".jsonl": "\n".join(json.dumps({"name": "x", "note": text}) for text in TEXTS),
            ".csv": table(["name", "note"], [("x", text) for text in TEXTS]),
            ".tsv": table(["name", "note"], [("x", text) for text in TEXTS], "\t"),
        }
        if suffix == ".parquet":
            parquet.write_table(pa.table({"name": ["x"] * 6, "note": TEXTS}), file)
        else:
            file.write_text(content[suffix], encoding="utf-8")
        for source in (file, folder, f"{folder}/*{suffix}"):
            captions = open_captions(str(source), "note", (), 0.0, held_out=0.0)
            assert captions.train.texts(range(len(captions.train))) == TEXTS
        column = "" if suffix in (".txt", ".json") else " (note)"
        assert captions.summary().startswith(f"6 captions{column}, 0 held out")
        file.unlink()


def test_a_parquet_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """Whatever the number of its rows; pyarrow would keep all it has read."""
    monkeypatch.setattr(text_files, "ROWS", 500)
    path = tmp_path / "many.parquet"
    table = pa.table({"text": [os.urandom(100).hex() for _ in range(20_000)]})
    parquet.write_table(table, path, row_group_size=500, compression="none")
    del table
    tracemalloc.start()  # what is read by a file object of Python's is Python's
    start = pa.total_allocated_bytes()
    taken = [pa.total_allocated_bytes() - start for _ in read_texts(str(path)).values]
    by_python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(taken) == 20_000 and max(taken) + by_python < path.stat().st_size / 2
