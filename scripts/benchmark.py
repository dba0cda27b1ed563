# SPDX-License-Identifier: Apache-2.0
"""Measures what effsam3 claims about its speed, each claim as a ratio of two ways of doing the same.

    python scripts/benchmark.py [--suite cpu|gpu] [--only NAME] [--rounds 7] [--tiny] [--out benchmark.json]
        [--baseline-module FILE.py]

All sides of a benchmark run in one process, in turn, so that a busy machine slows all of them alike; the first round
is dropped. The ratio is that of CPU times (medians) in the suite `cpu`, and of the best wall times in the suite `gpu`.
`--tiny` only shows that everything runs. With `--baseline-module` the naive side of a benchmark such as
`image-loading` is what `image_loading(device, tiny)` of that file returns, a function without arguments; it may import
the modules here.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import runpy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import torch
from benchmark_images import decoding, image_loading, pixels
from benchmark_loop import loop_step, masked_loss, region_and_boundary
from benchmark_memory import clip_step, frame_memory
from benchmark_phrases import concept_step, phrases_of_image, slim_phrase
from benchmark_start import first_step, imports, show
from benchmark_text import text_step
from torch.utils.data import DataLoader, Dataset

from effsam3.benchmarks.speed import device_name
from effsam3.data.images.features import ImageFeatures, store_keys
from effsam3.data.images.sa1b import COLUMNS, load_index
from effsam3.data.indexing import arrow_schema, write_parquet
from effsam3.data.loader import loader
from effsam3.data.store.format import INPUTS, Field, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store
from effsam3.data.synthetic.pairs import make_synthetic_pairs
from effsam3.files import write_text
from effsam3.hardware.budget.dry_run import DryPlace
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads.tracker import decode_shown, tracker_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.registry import SAM3S
from effsam3.models.vision.slot import build_vision_student
from effsam3.recipe.reader import load_recipe
from effsam3.stages.adapt.images import own_images
from effsam3.stages.adapt.training import AdaptStage
from effsam3.training.report import table

Sides = dict[str, Callable[[], object]]


class Benchmark(NamedTuple):
    """`sides` makes the ways by name, ours first, the naive one second; ours may take `most` times as long.

    What knows no GPU is only in the suite `cpu`, or run by its name.
    """

    sides: Callable[[torch.device, bool], Sides]
    most: float
    on_gpu: bool = True


@dataclass(frozen=True)
class Measured:
    """Seconds of one side."""

    cpu_s: float  # median
    main_s: float  # of it in this process, median
    wall_s: float  # best


def measure(sides: Sides, rounds: int, device: torch.device) -> dict[str, Measured]:
    """Run all sides round after round; the first round warms up and is dropped."""
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            cpu, main, wall = _cpu_seconds(), time.process_time(), time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent = _cpu_seconds() - cpu, time.process_time() - main, time.perf_counter() - wall
            times[name].append(spent)
    kept = {name: zip(*taken[1:], strict=True) for name, taken in times.items()}
    return {
        name: Measured(statistics.median(cpu), statistics.median(main), min(wall))
        for name, (cpu, main, wall) in kept.items()
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended, such as data workers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# ---- benchmarks: a function (device, whether tiny) -> named sides, and its entry in BENCHMARKS


def lora_step(device: torch.device, tiny: bool) -> Sides:
    """One step of training adapters, from files to weights, and only the forward and backward of the adapted model."""
    folder, count = _scratch(), 1 if tiny else 4
    make_synthetic_pairs(folder, 2 * count, side_px=192)
    checkpoint = "random" if device.type == "cuda" else "tiny"
    recipe = load_recipe("smoke/lora", [f"data.path={folder}", f"sam3.checkpoint={checkpoint}", "data.held_out=0.5"])
    place = DryPlace("bf16" if device.type == "cuda" else "fp32")
    place.device = device
    chassis = chassis_folder(checkpoint)
    stage = AdaptStage(recipe, place, load_whole(model_class(read_config(chassis).model_type), chassis), [])
    for part in (stage.student, *stage.frozen):
        part.to(device)
    data = own_images(recipe).batches(recipe, "train", stage.image_size)
    images = [(position, position) for position in range(count)]
    optimizer = torch.optim.AdamW(stage.student.train().parameters(), lr=1e-5)
    given = stage.inputs(data.__getitems__(images))

    def training() -> None:
        stage.loss(stage.student, data.__getitems__(images))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def bare() -> None:
        with place.autocast():
            feat_BDGG = trunk_features(stage.model, given.pixels_B3SS)
            levels = tracker_levels(stage.model, feat_BDGG)
            total = sum(part.logits_NMLL.float().mean() for part in decode_shown(stage.model, levels, given.shown))
        total.backward()
        optimizer.zero_grad()

    return {"training": training, "forward and backward": bare}


def key_lookup(device: torch.device, tiny: bool) -> Sides:
    """Open a finished store of a million records and find the first key, and a dict of the keys in its journal."""
    root, count = _scratch() / "store", 1_000 if tiny else 1_000_000
    keys = _store_of(root, range(count))
    wanted = keys[count // 3]

    def naive() -> int:
        with open(root / "shard-00000-0000.tsv", encoding="utf-8") as lines:
            next(lines)
            return {line.partition("\t")[0]: place for place, line in enumerate(lines)}[wanted]

    return {"mapped index": lambda: StoreReader(root).positions([wanted]), "dict of all keys": naive}


def index_opening(device: torch.device, tiny: bool) -> Sides:
    """Open an index of 500,000 images with a store of their features and read a batch's rows, up to its records.

    The naive side is a table in memory, a list of its keys and the place of each image's record.
    """
    folder, count = _scratch(), 1_000 if tiny else 500_000
    path, store = folder / "index.parquet", folder / "store"
    numbers = range(count)
    columns: dict[str, Any] = {
        "key": [f"sa_{number:08d}" for number in numbers],
        "image_file": [f"sa_{number // 11_000:06d}.tar" for number in numbers],
        "image_digest": [f"{number:016x}" for number in numbers],
    }
    fixed: dict[str, Any] = {"split": "train", "annotation_file": None, "converted": ""}
    schema = arrow_schema(COLUMNS)
    whole = {name: columns.get(name, [fixed.get(name, 7)] * count) for name in COLUMNS}
    write_parquet(pyarrow.table(whole, schema=schema), path)
    _store_of(store, numbers, lambda number: f"sa_{number:08d}@{number:016x}")
    batch = np.random.default_rng(0).choice(count, 16, replace=False).tolist()

    def ours() -> None:
        reader, rows = StoreReader(store), load_index(path, "train")
        ImageFeatures(rows, folder, 16, "square", reader)
        assert len(reader.positions(store_keys(rows[batch], tied=True))) == 16

    def naive() -> None:
        table = parquet.read_table(path)
        keys = store_keys({name: table[name].to_pylist() for name in ("key", "image_digest")}, tied=True)
        with open(store / "shard-00000-0000.tsv", encoding="utf-8") as lines:
            next(lines)
            places = {line.partition("\t")[0]: place for place, line in enumerate(lines)}
        records = [places[key] for key in keys]
        assert len([records[position] for position in batch]) == 16

    return {"mapped": ours, "in memory": naive}


def loading(device: torch.device, tiny: bool) -> Sides:
    """Read stored features of SAM 3's trunk in batches of 8 by two data workers: 30 batches of 81 MiB.

    Most of ours is starting the workers and clearing their memory once. The naive side is torch's DataLoader as it
    comes, over the same reader.
    """
    shape, steps = ((64, 8, 8), 2) if tiny else ((1024, 72, 72), 30)
    root, keys = _scratch(), [f"sa_{number}" for number in range(16)]
    create_store(root, [Field("features", "float16", shape)], {})
    values = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    with StoreWriter(root, 0) as out:
        for key in keys:
            out.write(key, {"features": values})
    finish_store(root, keys)
    reader = StoreReader(root)
    batches = np.random.default_rng(1).integers(len(keys), size=(steps, 8)).tolist()

    class Batches:
        def __len__(self) -> int:
            return len(keys)

        def __getitems__(self, positions: list[int]) -> dict:
            return reader.read(positions)

    class Records(Dataset):
        def __getitem__(self, position: int) -> torch.Tensor:
            return reader.read([position])["features"][0]

    def drain(batches) -> None:
        for _ in batches:
            pass

    return {
        "loader": lambda: drain(loader(Batches(), batches, workers=2, pin=False)),
        "DataLoader": lambda: drain(DataLoader(Records(), batch_sampler=batches, num_workers=2)),
    }


def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="effsam3-benchmark-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def _store_of(root: Path, numbers: range, key: Callable[[int], str] = "sa_{:08d}@0".format) -> list[str]:
    """Make a store of records that nobody reads; returns its keys."""
    manifest = create_store(root, [Field("features", "uint8", (64,))], {INPUTS: "digests"})
    keys = list(map(key, numbers))
    (root / "shard-00000-0000.tsv").write_text(
        "\n".join([manifest.header, *(f"{one}\t{0:016x}" for one in keys)]) + "\n"
    )
    with open(root / "shard-00000-0000.bin", "wb") as records:
        records.truncate(manifest.stride * len(keys))  # a hole
    finish_store(root, keys)
    return keys


def vision_pass(student: str, device: torch.device, tiny: bool) -> Sides:
    """An image through a vision student, from pixels to all maps of both necks, and through its trunk alone."""
    sam3 = SAM3S["tiny" if tiny else "random"]
    encoder: Any = sam3.config().detector_config.vision_config
    model = build_vision_student(encoder, student, (96, 32, 64, 96), None).to(device).eval()
    side = sam3.sizes.image_size
    pixels = torch.rand(1, 3, side, side, device=device) * 2 - 1

    def without_gradients(run: Callable[[torch.Tensor], object]) -> object:
        with torch.no_grad():
            return run(pixels)

    return {
        "to all maps": lambda: without_gradients(model),
        "trunk alone": lambda: without_gradients(model.trunk.trunk),
    }


BENCHMARKS = {
    "loop-step": Benchmark(loop_step, most=5),
    "feature-loss": Benchmark(masked_loss, most=0.5),
    "jf": Benchmark(region_and_boundary, most=1 / 12),
    "video-step": Benchmark(partial(clip_step, False), most=0.5),
    "memory-step": Benchmark(partial(clip_step, True), most=0.6),
    "memory-frame": Benchmark(frame_memory, most=1.2),
    "lora-step": Benchmark(lora_step, most=1.3),
    "decoding": Benchmark(decoding, most=0.85),
    "pixels": Benchmark(pixels, most=0.5),
    "loading": Benchmark(loading, most=1 / 3),
    "image-loading": Benchmark(image_loading, most=0.5),
    "key-lookup": Benchmark(key_lookup, most=1 / 100),
    "index-opening": Benchmark(index_opening, most=1 / 10),
    "text-step": Benchmark(text_step, most=0.5),
    "vision-pass-repvit": Benchmark(partial(vision_pass, "repvit_m1_1"), most=1.35),
    "vision-pass-tinyvit": Benchmark(partial(vision_pass, "tiny_vit_5m"), most=1.35),
    "concept-step": Benchmark(concept_step, most=2.2),
    "phrases": Benchmark(phrases_of_image, most=1 / 1.8),
    "start-show": Benchmark(show, most=4, on_gpu=False),
    "start-package": Benchmark(partial(imports, "effsam3, transformers", "transformers"), most=1.05, on_gpu=False),
    "start-train": Benchmark(partial(imports, "effsam3.train", "torch, transformers"), most=1.3, on_gpu=False),
    "start-step": Benchmark(first_step, most=2, on_gpu=False),
    "phrase-slim": Benchmark(slim_phrase, most=0.6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", choices=tuple(BENCHMARKS), help="run one benchmark")
    parser.add_argument("--rounds", type=int, default=7, help="the first one is dropped")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: a test of the script")
    parser.add_argument("--baseline-module", type=Path, metavar="FILE.py", help="other naive sides, by benchmark")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), help="where the numbers are written")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: the first one is dropped; ask for 2 or more")
    if arguments.suite == "cpu":
        torch.set_num_threads(1)
    device = torch.device("cuda" if arguments.suite == "gpu" else "cpu")
    baselines = runpy.run_path(str(arguments.baseline_module)) if arguments.baseline_module else {}
    found, rows = {}, []
    for name, (sides, most, on_gpu) in BENCHMARKS.items():
        if arguments.only != name and (arguments.only or (arguments.suite == "gpu" and not on_gpu)):
            continue
        ways = sides(device, arguments.tiny)
        if baseline := baselines.get(name.replace("-", "_")):
            ways[list(ways)[1]] = baseline(device, arguments.tiny)
        times = measure(ways, arguments.rounds, device)
        key = "wall_s" if arguments.suite == "gpu" else "cpu_s"
        ours, naive, *_ = (getattr(one, key) for one in times.values())
        found[name] = {
            "sides": {side: asdict(one) for side, one in times.items()},
            "ratio": ours / naive,
            "most": most,
        }
        for place, (side, one) in enumerate(times.items()):
            ratio = [f"{ours / naive:.2f}", f"{most:.2f}"] if not place else ["", ""]
            rows.append(
                [name if not place else "", side, f"{one.cpu_s:.3f}", f"{one.main_s:.3f}", f"{one.wall_s:.3f}", *ratio]
            )
    print(f"{device_name(device)}, load average {os.getloadavg()[0]:.1f}, {arguments.rounds - 1} rounds\n")
    print(table(rows, ["benchmark", "side", "CPU s", "in main", "best wall s", "ratio", "at most"], text_columns=2))
    about = {"device": device_name(device), "suite": arguments.suite, "rounds": arguments.rounds - 1}
    write_text(arguments.out, json.dumps(about | {"tiny": arguments.tiny, "benchmarks": found}, indent=1) + "\n")
    print(f"\nnumbers in {arguments.out}")


if __name__ == "__main__":
    main()
