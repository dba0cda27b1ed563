# SPDX-License-Identifier: Apache-2.0
"""Texts cleaned and counted, and the streaming mode: files from disk or parquet from the Hub, without an index.

Two texts that differ only in case and white space are the same one, since SAM 3's tokenizer sees no difference: they
have one code, and with it one key and one split, whatever list or column they come from.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from effsam3.data.captions.fetch import REPO, hub_files
from effsam3.data.captions.text_files import READERS, Unusable, read_texts
from effsam3.data.images.sa1b import SPLITS
from effsam3.errors import UserError

MAX_CHARACTERS = 2000  # the rest of a text is cut off; SAM 3's tokenizer keeps 77 tokens at most, about 400 characters
EXAMPLES = 5  # named in a report for every reason
# What to do about reasons that are a fault of the whole file.
REMEDIES = {
    "cells": "rows with more or fewer cells than their header; quote a text that has the delimiter in it",
    "not_text": "lists, numbers or the like; data.column and data.phrase_column name another column",
}
BLOCK = 64  # rows that a stream's shuffle moves together at first


# ---- one text


def clean(value: object) -> tuple[str, str]:
    """Return (text, reason) for whatever a file holds: no text for a reason, or a text, `cut` being its only reason.

    Reasons: null, not_text, not_utf8, empty, whitespace, cells (a row of a table with more or fewer than its header),
    cut (the text is its first MAX_CHARACTERS characters).
    """
    if isinstance(value, Unusable):
        return "", value.reason
    if value is None:
        return "", "null"
    if not isinstance(value, str | bytes):
        return "", "not_text"
    try:
        text = value.decode() if isinstance(value, bytes) else value.encode().decode()  # half surrogate pairs fail
    except UnicodeError:
        return "", "not_utf8"
    if not text:
        return "", "empty"
    if text.isspace():
        return "", "whitespace"
    if len(text) <= MAX_CHARACTERS:
        return text, ""
    return (text[:MAX_CHARACTERS], "cut") if text[:MAX_CHARACTERS].strip() else ("", "whitespace")


def code_of(text: str) -> int:
    """Return the 64-bit hash of a text that stands for it; case and white space do not count."""
    import xxhash

    return xxhash.xxh3_64_intdigest(" ".join(text.lower().split()).encode())


def key_of(code: int) -> str:
    """Return the key of a code, 16 hex digits: what a store of teacher outputs calls the text."""
    return f"{code:016x}"


def first_train_code(held_out: float) -> int:
    """Return the code from which on texts are for training; those below are held out."""
    if not 0 <= held_out < 1:
        raise UserError(f"held_out {held_out} must be at least 0 and below 1")
    return int(held_out * 2**64)


def count(report: dict, reason: str, examples: list[str], number: int = 1) -> None:
    """Add to a report {reason: {"count", "examples"}}."""
    entry = report.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += number
    entry["examples"] = (entry["examples"] + examples)[:EXAMPLES]


def clean_rows(values: Iterable[object], name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (text, reason, where) for every value; `where` names file and row, and is empty without a reason."""
    for row, value in enumerate(values):
        text, reason = clean(value)
        yield text, reason, f"{name}:{row + 1} {_shown(value)}" if reason else ""


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# ---- files


