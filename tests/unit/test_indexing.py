# SPDX-License-Identifier: Apache-2.0
"""A damaged index is named, and never read as another one."""

import numpy as np
import pyarrow
import pytest

from effsam3.data.images import sa1b
from effsam3.data.indexing import arrow_schema, write_parquet
from effsam3.data.videos import sav
from effsam3.data.workers import in_order, run_now
from effsam3.errors import UserError

VALUES = {
    "string": "sa_1", "int32": 7, "int64": 2**40, "bool": True, "list<int32>": [2, 5],
    "list<list<int32>>": [[0, 9], []],
}  # fmt: skip


def columns_of(kind, file):
    return kind.load_index(file, "train").select_columns(list(kind.COLUMNS)).to_list()


@pytest.mark.parametrize("kind", [sa1b, sav])
def test_damage_is_found(kind, tmp_path):
    row = {name: VALUES[column] for name, column in kind.COLUMNS.items()} | {"split": "train"}
    rows = [row | {"key": f"sa_{number:03d}"} for number in range(40)]
    file, rng = tmp_path / "index.parquet", np.random.default_rng(0)
    write_parquet(pyarrow.Table.from_pylist(rows, arrow_schema(kind.COLUMNS)), file)
    data = file.read_bytes()
    assert columns_of(kind, file) == rows
    found = 0
    for number in range(200):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 5)):
            damaged[place] ^= rng.integers(1, 256)
        file.write_bytes(damaged[: rng.integers(len(data))] if number % 4 == 0 else damaged)
        try:
            assert columns_of(kind, file) == rows, "damage to what nobody reads"
        except UserError as error:
            assert "make it" in str(error) or "--val-fraction" in str(error)
            found += 1
    assert found > 150


def test_jobs_are_not_asked_for_before_there_is_room():
    asked = []

    def futures():
        for number in range(9):
            asked.append(number)
            yield run_now(int, number)

    for number, given in enumerate(in_order(futures(), ahead=3)):
        assert given == number and len(asked) == min(number + 4, 9)
