# SPDX-License-Identifier: Apache-2.0
"""Synthetic captions: the published columns, varied, and files that depend on (seed, number) alone."""

import hashlib

import pyarrow.parquet as parquet
import pytest

from effsam3.data.synthetic.captions import THINGS, make_row, make_synthetic_phrases, make_synthetic_recap
from effsam3.errors import UserError

PUBLISHED = {  # the dataset card's
    "url": "string", "re_caption": "string", "org_caption": "string", "sha256": "string", "key": "string",
    "re_clip_score": "double", "org_clip_score": "double", "re_length": "int64", "org_length": "int64",
    "re_gpt4v_score": "int64", "org_gpt4v_score": "int64",
}  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_have_the_published_columns_and_the_rows_asked_for(tmp_path):
    make_synthetic_recap(tmp_path, 2500)
    files = sorted(tmp_path.glob("*.parquet"))
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    rows = []
    for file in files:
        table = parquet.read_table(file)
        assert {field.name: str(field.type) for field in table.schema} == PUBLISHED
        rows += table.to_pylist()
    assert len(rows) == 2500 == len({row["key"] for row in rows}) == len({row["sha256"] for row in rows})
    for row in rows[::97]:
        assert row["sha256"] == hashlib.sha256(row["url"].encode()).hexdigest()
        assert row["re_length"] == len(row["re_caption"].split())
        assert row["org_length"] == len(row["org_caption"].split())


def test_captions_are_varied_long_and_short():
    rows = [make_row(number, seed=0) for number in range(600)]
    long, short = ([len(row[name].split()) for row in rows] for name in ("re_caption", "org_caption"))
    assert 40 < sum(long) / 600 < 60 and 4 < sum(short) / 600 < 10  # Recap-DataComp-1B: 49 and 10 words
    assert max(long) - min(long) > 30
    assert len({row["re_caption"] for row in rows}) == 600
    assert len({row["org_caption"] for row in rows}) > 550
    assert {thing for row in rows for thing in THINGS if thing in row["re_caption"]} == set(THINGS)
    assert 0 < sum(not row["org_caption"] for row in rows) < 30, "some images of the web have no text"


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    make_synthetic_recap(tmp_path / "a", 50, seed=3)
    make_synthetic_recap(tmp_path / "a", 50, seed=3)
    make_synthetic_recap(tmp_path / "b", 50, seed=3)
    make_synthetic_recap(tmp_path / "c", 50, seed=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert make_row(7, 3)["re_caption"] != make_row(7, 4)["re_caption"] != make_row(8, 4)["re_caption"]
    assert (
        contents(tmp_path / "a")["train-00000-of-00001.parquet"]
        != contents(tmp_path / "c")["train-00000-of-00001.parquet"]
    )


def test_phrases_are_short_and_different(tmp_path):
    make_synthetic_phrases(tmp_path / "lists" / "p.txt", 1500)
    first = (tmp_path / "lists" / "p.txt").read_bytes()
    phrases = first.decode().splitlines()
    assert len(phrases) == len(set(phrases)) == 1500
    lengths = [len(phrase.split()) for phrase in phrases]
    assert min(lengths) == 1 and max(lengths) <= 9 and 2 < sum(lengths) / 1500 < 5
    make_synthetic_phrases(tmp_path / "lists" / "p.txt", 1500)
    assert (tmp_path / "lists" / "p.txt").read_bytes() == first
    with pytest.raises(UserError, match="the grammar is good for"):
        make_synthetic_phrases(tmp_path / "q.txt", 10**6)
