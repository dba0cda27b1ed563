# SPDX-License-Identifier: Apache-2.0
"""Images a second on 8 and 64 GPUs by a cost model, and after how many epochs a stored teacher beats an online one.

    python scripts/scaling.py [--teacher-tflops 245] [--disk-gb 6] [...]

Nothing is measured here: `stage1/image/es_rv_m` is counted in a dry run, and the rates of the machine are flags.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial

# What a step sends of the gradients' bytes, in units of (n - 1) / n: to reduce and to spread them; ZeRO-3 gathers the
# weights twice and reduces the gradients once (ZeRO, arXiv:1910.02054, section 7).
SENT = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 3}
GPUS = (8, 64)


@dataclass(frozen=True)
class Costs:
    """What a recipe and a machine cost; counts of the recipe first, rates of the machine after."""

    student_flop: float  # of training on one image, forward and backward
    teacher_flop: float  # of one image, forward
    gradient_bytes: float
    record_bytes: float  # of one image in the store
    batch: int  # images on each GPU in a step
    student_flop_per_s: float  # that a GPU achieves, not its peak
    teacher_flop_per_s: float
    loader_s: float  # CPU seconds to read and decode one image
    workers: int  # data workers of each GPU
    disk_bytes_per_s: float  # of each node, shared by its GPUs
    link_bytes_per_s: float  # between GPUs of a node, each way
    network_bytes_per_s: float  # between nodes, each way
    gpus_per_node: int = 8


def image_seconds(costs: Costs, gpus: int, teacher: str) -> tuple[float, float]:
    """Return seconds that one GPU computes on an image, and that its loader needs for it.

    compute = student FLOP / achieved FLOP/s + teacher FLOP / achieved FLOP/s if online
    loader  = max(CPU s / workers, record bytes * GPUs of the node / disk bytes/s unless online)
    """
    student, decoding = costs.student_flop / costs.student_flop_per_s, costs.loader_s / costs.workers
    if teacher == "online":
        return student + costs.teacher_flop / costs.teacher_flop_per_s, decoding
    return student, max(decoding, costs.record_bytes * min(gpus, costs.gpus_per_node) / costs.disk_bytes_per_s)


def step_seconds(costs: Costs, gpus: int, teacher: str, hardware: str = "ddp") -> float:
    """Return the seconds of a step on `gpus`, `costs.batch` images on each, `teacher` being `stored` or `online`.

    step = batch * max(compute, loader) + gradient bytes * SENT * (n - 1) / n / bandwidth

    Nothing of the exchange is hidden behind the backward pass, so this is the most it can cost; latency is left out.
    """
    bandwidth = costs.link_bytes_per_s if gpus <= costs.gpus_per_node else costs.network_bytes_per_s
    exchange = costs.gradient_bytes * SENT[hardware] * (gpus - 1) / gpus / bandwidth
    return costs.batch * max(image_seconds(costs, gpus, teacher)) + exchange


def images_per_second(costs: Costs, gpus: int, teacher: str, hardware: str = "ddp") -> float:
    """Return what all GPUs together train on."""
    return gpus * costs.batch / step_seconds(costs, gpus, teacher, hardware)


def break_even_epochs(costs: Costs, gpus: int) -> float:
    """Return after how many epochs storing the teacher's features has taken less time than running it online.

    embed  = max(teacher FLOP / achieved FLOP/s, loader of a stored image: a record is written as fast as it is read)
    epochs = embed / (online - stored), per image; infinite where a stored epoch is no faster than an online one.
    """
    stored, online = (max(image_seconds(costs, gpus, teacher)) for teacher in ("stored", "online"))
    _, loader = image_seconds(costs, gpus, "stored")
    embed_s = max(costs.teacher_flop / costs.teacher_flop_per_s, loader)
    return embed_s / (online - stored) if online > stored else math.inf


def count() -> dict[str, float]:
    """Count what training es_rv_m on full-size features costs, by dry runs: the first fields of `Costs`."""
    from effsam3.hardware.budget.estimates import FP32, measure  # with torch: the model itself needs none
    from effsam3.models.registry import SAM3S
    from effsam3.recipe.reader import load_recipe

    sizes = {
        teacher: measure(load_recipe("stage1/image/es_rv_m", ["sam3.checkpoint=random", f"teacher={teacher}"]))
        for teacher in ("stored", "online")
    }
    encoder, grid = SAM3S["random"].config().detector_config.vision_config, SAM3S["random"].sizes.grid
    return {
        "student_flop": sizes["stored"].flops,
        "teacher_flop": sizes["online"].flops - sizes["stored"].flops,
        "gradient_bytes": sizes["stored"].trained * FP32,
        "record_bytes": 2 * encoder.backbone_config.hidden_size * grid**2,
    }


def predict(counted: dict[str, float], rates: argparse.Namespace) -> list[list[str]]:
    """Return a row for each way to have a teacher: cells of the table that `main` prints."""
    rows = []
    for name, share in {"stored": 1.0, "int8": 0.5, "online": 0.0}.items():
        costs = Costs(
            **counted | {"record_bytes": share * counted["record_bytes"]},
            batch=rates.batch,
            student_flop_per_s=rates.student_tflops * 1e12,
            teacher_flop_per_s=rates.teacher_tflops * 1e12,
            loader_s=rates.loader_ms / 1e3,
            workers=rates.workers,
            disk_bytes_per_s=rates.disk_gb * 1e9,
            link_bytes_per_s=rates.link_gb * 1e9,
            network_bytes_per_s=rates.network_gb * 1e9,
        )
        teacher = "online" if name == "online" else "stored"
        speeds = [images_per_second(costs, gpus, teacher) for gpus in GPUS]
        speeds.append(images_per_second(costs, GPUS[-1], teacher, "zero3"))
        epochs = "" if teacher == "online" else f"{break_even_epochs(costs, GPUS[0]):.1f}"
        rows.append([name, f"{costs.record_bytes / 1e6:,.1f}", *(f"{speed:,.0f}" for speed in speeds), epochs])
    return rows


def flags() -> argparse.ArgumentParser:
    """Return the command line: the rates of the machine, each of one GPU or node."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rate = partial(parser.add_argument, type=float)
    rate("--teacher-tflops", default=245, help="achieved: 25 %% of an H200's 989, measured, docs/hardware.md")
    rate("--student-tflops", default=56, help="achieved: 6 %% of the same, es_rv_m")
    parser.add_argument("--batch", type=int, default=16, help="images on each GPU in a step, as in that run")
    parser.add_argument("--workers", type=int, default=12, help="data workers of each GPU, as in that run")
    rate("--loader-ms", default=20, help="CPU time to decode and resize an image: assumed")
    rate("--disk-gb", default=6, help="GB/s of a node's disks: assumed, one PCIe 4 NVMe")
    rate("--link-gb", default=300, help="GB/s between a node's GPUs: assumed, NVLink")
    rate("--network-gb", default=25, help="GB/s between nodes: assumed, 200 Gbit/s")
    return parser


def main() -> None:
    from effsam3.training.report import table

    rates, counted = flags().parse_args(), count()
    print(
        f"es_rv_m: student {counted['student_flop'] / 1e12:.3f} TFLOP an image, teacher "
        f"{counted['teacher_flop'] / 1e12:.2f}, gradients {counted['gradient_bytes'] / 1e6:.0f} MB\n"
    )
    heads = [f"{gpus} GPUs, DDP or ZeRO-1/2" for gpus in GPUS]
    heads = ["teacher", "MB an image", *heads, f"{GPUS[-1]} GPUs, ZeRO-3", "break-even epochs"]
    print(table(predict(counted, rates), heads))


if __name__ == "__main__":
    main()
