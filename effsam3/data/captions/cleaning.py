# SPDX-License-Identifier: Apache-2.0
"""Texts cleaned and counted: what is left out or cut, for which reason, and by which key a text is known.

Two texts that differ only in case and white space are the same one, since SAM 3's tokenizer sees no difference: they
have one code, and with it one key and one split, whatever list or column they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from effsam3.data.captions.text_files import Unusable
from effsam3.errors import UserError

MAX_CHARACTERS = 2000  # the rest of a text is cut off; SAM 3's tokenizer keeps 77 tokens at most, about 400 characters
EXAMPLES = 5  # named in a report for every reason
# What to do about reasons that are a fault of the whole file.
REMEDIES = {
    "cells": "rows with more or fewer cells than their header; quote a text that has the delimiter in it",
    "not_text": "lists, numbers or the like; data.column and data.phrase_column name another column",
}


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
    """Return the 64-bit hash of a text that identifies it; case and white space do not count."""
    import xxhash

    return xxhash.xxh3_64_intdigest(" ".join(text.lower().split()).encode())


def key_of(code: int) -> str:
    """Return the key of a code, 16 hex digits: what a store of teacher outputs calls the text."""
    return f"{code:016x}"


def first_train_code(held_out: float) -> int:
    """Return the code from which on texts are for training; those below are held out."""
    if not 0 <= held_out < 1:
        raise UserError(f"held_out {held_out} must be at least 0 and below 1")
    # A threshold on the hash: a larger share holds out what the smaller one did, and more.
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


def counted(report: dict) -> str:
    """Return a report in one line: `12 null, 3 empty`."""
    said = {reason: f" ({REMEDIES[reason]})" if reason in REMEDIES else "" for reason in report}
    found = [f"{entry['count']:,} {reason}{said[reason]}" for reason, entry in sorted(report.items())]
    return ", ".join(found) or "nothing left out"
