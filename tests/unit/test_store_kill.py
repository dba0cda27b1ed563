# SPDX-License-Identifier: Apache-2.0
"""Embedding store under SIGKILL: real processes, killed at random moments, resumed by other numbers of writers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from effsam3.data.store.format import Field, create_store
from effsam3.data.store.reader import StoreReader, verify_store
from effsam3.data.store.writer import StoreWriter, finish_store, repair_store

FIELDS = [Field("features", "float16", (8, 64, 64)), Field("scale", "float32", (8,))]  # 64 KiB and a little
KEYS = [f"sa_{i}" for i in range(600)]
SHARD_BYTES = 2 << 20  # shards of about 30 records, so that kills also hit the change of shard


def record(number: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(number)
    return {f.name: values.standard_normal(f.shape, np.float32).astype(f.dtype) for f in FIELDS}


def write_share(root: str, rank: int, world: int) -> None:
    """What a killed process runs: its share of what is missing; acknowledges every record on stdout."""
    with StoreWriter(root, rank, SHARD_BYTES) as out:
        os.write(1, b"ready\n")
        os.read(0, 1)
        for number in range(rank, len(KEYS), world):
            if KEYS[number] in out.done:
                continue
            out.write(KEYS[number], record(number))
            os.write(1, f"{KEYS[number]}\n".encode())


def slow_pwrite(fd: int, view: memoryview, offset: int, pwrite=os.pwrite) -> int:
    """Writes a piece, as a busy disk may: a kill then mostly hits a half-written payload."""
    time.sleep(0.0003)
    return pwrite(fd, view[: 10 << 10], offset)


def start(root: Path, world: int) -> list[subprocess.Popen]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(root), str(rank), str(world)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        for rank in range(world)
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    return processes


def go(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()


def shard_sizes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in root.glob("*.bin")}


def done_keys(root: Path) -> set[str]:
    return set(StoreReader(root, allow_unfinished=True).keys)


def test_killed_writers_lose_nothing_they_acknowledged(tmp_path):
    moments = random.Random(0)
    create_store(tmp_path, FIELDS, {}, expected=len(KEYS))
    acknowledged: set[str] = set()
    done: set[str] = set()
    kills = torn = 0
    for world in (3, 2, 2, 1, 2, 2):
        processes = start(tmp_path, world)
        go(processes)
        for _ in range(moments.randrange(3, 35)):
            acknowledged.add(processes[0].stdout.readline().decode().strip())
        time.sleep(moments.uniform(0, 0.003))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            acknowledged |= set(process.communicate()[0].decode().split("\n")[:-1])
            kills += process.returncode == -signal.SIGKILL
        sizes = shard_sizes(tmp_path)
        assert repair_store(tmp_path) == {}
        torn += sum(size > shard_sizes(tmp_path)[name] for name, size in sizes.items())
        now = done_keys(tmp_path)
        assert done <= now, "a record of an earlier run is gone"
        assert acknowledged <= now, "a record was lost after write() returned"
        assert len(now - acknowledged) <= kills  # journalled, but killed before the acknowledgement
        done = now
    assert kills == 12 and len(done) < len(KEYS), "nothing was left to kill: use more keys"
    assert torn > 3, "kills should mostly hit a half-written payload"

    processes = start(tmp_path, 2)
    go(processes)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert finish_store(tmp_path, KEYS, {}).records == len(KEYS)
    assert verify_store(tmp_path).checked == len(KEYS)
    reader = StoreReader(tmp_path)
    for number, position in enumerate(reader.positions(KEYS)):
        found = reader.read([position])
        for name, value in record(number).items():
            np.testing.assert_array_equal(found[name][0], value)


def test_killed_writer_is_free_again_at_once(tmp_path):
    create_store(tmp_path, FIELDS, {})
    (process,) = start(tmp_path, 1)
    process.kill()
    process.communicate()
    StoreWriter(tmp_path, 0).close()


if __name__ == "__main__":
    os.pwrite = slow_pwrite
    write_share(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
