# SPDX-License-Identifier: Apache-2.0
"""scripts/scaling.py: its cost model against numbers worked out by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import scaling

# A node has two GPUs. By itself a GPU computes 0.2 s on a stored image and 0.2 + 0.8 s with its teacher. The loader
# takes 0.6 / 3 s to decode it and 30 / 60 s to read its record, twice as long when two GPUs share the disk.
COSTS = scaling.Costs(
    student_flop=2, student_flop_per_s=10, teacher_flop=16, teacher_flop_per_s=20, gradient_bytes=100, record_bytes=30,
    batch=4, loader_s=0.6, workers=3, disk_bytes_per_s=60, link_bytes_per_s=50, network_bytes_per_s=25,
    gpus_per_node=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "teacher", "hardware", "seconds"),
    [
        (1, "stored", "ddp", 4 * 0.5),
        (1, "online", "ddp", 4 * 1.0),
        (2, "stored", "ddp", 4 * 1.0 + 100 / 50),  # 2 x 1/2 of the gradients inside the node
        (4, "stored", "zero2", 4 * 1.0 + 150 / 25),  # 2 x 3/4 between nodes, whose disks are their own
        (4, "online", "zero3", 4 * 1.0 + 225 / 25),  # 3 x 3/4
    ],
)
def test_a_step_worked_out_by_hand(gpus, teacher, hardware, seconds):
    assert scaling.step_seconds(COSTS, gpus, teacher, hardware) == pytest.approx(seconds)
    assert scaling.images_per_second(COSTS, gpus, teacher, hardware) == pytest.approx(gpus * 4 / seconds)


def test_the_break_even_worked_out_by_hand():
    assert scaling.break_even_epochs(COSTS, 1) == pytest.approx(0.8 / (1.0 - 0.5))
    # int8 halves a record, and two GPUs read what one did.
    assert scaling.break_even_epochs(replace(COSTS, record_bytes=15), 2) == pytest.approx(0.8 / (1.0 - 0.5))
    assert scaling.break_even_epochs(COSTS, 2) == math.inf  # reading takes as long as the teacher
    # A slow disk limits the teacher pass as well: 0.9 s to write a record, and 0.9 to read it.
    assert scaling.break_even_epochs(replace(COSTS, record_bytes=54), 1) == pytest.approx(0.9 / (1.0 - 0.9))


def test_the_table_has_what_the_model_says():
    """Rates at which reading decides stored epochs, and the teacher online ones."""
    counted = {"student_flop": 1e12, "teacher_flop": 9e12, "gradient_bytes": 0.0, "record_bytes": 8e9}
    rates = ["--student-tflops=10", "--teacher-tflops=10", "--disk-gb=80", "--batch=2", "--loader-ms=1"]
    assert scaling.predict(counted, scaling.flags().parse_args(rates)) == [
        ["stored", "8,000.0", "10", "80", "80", "4.5"],  # 0.8 s an image: 0.9 / (1 - 0.8)
        ["int8", "4,000.0", "20", "160", "160", "1.5"],  # 0.4 s an image: 0.9 / (1 - 0.4)
        ["online", "0.0", "8", "64", "64", ""],
    ]
