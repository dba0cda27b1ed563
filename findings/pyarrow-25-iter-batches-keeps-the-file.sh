#!/usr/bin/env bash
# pyarrow.parquet.ParquetFile.iter_batches is how one reads a parquet file that does not fit into memory. From pyarrow 25 on
# it holds the bytes of the whole file before long, and until the ParquetFile goes: its pre_buffer is on now.
#
# Versions:  pyarrow 24.0.0 and 25.0.1 and 26.0.1, numpy 2.4.6
# Behaviour: a file of 1,000,000 rows (int64 and 16 random bytes) in 50 row groups, 26 MiB, read in batches of 10,000 rows that
#            are dropped at once; pyarrow.total_allocated_bytes() above the start after the fifth batch and the last, then
#            with the iterator deleted. With pre_buffer=False, or memory_map=True, it stays flat as before.
# A guess:   what a batch or a row group takes, whatever the length of the file: about 2 MiB.
# Seen:      pyarrow 24.0.0: default 1.9, 1.9, then 0.0 MiB; pre_buffer=False 1.9, 1.9, then 0.0; memory_map 1.4, 1.4, then 0.0
#            pyarrow 25.0.1: default 27.8, 27.8, then 26.5 MiB; pre_buffer=False 1.9, 1.9, then 0.0; memory_map 1.4, 1.4, then 0.0
#            pyarrow 26.0.1: the same as 25.0.1
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/read.py" <<'PYTHON'
import sys

import numpy
import pyarrow
import pyarrow.parquet as parquet

path, rows = sys.argv[1], 20_000
rng = numpy.random.default_rng(0)
schema = pyarrow.schema([("id", pyarrow.int64()), ("digest", pyarrow.binary(16))])
with parquet.ParquetWriter(path, schema) as writer:
    for _ in range(50):
        random = pyarrow.py_buffer(rng.bytes(16 * rows))
        digests = pyarrow.FixedSizeBinaryArray.from_buffers(schema.field("digest").type, rows, [None, random])
        writer.write_table(pyarrow.table([pyarrow.array(rng.integers(0, 2**60, rows)), digests], schema=schema))


def taken(**options):
    """MiB after five batches, after all, and when nothing but the file is left."""
    start = pyarrow.total_allocated_bytes()
    file = parquet.ParquetFile(path, **options)
    seen = [pyarrow.total_allocated_bytes() - start for _ in file.iter_batches(10_000)]
    return [round(one / 2**20, 1) for one in (seen[4], seen[-1], pyarrow.total_allocated_bytes() - start)]


default, off, mapped = taken(), taken(pre_buffer=False), taken(memory_map=True)
print(
    "pyarrow {}: default {}, {}, then {} MiB; pre_buffer=False {}, {}, then {}; memory_map {}, {}, then {}".format(
        pyarrow.__version__, *default, *off, *mapped
    )
)
keeps = int(pyarrow.__version__.split(".")[0]) >= 25
flat = max(*off, *mapped) < 4 and off[2] == mapped[2] == 0
sys.exit(not (flat and (min(default) > 20 if keeps else default == off)))
PYTHON
for version in 24.0.0 25.0.1 26.0.1; do
    python3 -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pyarrow==$version" numpy==2.4.6
    "$folder/venv/bin/python" "$folder/read.py" "$folder/rows.parquet"
done
