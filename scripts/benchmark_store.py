# SPDX-License-Identifier: Apache-2.0
"""Measures the embedding store against a naive one and against the operating system's floor.

    python scripts/benchmark_store.py [--records 64] [--shape 256 64 64] [--rounds 7] [--folder /tmp] [--json]

All ways run in one process, in turn, in a new order each round; the first round is dropped. Times are CPU time of the
process per record (user and system), medians of the rounds; files stay in the page cache. The naive store is what a
first version usually does: one file, seek + read, `np.frombuffer().copy()`, `np.stack`, `.float()` on the CPU. The
store's reader hands out float16 and leaves the conversion to the GPU; "and float()" adds it here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from effsam3.data.store.format import Field, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store

BATCH = 16


def measure(ways: dict[str, Callable[[], None]], rounds: int, records: int) -> dict[str, float]:
    """Median CPU microseconds per record of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            start = time.process_time()
            ways[name]()
            times[name].append((time.process_time() - start) / records * 1e6)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def reading(folder: Path, values: np.ndarray) -> dict[str, Callable[[], None]]:
    """Ways to read all records in shuffled batches."""
    records, shape, size = len(values), values.shape[1:], values[0].nbytes
    field = Field("features", "float16", shape)
    create_store(folder / "store", [field], {})
    keys = [f"sa_{i}" for i in range(records)]
    with StoreWriter(folder / "store", 0) as out:
        for key, value in zip(keys, values, strict=True):
            out.write(key, {"features": value})
    finish_store(folder / "store", keys)
    (folder / "naive.bin").write_bytes(values.tobytes())
    reader = StoreReader(folder / "store")
    naive_file = open(folder / "naive.bin", "rb")  # noqa: SIM115 (stays open for all rounds)
    fd, stride = os.open(folder / "store" / "shard-00000-0000.bin", os.O_RDONLY), reader.manifest.stride
    order = np.random.default_rng(0).permutation(records)
    batches = [order[start : start + BATCH] for start in range(0, records, BATCH)]
    raw = memoryview(bytearray(size * BATCH))

    def naive():
        for batch in batches:
            items = []
            for position in batch.tolist():
                naive_file.seek(position * size)
                items.append(np.frombuffer(naive_file.read(size), np.float16).copy().reshape(shape))
            torch.from_numpy(np.stack(items)).float()

    def store():
        for batch in batches:
            reader.read(batch)

    def store_float():
        for batch in batches:
            reader.read(batch)["features"].float()

    def floor():
        for batch in batches:
            for i, position in enumerate(batch.tolist()):
                os.preadv(fd, [raw[i * size : (i + 1) * size]], position * stride)

    return {
        "naive": naive,
        "store": store,
        "store and float()": store_float,
        "os.preadv": floor,
    }


def writing(folder: Path, values: np.ndarray) -> dict[str, Callable[[], None]]:
    """Ways to write all records into a new file and sync it."""
    size, field = values[0].nbytes, Field("features", "float16", values.shape[1:])
    count = iter(range(1 << 30))

    def store():
        root = folder / f"written-{next(count)}"
        create_store(root, [field], {})
        with StoreWriter(root, 0) as out:
            for i, value in enumerate(values):
                out.write(f"sa_{i}", {"features": value})
        for path in root.iterdir():
            path.unlink()

    def floor():
        path = folder / "written.bin"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        for i, value in enumerate(values):
            os.pwrite(fd, value, i * size)
        os.fdatasync(fd)
        os.close(fd)
        path.unlink()

    return {"store": store, "os.pwrite": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--shape", type=int, nargs="+", default=[256, 64, 64], help="of a float16 record")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put the files, default the temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    values = np.random.default_rng(0).standard_normal((arguments.records, *arguments.shape), np.float32)
    values = values.astype(np.float16)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = {
            name: measure(make(Path(folder), values), arguments.rounds, arguments.records)
            for name, make in (("read", reading), ("write", writing))
        }
    ratios = {
        "read: naive / store": results["read"]["naive"] / results["read"]["store"],
        "read: store / os.preadv": results["read"]["store"] / results["read"]["os.preadv"],
        "write: store / os.pwrite": results["write"]["store"] / results["write"]["os.pwrite"],
    }
    if arguments.json:
        print(json.dumps({"record_bytes": values[0].nbytes, "cpu_us_per_record": results, "ratios": ratios}))
        return
    print(f"{arguments.records} records of {values[0].nbytes / 2**20:.3g} MiB, load average {os.getloadavg()[0]:.1f}")
    for name, times in results.items():
        print(f"\n{name:<22} CPU us/record   MB per CPU-s")
        for way, microseconds in times.items():
            print(f"  {way:<20} {microseconds:>13.1f} {values[0].nbytes / microseconds:>14.0f}")
    print()
    for name, ratio in ratios.items():
        print(f"{name:<26} {ratio:.2f}")


if __name__ == "__main__":
    main()
