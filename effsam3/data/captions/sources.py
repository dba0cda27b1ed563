# SPDX-License-Identifier: Apache-2.0
"""Captions and noun phrases as one map-style view: Recap-DataComp-1B parquet as published, and files of one's own.

The first opening reads every file once and writes what is usable as an Arrow file next to it (CACHE), with a report of
what is not. From then on texts are memory-mapped by Hugging Face `datasets`, and a position is all a sampler needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effsam3.checked_files import read_json
from effsam3.data.captions.cleaning import EXAMPLES, clean_rows, code_of, count, counted, first_train_code, key_of
from effsam3.data.captions.text_files import ROWS, caption_files, read_texts
from effsam3.data.splits import SPLITS
from effsam3.data.workers import run_jobs
from effsam3.errors import UserError
from effsam3.files import atomic_file, write_text

CACHE = ".captions"  # folder next to the files; may be deleted at any time
# What is kept with a copy: the column that was read, and how many entries were left out or changed, by reason.
REPORT_FORM = {"column": str, "left_out": {str: {"count": int, "examples": [str]}}}
VERSION = 2  # of what it holds and of how texts are cleaned; another number makes older ones void
SOURCES = {"captions": "data.column", "phrases": "data.phrase_column"}  # what is read: key of the column's name


class Texts(NamedTuple):
    """Rows of one source: captions or phrases."""

    dataset: Any  # datasets.Dataset with the column `text`, shared by both splits
    rows: np.ndarray  # int64 (N,), in the dataset
    codes: np.ndarray  # uint64 (N,), of the texts

    def select(self, chosen: np.ndarray) -> Texts:
        """Return some of the rows, by mask or number."""
        return Texts(self.dataset, self.rows[chosen], self.codes[chosen])


class Part:
    """Training or held-out texts by position: a map-style view whose answers never change.

    Position p is a phrase where floor((p + 1) * share) is above floor(p * share), which is exact for every stretch of
    positions to within one; its row is the count of phrases before it, and so for captions. With `repeat` the part is
    as long as it takes to have every row once, and the rows of the source that is short repeat evenly; without, it
    ends where a source is used up, and no row repeats.
    """

    def __init__(self, captions: Texts, phrases: Texts, share: Fraction, repeat: bool):
        self.sources, self.share = (captions, phrases), share
        phrase, of = share.numerator, share.denominator
        caption = of - phrase
        numbers = [len(texts.rows) for texts in self.sources]
        if repeat:  # the shortest with all captions, and with all phrases
            ends = [(numbers[0] - 1) * of // caption + 1] if caption and numbers[0] else []
            ends += [-(-numbers[1] * of // phrase)] if phrase else []
            self._length = max(ends, default=0)
        else:  # the longest without more captions than there are, and likewise phrases
            ends = [numbers[0] * of // caption] if caption else []
            ends += [((numbers[1] + 1) * of - 1) // phrase] if phrase else []
            self._length = min(ends)

    def __len__(self) -> int:
        return self._length

    def _locate(self, asked: Sequence[int] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each source (places in `asked`, numbers of its rows)."""
        positions = np.asarray(asked, np.int64)
        assert not len(positions) or (positions.min() >= 0 and positions.max() < self._length)
        before = positions * self.share.numerator // self.share.denominator
        after = (positions + 1) * self.share.numerator // self.share.denominator
        captions, phrases = np.flatnonzero(after == before), np.flatnonzero(after > before)
        return [
            (captions, (positions - before)[captions] % max(len(self.sources[0].rows), 1)),
            (phrases, before[phrases] % max(len(self.sources[1].rows), 1)),
        ]

    def texts(self, positions: Sequence[int]) -> list[str]:
        """Return the texts at these positions."""
        result = np.empty(len(positions), object)
        for texts, (places, numbers) in zip(self.sources, self._locate(positions), strict=True):
            if len(places):
                result[places] = texts.dataset[texts.rows[numbers].tolist()]["text"]
        return result.tolist()

    def keys(self, positions: Sequence[int]) -> list[str]:
        """Return the texts' keys, 16 hex digits each; equal texts have equal keys (see `cleaning.code_of`)."""
        return [key_of(code) for code in self.codes(positions).tolist()]

    def codes(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the keys as numbers, uint64."""
        result = np.empty(len(positions), np.uint64)
        for texts, (places, numbers) in zip(self.sources, self._locate(positions), strict=True):
            result[places] = texts.codes[numbers]
        return result

    def distinct(self) -> np.ndarray:
        """Return the first position of every distinct key, ascending, int64: what to make a store of."""
        return np.sort(np.unique(self.codes(np.arange(len(self))), return_index=True)[1])


@dataclass(frozen=True)
class Captions:
    """What `open_captions` returns. A text is in `train` or in `val` and never in both, however it is capitalised.

    `report` counts what was left out or changed, {reason: {"count", "examples"}}: the reasons of
    `cleaning.clean`, and `duplicate` for phrases.
    """

    train: Part
    val: Part
    report: dict[str, dict]
    columns: dict[str, str]  # {source: the column that was read}, of several files' several with commas

    def only(self, split: str, source: str) -> Part:
        """Return all captions or all phrases of a split, each once; empty when there is no such source."""
        assert split in SPLITS and source in SOURCES
        part = self.train if split == "train" else self.val
        return Part(*part.sources, Fraction(int(source == "phrases")), repeat=False)

    def summary(self) -> str:
        """Return one line for a run's header."""
        lines = []
        for source, columns in self.columns.items():
            train, val = (len(self.only(split, source)) for split in SPLITS)
            if train + val:
                lines.append(f"{train + val:,} {source}{columns and f' ({columns})'}, {val:,} held out")
        return "; ".join([*lines, f"phrase share {float(self.train.share):g}", counted(self.report)])


def open_captions(
    captions: str | None,
    column: str | None,
    phrases: Sequence[str],
    phrase_share: float,
    held_out: float = 0.01,
    limit: int | None = None,
    workers: int = 1,
    phrase_column: str | None = None,
) -> Captions:
    """Open captions and phrases for training.

    Args:
        captions: folder, file or pattern of files as in `text_files.READERS`; None: no captions.
        column: its name; `mix`: per row `re_caption` or `org_caption`; None: the one that is known to hold texts.
        phrases: lists of phrases, files of the same kinds; duplicates are dropped.
        phrase_share: how much of `train` and `val` is phrases, 0..1; 0 leaves them to `Captions.only`.
        held_out: share of the texts that is in `val` and never in `train`, by a hash of the text.
        limit: use only the first N usable captions, both splits together.
        workers: processes that make the clean copies of files that have none yet.
        phrase_column: as `column`, of the lists of phrases.

    Raises:
        UserError: a source that is not there or cannot be read, a share without its source, nothing usable.
    """
    share = _checked_share(captions, phrases, phrase_share)
    first_train = first_train_code(held_out)
    report: dict[str, dict] = {}
    copies = _Copies(workers, report)
    caption_copies = [] if captions is None else _caption_copies(copies, captions, column, limit)
    phrase_copies = copies.of([str(file) for file in phrases], "phrases", phrase_column)
    sources = _texts(caption_copies, limit), _without_duplicates(_texts(phrase_copies), report)
    # By the text's own hash: one that two lists share cannot be learned from and held out at once.
    trained = [texts.codes >= np.uint64(first_train) for texts in sources]
    learned, held = (
        [texts.select(mask == chosen) for texts, mask in zip(sources, trained, strict=True)]
        for chosen in (True, False)
    )
    train = Part(learned[0], learned[1], share, repeat=True)
    val = Part(held[0], held[1], share, repeat=False)
    for texts, part, source, where in (
        (train.sources[0], 1 - share, "captions", captions),
        (train.sources[1], share, "phrases", ", ".join(map(str, phrases))),
    ):
        if part and not len(texts.rows):
            raise UserError(f"no usable {source} for training in {where} (held_out {held_out}): {counted(report)}")
    return Captions(train, val, report, {source: ", ".join(sorted(names)) for source, names in copies.columns.items()})


def _checked_share(captions: str | None, phrases: Sequence[str], phrase_share: float) -> Fraction:
    if not 0 <= phrase_share <= 1:
        raise UserError(f"phrase_share {phrase_share} must be 0 to 1")
    if phrase_share > 0 and not phrases:
        raise UserError(
            f"phrase_share is {phrase_share} and there are no phrases; name lists in phrases, or set it to 0"
        )
    if phrase_share < 1 and captions is None:
        raise UserError(f"phrase_share is {phrase_share} and there are no captions; name some, or set it to 1")
    return Fraction(phrase_share).limit_denominator(1_000_000)  # times a position this stays within int64


# ---- clean copies: one Arrow file and one report per file


def _caption_copies(copies: _Copies, captions: str, column: str | None, limit: int | None) -> list[Path]:
    """Return the copies of the captions' files, of those only that a limit needs."""
    files = caption_files(captions)
    if limit is None:
        return copies.of(files, "captions", column)
    # File after file until there are enough: a trial run need not read a billion captions.
    found, usable = [], 0
    while files and usable < limit:
        file, *files = files
        found += copies.of([file], "captions", column)
        usable += _dataset(found[-1:]).num_rows
    return found


class _Copies:
    """Clean copies of files, made where they are missing.

    Attributes: `report`, to which is added what they left out; `columns`, {source: the columns that were read}.
    """

    def __init__(self, workers: int, report: dict[str, dict]):
        self.workers, self.report = workers, report
        self.columns: dict[str, set[str]] = {source: set() for source in SOURCES}

    def of(self, files: Sequence[str], source: str, column: str | None) -> list[Path]:
        """Return the copies of files, captions or phrases, in their order."""
        import xxhash

        copies, missing = [], []
        for file in files:
            path = Path(file)
            if not path.is_file():
                raise UserError(f"{source}: there is no file {file}")
            state = path.stat()
            # Size and time stand for the content: hashing it would take as long as reading it again.
            made_of = (VERSION, str(path.absolute()), state.st_size, state.st_mtime_ns, column)
            stamp = xxhash.xxh3_64_hexdigest(repr(made_of).encode("utf-8", "surrogateescape"))
            copies.append(path.parent / CACHE / f"{path.name}.{stamp}.arrow")
            if not copies[-1].with_suffix(".json").is_file():
                missing.append((file, source, column, copies[-1]))
        if missing:
            _make_copies(missing, self.workers)
        for copy in copies:
            made = read_json(copy.with_suffix(".json"), REPORT_FORM, "delete it, and it is made again")
            self.columns[source] |= {made["column"]} - {""}
            for reason, entry in made["left_out"].items():
                count(self.report, reason, entry["examples"], entry["count"])
        return copies


def _make_copies(jobs: list[tuple[str, str, str | None, Path]], workers: int) -> None:
    for folder in {copy.parent for *_, copy in jobs}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}, the place of clean copies, cannot be made ({error}); link the files into a folder that "
                "can be written"
            ) from error
    run_jobs(_make_copy, jobs, min(workers, len(jobs)), "files of texts")


