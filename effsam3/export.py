# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: one pass of the teacher over the data, into an embedding store.

accelerate launch --config_file accelerate_configs/zero2.yaml scripts/export.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from effsam3.accelerator import layout, make_accelerator
from effsam3.data.image_features import stored_features
from effsam3.data.loader import loader
from effsam3.data.statistics import SAMPLE, FeatureStatistics, statistics_sample
from effsam3.data.store import (
    StoreError,
    StoreReader,
    StoreWriter,
    create_store,
    finish_store,
    quantise_int8,
    repair_store,
    to_float16,
)
from effsam3.data.transforms import resized_size
from effsam3.errors import UserError
from effsam3.report import Report
from effsam3.stages.image import ImageTeacherPass

# Recomputed features differ by rounding only: float16's or int8's payload, and kernels that depend on the batch.
CHECK_COSINE = 0.999


def run(recipe, check: int | None = None) -> None:
    """Export the teacher's features of every image of the index; resume if the store is unfinished.

    Args:
        recipe: an `ImageRecipe`.
        check: instead of exporting, recompute this many stored samples and compare.

    Raises:
        UserError: the store belongs to another teacher or preprocessing, the guard refuses the teacher, or a checked
            sample differs.
    """
    if recipe.teacher == "online" and check is None:
        raise UserError(
            "the recipe says teacher: online, so train needs no store and there is nothing to export; set "
            "teacher=stored to export"
        )
    torch.manual_seed(recipe.train.seed)
    accelerator = make_accelerator(recipe.train.precision)
    report = Report(Path(recipe.train.runs) / recipe.name, accelerator.is_main_process)
    teacher_pass = ImageTeacherPass(recipe, accelerator)
    if check is not None:
        return _check(recipe, teacher_pass, accelerator, report, check)
    root = Path(recipe.export.to)
    if accelerator.is_main_process:
        images = sum(map(len, teacher_pass.datasets))
        create_store(root, teacher_pass.fields(), teacher_pass.description(), expected=images)
        for shard, records in repair_store(root).items():
            report.say(f"{shard}: {records} torn records of an interrupted export cut off, they are made again")
    accelerator.wait_for_everyone()
    _announce(recipe, teacher_pass, accelerator, report)
    started = time.monotonic()
    with StoreWriter(root, accelerator.process_index) as writer:
        # Every rank writes as soon as it starts; what is done must be read before anyone adds to it.
        done = frozenset(writer.done)
        accelerator.wait_for_everyone()
        exported = sum(
            _export(recipe, dataset, teacher_pass, writer, done, accelerator) for dataset in teacher_pass.datasets
        )
    exported = accelerator.reduce(torch.tensor([exported], device=accelerator.device)).item()
    if accelerator.is_main_process:
        expected = [key for dataset in teacher_pass.datasets for key in dataset.keys]
        manifest = finish_store(root, expected, _statistics(root, teacher_pass))
        seconds = time.monotonic() - started
        size = sum(path.stat().st_size for path in root.glob("*.bin"))
        report.say(
            f"{manifest.records:,} records, {size / 1e9:.2f} GB in {root} ({exported:,} made now, "
            f"{exported / seconds:.3g} images/s, {len(manifest.skipped)} images skipped)"
        )
        for entry in manifest.skipped[:10]:
            report.say(f"  skipped {entry['key']}: {entry['reason']}")
        report.say(f"next: train with the same recipe. Look inside: effsam3 store show {root}")
    accelerator.wait_for_everyone()


def _announce(recipe, teacher_pass: ImageTeacherPass, accelerator, report: Report) -> None:
    facts = teacher_pass.description()
    images = sum(map(len, teacher_pass.datasets))
    total = images * sum(field.nbytes for field in teacher_pass.fields())
    report.header(
        f"export   {recipe.name}   {layout(accelerator)}",
        {
            "teacher": f"{facts['teacher']['checkpoint']} {facts['tap']}  {facts['teacher']['trunk_parameters']:,} "
            f"parameters, fingerprint {facts['teacher']['fingerprint'][:12]}",
            "features": f"{facts['channels']} x {facts['grid']} x {facts['grid']} {recipe.export.dtype}, from "
            f"{facts['image_size']} px {facts['resize']}",
            "data": f"{recipe.data.index}  {images:,} images, about {total / 1e9:.2f} GB",
            "store": recipe.export.to,
        },
    )