def caption_files(captions: str) -> list[str] | None:
    """Return the files of a folder, a pattern or a file, sorted; None for what can only be a Hub id.

    Of a folder they are the parquet files if it has any, else those of the one kind that it has. Hidden folders are
    left out. Raises UserError when there is nothing by that name, or a folder has files of several kinds.
    """
    path = Path(captions)
    if path.is_dir():
        files = _files_in(path)
    elif glob.has_magic(captions):
        files = sorted(glob.glob(captions, recursive=True))
    elif path.is_file():
        files = [captions]
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", captions):
        return None
    else:
        raise UserError(
            f"captions: there is no {captions}; expected a folder, a file or a pattern of files "
            f"({', '.join(READERS)}), or a Hub id such as {REPO}"
        )
    if not files:
        raise UserError(
            f"captions: {captions} has no {', '.join(READERS)}; get some: python scripts/fetch_recap.py --out {path}"
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


# ---- streaming


def stream_captions(
    source: str,
    column: str | None,
    global_batch: int,
    rank: int,
    world: int,
    micro_batch: int,
    seed: int,
    buffer: int = 10_000,
    start_step: int = 0,
    held_out: float = 0.01,
    split: str = "train",
) -> CaptionStream:
    """Return one rank's micro-batches (keys, texts) of an endless stream of captions, without an index.

    Args:
        source, column: as `open_captions` takes them; a Hub id is read over the network as it goes.
        global_batch: samples per step over all ranks, a multiple of micro_batch * world.
        buffer: rows that the shuffle holds, twice; files are shuffled, too.
        start_step: the step to begin with, exactly; what lies before is read again and thrown away.
        held_out: share of the texts that belongs to val, by the same rule as in `open_captions`.

    Raises UserError for a source that is not there, HubError, and while iterating for a file that cannot be read.
    """
    assert global_batch % (micro_batch * world) == 0 and split in SPLITS
    files = caption_files(source) or hub_files(source)
    return CaptionStream(
        files,
        column,
        global_batch,
        rank,
        world,
        micro_batch,
        seed,
        buffer,
        start_step,
        first_train_code(held_out),
        split,
    )


@dataclass
class CaptionStream:
    """What `stream_captions` returns. Iterate it in the main process or a thread: worker processes would share it out.

    Every rank reads the whole stream and keeps its slices, as `StepSampler` does: micro-batch m of rank r is slice
    m*world + r of a step. So the order depends on the seed alone, at the price of reading `world` times as much.
    """

    files: list[str]
    column: str | None
    global_batch: int
    rank: int
    world: int
    micro_batch: int
    seed: int
    buffer: int
    start_step: int
    first_train: int  # `first_train_code`
    split: str
    report: dict[str, dict] = field(default_factory=dict)  # of the rows read so far, each once; as `Captions.report`

    def __iter__(self) -> Iterator[tuple[list[str], list[str]]]:
        first = self.start_step * self.global_batch
        step: list[tuple[str, str]] = []
        for number, sample in enumerate(self._samples()):
            if number < first:
                continue
            step.append(sample)
            if len(step) == self.global_batch:
                stride = self.world * self.micro_batch
                for start in range(self.rank * self.micro_batch, self.global_batch, stride):
                    keys, texts = zip(*step[start : start + self.micro_batch], strict=True)
                    yield list(keys), list(texts)
                step = []

    def _samples(self) -> Iterator[tuple[str, str]]:
        """Yield (key, text) of one epoch after the other, each in an order of its own."""
        from datasets import IterableDataset

        blocks = IterableDataset.from_generator(
            _stream_blocks, gen_kwargs={"files": self.files, "column": self.column}
        ).shuffle(seed=self.seed, buffer_size=max(1, self.buffer // BLOCK))
        self.report = {}
        epoch, usable = 0, True
        while usable:
            blocks.set_epoch(epoch)
            usable = False
            for text, reason, where in self._shuffled(blocks, epoch):
                if reason and epoch == 0:
                    count(self.report, reason, [where])
                code = code_of(text)
                if text and (code >= self.first_train) == (self.split == "train"):
                    usable = True
                    yield key_of(code), text
            epoch += 1
        raise UserError(
            f"no usable {self.split} caption in the {len(self.files)} files from {self.files[0]} on "
            f"({counted(self.report)}); the rest of them, if any, is in the other split, which held_out divides off"
        )

    def _shuffled(self, blocks, epoch: int) -> Iterator[tuple[str, str, str]]:
        """Yield the rows of blocks that come shuffled already, so that those of one block do not stay together."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = (row for block in blocks for row in block["rows"])
        while window := list(islice(rows, self.buffer)):
            for place in rng.permutation(len(window)).tolist():
                yield window[place]


def _stream_blocks(files: list[str], column: str | None) -> Iterator[dict]:
    """Yield rows by BLOCK: for single ones `datasets` would take longer than for reading them."""
    for file in files:
        rows = clean_rows(read_texts(file, column).values, Path(file).name)
        while block := list(islice(rows, BLOCK)):
            yield {"rows": block}


def counted(report: dict) -> str:
    """Return a report in one line: `12 null, 3 empty`."""
    said = {reason: f" ({REMEDIES[reason]})" if reason in REMEDIES else "" for reason in report}
    found = [f"{entry['count']:,} {reason}{said[reason]}" for reason, entry in sorted(report.items())]
    return ", ".join(found) or "nothing left out"