def _make_copy(file: str, source: str, column: str | None, copy: Path) -> None:
    """Write a file's usable texts with their codes, then its report, which marks the copy as complete.

    Several processes may do this at the same time: they write the same under names of their own.
    """
    import pyarrow

    texts = read_texts(file, column, SOURCES[source])
    rows = clean_rows(texts.values, Path(file).name)
    report: dict[str, dict] = {}
    schema = pyarrow.schema({"text": pyarrow.string(), "code": pyarrow.uint64()})
    with atomic_file(copy) as partial, pyarrow.ipc.new_stream(str(partial), schema) as writer:
        while some := list(islice(rows, ROWS)):
            for _, reason, where in some:
                if reason:
                    count(report, reason, [where])
            usable = [text for text, _, _ in some if text]
            codes = [code_of(text) for text in usable]
            writer.write_batch(pyarrow.record_batch([usable, codes], schema=schema))
    write_text(copy.with_suffix(".json"), json.dumps({"column": texts.name, "left_out": report}, indent=1))


def _dataset(copies: list[Path]):
    """Return clean copies as one memory-mapped datasets.Dataset."""
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(str(copy)) for copy in copies])


def _texts(copies: list[Path], limit: int | None = None) -> Texts:
    if not copies:
        return Texts(None, np.empty(0, np.int64), np.empty(0, np.uint64))
    dataset = _dataset(copies)
    codes = dataset.data.column("code").to_numpy()[:limit]
    return Texts(dataset.select_columns(["text"]), np.arange(len(codes)), codes)


def _without_duplicates(texts: Texts, report: dict) -> Texts:
    """Keep the first of equal texts, over all lists."""
    first = np.sort(np.unique(texts.codes, return_index=True)[1])
    if repeated := len(texts.codes) - len(first):
        again = np.setdiff1d(np.arange(len(texts.codes)), first)[:EXAMPLES]
        count(report, "duplicate", [ascii(text) for text in texts.dataset[again.tolist()]["text"]], repeated)
    return texts.select(first)
