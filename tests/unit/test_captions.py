# SPDX-License-Identifier: Apache-2.0
"""Captions: what is read, cleaned and counted; the mix and the split are exact on any hardware."""

import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import xxhash

from effsam3.data.captions import sources as module
from effsam3.data.captions.cleaning import clean, code_of
from effsam3.data.captions.sources import open_captions
from effsam3.data.sampler import StepSampler
from effsam3.data.synthetic.captions import make_synthetic_phrases, make_synthetic_recap
from effsam3.errors import UserError

RIGHT_TO_LEFT = "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd"
EMOJI = "a dog \U0001f436\U0001f3fd\u200d\U0001f680"


@pytest.fixture(scope="module")
def recap(tmp_path_factory):
    """A folder of 3 files of captions and a list of phrases."""
    folder = tmp_path_factory.mktemp("recap")
    make_synthetic_recap(folder / "captions", 4100)
    make_synthetic_phrases(folder / "phrases.txt", 150)
    return folder


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return str(path)


def broken_strings(values):
    """A string column with bytes that no string may have."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def everything(part):
    return part.texts(range(len(part)))


def raw(folder, column):
    """All rows of a column, by another reader."""
    return [
        value for file in sorted(folder.glob("*.parquet")) for value in parquet.read_table(file)[column].to_pylist()
    ]


# ---- cleaning


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ("a cat", "")),
        (b"a cat", ("a cat", "")),
        (EMOJI, (EMOJI, "")),
        (RIGHT_TO_LEFT.encode(), (RIGHT_TO_LEFT, "")),
        ("x" * 2000, ("x" * 2000, "")),
        ("x" * 2001, ("x" * 2000, "cut")),
        (" " * 3000 + "x", ("", "whitespace")),
        ("", ("", "empty")),
        (b"", ("", "empty")),
        (" \t\n\u00a0\u3000", ("", "whitespace")),
        (None, ("", "null")),
        (float("nan"), ("", "not_text")),
        (3, ("", "not_text")),
        (["a"], ("", "not_text")),
        (b"caf\xe9", ("", "not_utf8")),
        ("half a pair \ud83d", ("", "not_utf8")),
    ],
)
def test_clean(value, expected):
    assert clean(value) == expected


def test_bad_rows_are_left_out_and_counted_never_replaced(tmp_path):
    values = [b"one", b"", b" \n", None, b"\xff\xfe", b"y" * 2500, EMOJI.encode(), RIGHT_TO_LEFT.encode(), b"one"]
    write(tmp_path / "d" / "a.parquet", re_caption=broken_strings(values))
    write(tmp_path / "d" / "b.parquet", re_caption=pa.array([1.5, None, 2.0]))
    write(tmp_path / "d" / "c.parquet", re_caption=pa.array([None, None], pa.null()))
    write(tmp_path / "d" / "e.parquet", re_caption=pa.array(["two", "two", ""]).dictionary_encode())
    write(tmp_path / "d" / "f.parquet", re_caption=pa.array(["three"], pa.large_string()))
    captions = open_captions(str(tmp_path / "d"), "re_caption", (), 0.0, held_out=0.0)
    assert everything(captions.train) == ["one", "y" * 2000, EMOJI, RIGHT_TO_LEFT, "one", "two", "two", "three"]
    assert len(captions.val) == 0
    counts = {reason: entry["count"] for reason, entry in captions.report.items()}
    assert counts == {"empty": 2, "whitespace": 1, "null": 4, "not_utf8": 1, "cut": 1, "not_text": 2}
    assert captions.report["not_utf8"]["examples"] == ["a.parquet:5 b'\\xff\\xfe'"]
    assert len(captions.report["null"]["examples"]) == 4
    assert captions.summary().startswith("8 captions (re_caption), 0 held out; phrase share 0; 1 cut, 2 empty, 2 not_")


@pytest.mark.parametrize("name", ["l.txt", "l.json", "m.json", "n.json", "l.csv", "m.csv", "l.parquet", "m.parquet"])
def test_every_kind_of_phrase_list(tmp_path, name):
    phrases = ["dog", "red, round ball", EMOJI, 'a "quoted" cup', RIGHT_TO_LEFT]
    path = tmp_path / name
    quoted = [f'"{phrase}"'.replace('a "quoted" cup', 'a ""quoted"" cup') for phrase in phrases]
    if name == "l.txt":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(phrases).encode())
    elif name.endswith("json"):
        content = {"l": phrases, "m": {"text_annotations": phrases}, "n": {"phrases": phrases}}[name[0]]
        path.write_text(json.dumps(content))
    elif name == "l.csv":
        path.write_text("id,caption\n" + "".join(f"{i},{text}\n" for i, text in enumerate(quoted)), "utf-8")
    elif name == "m.csv":
        path.write_text("Phrase,id\n" + "".join(f"{text},{i}\n" for i, text in enumerate(quoted)), "utf-8-sig")
    elif name == "l.parquet":
        write(path, anything=phrases, number=range(5))
    else:
        write(path, note=phrases[::-1], phrase=phrases)
    captions = open_captions(None, "re_caption", (path,), 1.0, held_out=0.0)
    assert everything(captions.train) == phrases and captions.report == {}


def test_bad_phrases_are_counted_and_duplicates_dropped_over_all_lists(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Dog\n\n \nred  ball\ndog\n")
    (tmp_path / "b.json").write_text('["DOG", 7, null, "cat", "half \\ud83d", ["x"]]')
    (tmp_path / "c.csv").write_bytes(b"phrase,x\nRed Ball,1\n,2\nbird\nbird,3\na cat, sleeping,4\n")
    files = [tmp_path / name for name in ("a.txt", "b.json", "c.csv")]
    captions = open_captions(None, "re_caption", files, 1.0, held_out=0.0)
    assert everything(captions.train) == ["Dog", "red  ball", "cat", "bird"]
    counts = {reason: entry["count"] for reason, entry in captions.report.items()}
    wanted = {"empty": 2, "whitespace": 1, "not_utf8": 1, "not_text": 2, "null": 1, "cells": 2, "duplicate": 3}
    assert counts == wanted
    assert captions.report["cells"]["examples"] == ["c.csv:3 'bird'", "c.csv:5 'a cat,sleeping,4'"]
    assert captions.report["duplicate"]["examples"] == ["'dog'", "'DOG'", "'Red Ball'"]


# ---- columns, split, keys


def test_columns_and_mix(recap):
    folder = recap / "captions"
    re_caption, org_caption, keys = (raw(folder, name) for name in ("re_caption", "org_caption", "key"))
    opened = {
        column: open_captions(str(folder), column, (), 0.0, held_out=0.0) for column in ("re_caption", "org_caption")
    }
    assert everything(opened["re_caption"].train) == re_caption
    assert everything(opened["org_caption"].train) == [text for text in org_caption if text]
    mixed = open_captions(str(folder / "*.parquet"), "mix", (), 0.0, held_out=0.0)
    chosen = [
        (long, short)[xxhash.xxh3_64_intdigest(key.encode()) >> 63]
        for long, short, key in zip(re_caption, org_caption, keys, strict=True)
    ]
    assert everything(mixed.train) == [text for text in chosen if text]
    assert 0.45 < np.mean([text in set(re_caption) for text in chosen]) < 0.55
    assert mixed.report["empty"]["count"] == chosen.count("") > 0


def test_a_text_is_held_out_everywhere_or_nowhere(recap, tmp_path):
    texts = raw(recap / "captions", "re_caption")
    (tmp_path / "loud.txt").write_text("".join(f"  {text.upper()}\n" for text in texts))
    captions = open_captions(str(recap / "captions"), "re_caption", (tmp_path / "loud.txt",), 0.5, held_out=0.2)
    train, val = ({text.lower().strip() for text in everything(part)} for part in (captions.train, captions.val))
    assert train.isdisjoint(val) and 0.17 < len(val) / len(texts) < 0.23
    long_val = everything(captions.only("val", "captions"))
    assert sorted(everything(captions.only("train", "captions")) + long_val) == sorted(texts)
    assert [text.upper() for text in long_val] == [
        text.strip() for text in everything(captions.only("val", "phrases"))
    ]
    more = open_captions(str(recap / "captions"), "re_caption", (), 0.0, held_out=0.3)
    assert set(long_val) < set(everything(more.val)), "a larger share adds to what is held out"


def test_keys_belong_to_texts(recap):
    captions = open_captions(str(recap / "captions"), "org_caption", (recap / "phrases.txt",), 0.3)
    for part in (captions.train, captions.val):
        positions = np.random.default_rng(0).permutation(len(part))[:50].tolist()
        texts = part.texts(positions)
        assert part.keys(positions) == [f"{code_of(text):016x}" for text in texts]
        assert texts == [everything(part)[position] for position in positions]
    part = captions.train
    distinct = part.distinct()
    keys = part.keys(range(len(part)))
    assert sorted(part.keys(distinct)) == sorted(set(keys)) and len(set(keys)) < len(keys)
    assert all(keys.index(keys[position]) == position for position in distinct.tolist())
    assert code_of("A  Dog\n") == code_of("a dog") != code_of("adog")
    assert len(pickle.dumps(part)) < 10**6 and pickle.loads(pickle.dumps(part)).texts([5, 3]) == part.texts([5, 3])


# ---- mixing


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_the_share_is_exact_and_rows_repeat_evenly(recap, share):
    captions = open_captions(str(recap / "captions"), "re_caption", (recap / "phrases.txt",), share, held_out=0.2)
    phrases = set((recap / "phrases.txt").read_text().splitlines())
    for part, repeats in ((captions.train, True), (captions.val, False)):
        texts = everything(part)
        is_phrase = np.array([text in phrases for text in texts])
        for stretch in (texts[:100], texts[37:500], texts):
            found = sum(text in phrases for text in stretch)
            assert abs(found - share * len(stretch)) <= 1
        rows = [len(captions.only("train" if repeats else "val", source)) for source in ("captions", "phrases")]
        for kind, number, used in ((False, rows[0], share < 1), (True, rows[1], share > 0)):
            times = np.unique(
                [text for text, of in zip(texts, is_phrase, strict=True) if of == kind], return_counts=True
            )
            if repeats and used:
                assert len(times[1]) == number and times[1].max() - times[1].min() <= 1
            if not repeats:
                assert times[1].max(initial=1) == 1 and len(times[1]) <= number
        if repeats and 0 < share < 1:
            # One less and a row would be missing; the other source is what repeats.
            ends = {"captions": rows[0] / (1 - share), "phrases": rows[1] / share}
            assert abs(len(part) - max(ends.values())) <= max(1 / share, 1 / (1 - share)) + 1


def test_sources_and_shares_that_do_not_fit(recap, tmp_path):
    folder, phrases = str(recap / "captions"), (recap / "phrases.txt",)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "x.json").write_text('{"words": ["a"]}')
    (tmp_path / "y.json").write_text("{")
    (tmp_path / "z.csv").write_text("")
    (tmp_path / "short.parquet").write_bytes((recap / "captions" / "train-00000-of-00003.parquet").read_bytes()[:5000])
    write(tmp_path / "ab.parquet", a=["x"], b=["y"])
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds/a.csv").write_text("caption\nx\n")
    (tmp_path / "kinds/b.jsonl").write_text('"x"\n')
    for arguments, message in (
        ((folder, "recaption", (), 0), "data.column: .* has no column 'recaption'; did you mean re_caption"),
        ((folder, "mix", (), 0.1), "there are no phrases"),
        ((None, "mix", phrases, 0.5), "there are no captions"),
        ((folder, "mix", phrases, 1.5), "must be 0 to 1"),
        ((folder, "mix", phrases, 0.1, 1.0), "held_out 1.0"),
        (("no/such/folder", "mix", (), 0), "captions: no/such/folder is not there"),
        ((str(tmp_path), "re_caption", (), 0), "cannot be read|no column"),
        ((str(tmp_path / "kinds"), None, (), 0), "files of several kinds .1 .csv, 1 .jsonl.; name one of them"),
        ((str(tmp_path / "*.arrow"), "re_caption", (), 0), "has no .txt, .json.*effsam3 fetch recap"),
        ((str(tmp_path / "ab.parquet"), "mix", (), 0), "no column key and no column re_caption"),
        ((str(tmp_path / "short.parquet"), "mix", (), 0), "cut short"),
        ((None, "mix", (tmp_path / "empty.txt",), 1), "no usable phrases .*: 1 empty, 1 whitespace"),
        ((None, "mix", (tmp_path / "x.json",), 1), "text_annotations or phrases"),
        ((None, "mix", (tmp_path / "y.json",), 1), "is not JSON"),
        ((None, "mix", (tmp_path / "z.csv",), 1), "header line"),
        ((None, "mix", (tmp_path / "ab.parquet",), 1), "it has 'a', 'b'. Name one with data.phrase_column"),
        ((None, "mix", (tmp_path / "gone.txt",), 1), "there is no file"),
        ((None, "mix", (tmp_path / "a.xlsx",), 1), "there is no file|must end in"),
    ):
        with pytest.raises(UserError, match=message):
            open_captions(*arguments)
    assert not list(tmp_path.glob("**/.captions/.*")), "nothing half-done stays"
    (tmp_path / "kinds" / ".captions").touch()
    with pytest.raises(UserError, match="the place of clean copies, cannot be made"):
        open_captions(str(tmp_path / "kinds/a.csv"), None, (), 0)


# ---- clean copies


def test_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    file = tmp_path / "d" / "a.parquet"
    write(file, re_caption=["one", None], org_caption=["uno", "dos"])
    made = []
    make_copy = module._make_copy
    monkeypatch.setattr(module, "_make_copy", lambda *job: made.append((job[0], job[2])) or make_copy(*job))

    def opened(column="re_caption"):
        captions = open_captions(str(tmp_path / "d"), column, (), 0.0, held_out=0.0)
        return everything(captions.train), captions.report

    first = opened()
    assert opened() == first == (["one"], {"null": {"count": 1, "examples": ["a.parquet:2 None"]}})
    assert opened("org_caption")[0] == ["uno", "dos"]
    assert made == [(str(file), column) for column in ("re_caption", "org_caption")]
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"a.parquet", ".captions"}
    size = file.stat().st_size
    write(file, re_caption=["two", None], org_caption=["uno", "dos"])
    os.utime(file, ns=(1, 1))
    assert file.stat().st_size == size and opened()[0] == ["two"] and len(made) == 3
    # A copy without its report is one that was interrupted.
    for report in (tmp_path / "d" / ".captions").glob("*.json"):
        report.unlink()
    assert opened()[0] == ["two"] and len(made) == 4


def test_processes_give_the_same(recap, tmp_path):
    shutil.copytree(recap / "captions", tmp_path / "copy", ignore=shutil.ignore_patterns(".captions"))
    alone = open_captions(str(recap / "captions"), "mix", (), 0.0)
    together = open_captions(str(tmp_path / "copy"), "mix", (), 0.0, workers=2)
    assert everything(alone.train) == everything(together.train) and alone.report == together.report


def test_limit_reads_no_more_files_than_it_needs(recap, tmp_path):
    shutil.copytree(recap / "captions", tmp_path / "copy", ignore=shutil.ignore_patterns(".captions"))
    captions = open_captions(str(tmp_path / "copy"), "re_caption", (), 0.0, 0.1, limit=2050)
    first = sorted(raw(recap / "captions", "re_caption")[:2050])
    assert sorted(everything(captions.train) + everything(captions.val)) == first
    assert len(list(tmp_path.glob("copy/.captions/*.arrow"))) == 2


# ---- with the sampler


def test_any_hardware_trains_on_the_same_texts_and_resumes_anywhere(recap):
    part = open_captions(str(recap / "captions"), "mix", (recap / "phrases.txt",), 0.25).train

    def steps(world, micro, start, stop):
        ranks = [StepSampler(len(part), 3, 16, micro, rank, world).micro_batches(start, stop) for rank in range(world)]
        batches = [[part.texts(batch) for batch in rank] for rank in ranks]
        accumulated = 16 // (micro * world)
        return [
            sorted(
                text for rank in batches for batch in rank[k * accumulated : (k + 1) * accumulated] for text in batch
            )
            for k in range(stop - start)
        ]

    whole = steps(1, 16, 0, 12)
    assert steps(2, 4, 0, 12) == steps(4, 4, 0, 12) == whole
    assert steps(2, 8, 7, 12) == whole[7:]