def _export(recipe, dataset, teacher_pass, writer: StoreWriter, done: frozenset, accelerator) -> int:
    """Write this rank's share of a dataset's missing records; returns how many."""
    todo = [position for position, key in enumerate(dataset.keys) if key not in done]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    size = recipe.export.batch_size
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    bar = tqdm(
        total=len(mine), unit="image", desc="export", disable=not (accelerator.is_main_process and sys.stderr.isatty())
    )
    written, checked = 0, False
    # One thread writes while the teacher works on the next batch; waiting for it here bounds the memory to two
    # batches.
    with ThreadPoolExecutor(1) as disk, bar:
        pending: Future | None = None
        for batch in loader(dataset, batches, recipe.data.workers, pin=False):
            feat_BCGG = teacher_pass.features(batch, check=not checked).cpu()
            checked = True
            if pending is not None:
                written += pending.result()
            pending = disk.submit(_write, recipe, dataset.keys, batch, feat_BCGG, writer)
            bar.update(len(batch["positions"]))
        if pending is not None:
            written += pending.result()
    return written


def _write(recipe, keys, batch: dict, feat_BCGG: torch.Tensor, writer: StoreWriter) -> int:
    unreadable = dict(batch["unreadable"])
    for key, reason in unreadable.items():
        writer.skip(key, reason)
    written = 0
    for place, position in enumerate(batch["positions"].tolist()):
        key = keys[position]
        if key in unreadable:
            continue
        record = _payload(recipe.export.dtype, feat_BCGG[place], key)
        if recipe.export.pixels:
            record |= {"pixels": batch["pixels"][place], "sizes": batch["sizes"][place].int()}
        writer.write(key, record)
        written += 1
    return written


def _payload(dtype: str, feat_CGG: torch.Tensor, key: str) -> dict:
    if dtype == "float16":
        return {"features": to_float16(feat_CGG, key)}
    features, scale = quantise_int8(feat_CGG, key)
    return {"features": features, "scale": scale}


def _statistics(root: Path, teacher_pass: ImageTeacherPass) -> dict:
    """Per-channel mean and deviation over a fixed sample of the training images, from what was stored."""
    reader = StoreReader(root, allow_unfinished=True)
    train = teacher_pass.datasets[0]
    sample = stored_sample(reader, train.keys, SAMPLE)
    statistics = FeatureStatistics(teacher_pass.teacher.channels)
    if not sample:
        raise StoreError(
            f"none of the {len(train)} training images of {train.folder} could be exported; see the reasons above"
        )
    sizes = _sizes(train, sample, teacher_pass)
    for position, size in zip(sample, sizes, strict=True):
        record = reader.read(reader.positions([train.keys[position]]))
        statistics.update(stored_features(record), teacher_pass.valid({"sizes": size[None]}))
    return statistics.result()


def stored_sample(reader: StoreReader, keys: list[str], size: int) -> list[int]:
    """The first `size` positions of the statistics' fixed order whose images are in the store."""
    order = statistics_sample(keys, len(keys))
    return list(islice((position for position in order if reader.contains(keys[position])), size))


def _sizes(dataset, positions: list[int], teacher_pass: ImageTeacherPass) -> torch.Tensor:
    """The valid rows and columns (N, 2) of images after resizing, from the index alone."""
    rows = dataset.index.select(positions)
    return torch.tensor(
        [
            resized_size(height, width, dataset.image_size, dataset.resize)
            for height, width in zip(rows["height"], rows["width"], strict=True)
        ]
    )


def _check(recipe, teacher_pass: ImageTeacherPass, accelerator, report: Report, samples: int) -> None:
    """Recompute `samples` records and compare them with the store."""
    reader = StoreReader(recipe.export.to)
    dataset = teacher_pass.datasets[0]
    positions = stored_sample(reader, dataset.keys, samples)
    worst = 1.0
    for batch in loader(dataset, [[position] for position in positions], 0, pin=False):
        key = dataset.keys[int(batch["positions"][0])]
        if batch["unreadable"]:
            raise UserError(f"{key} is stored but can no longer be read: {batch['unreadable'][0][1]}")
        made = teacher_pass.features(batch).cpu()
        stored = stored_features(reader.read(reader.positions([key]), verify=True))
        cosine = float(F.cosine_similarity(made.flatten(1), stored.flatten(1)))
        worst = min(worst, cosine)
        report.say(f"{key}  cosine {cosine:.6f}  largest difference {float((made - stored).abs().max()):.4g}")
    report.say(f"{len(positions)} of {len(reader):,} records recomputed; lowest cosine {worst:.6f}")
    if worst < CHECK_COSINE:
        raise StoreError(
            f"the store at {recipe.export.to} does not hold this teacher's features of these images (cosine "
            f"{worst:.4f}, expected {CHECK_COSINE} or more); export again to another export.to"
        )
