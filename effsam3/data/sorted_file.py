# SPDX-License-Identifier: Apache-2.0
"""A dictionary in a file, in order of its keys: for more entries than memory should hold."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CACHE_KIB = 16 << 10  # of the file, kept in memory


class SortedFile:
    """Keys are texts, ordered by the bytes of their UTF-8; values are what JSON can hold. A context manager.

    Args:
        folder: of the file, which has no name and so goes with its process; None: that of temporary files.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        opened, name = tempfile.mkstemp(dir=folder)
        os.close(opened)
        # Without locks: nobody else opens it, and not every network disk has them.
        self._file = sqlite3.connect(f"{Path(name).absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)
        for setting in (f"cache_size = -{CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._file.execute(f"PRAGMA {setting}")
        self._file.execute("CREATE TABLE entries (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._file.execute("BEGIN")
        os.unlink(name)

    def __enter__(self) -> SortedFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._file.execute("SELECT count(*) FROM entries").fetchone()[0]

    def __setitem__(self, key: str, value: Any) -> None:
        self._file.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (os.fsencode(key), json.dumps(value)))

    def get(self, key: str) -> Any:
        """Return a key's value, None where it is not there."""
        row = self._file.execute("SELECT value FROM entries WHERE key = ?", (os.fsencode(key),)).fetchone()
        return None if row is None else json.loads(row[0])

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield all keys and values, in order of the keys."""
        for key, value in self._file.execute("SELECT key, value FROM entries ORDER BY key"):
            yield os.fsdecode(key), json.loads(value)
