# SPDX-License-Identifier: Apache-2.0
"""The verb `embed`: one pass of the teacher over the data, into an embedding store.

accelerate launch --config_file accelerate_configs/zero2.yaml scripts/embed.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

from effsam3 import stages
from effsam3.data.loader import loader
from effsam3.data.statistics import SAMPLE, FeatureStatistics
from effsam3.data.store.format import StoreError, create_store, untied
from effsam3.data.store.key_index import blocks
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import StoreWriter, finish_store, repair_store
from effsam3.errors import UserError
from effsam3.files import free_bytes, gigabytes, refuse_full_disk, refuse_unwritable
from effsam3.hardware.accelerator import describe_hardware, make_accelerator, on_main, refuse_missing_gpu
from effsam3.recipe.common import FeatureRecipe
from effsam3.stages import needs
from effsam3.stages.protocol import Batch, StoredSamples, TeacherPass
from effsam3.stopping import STOP, STOPPED
from effsam3.training.compiling import compiling_explained
from effsam3.training.report import Report

# Recomputed features differ by rounding only: float16's or int8's payload, and kernels that depend on the batch.
CHECK_COSINE = 0.999


def run(recipe: FeatureRecipe, check: int | None = None) -> None:
    """Embed the teacher's features of every sample; resume if the store is unfinished.

    Args:
        recipe: of a stage with features to store.
        check: instead of embedding, recompute this many stored samples and compare.

    Raises:
        UserError: the store belongs to another teacher or preprocessing, the guard refuses the teacher, or a checked
            sample differs.
        SystemExit: code 75 after a request to stop; what was made is kept.
    """
    if recipe.teacher == "online" and check is None:
        raise UserError(
            "the recipe has teacher: online, so train needs no store and there is nothing to embed; set "
            "teacher=stored to embed"
        )
    refuse_missing_gpu(recipe.hardware)
    torch.manual_seed(recipe.train.seed)
    accelerator = make_accelerator(recipe.hardware, recipe.train.precision)
    if check is None:
        on_main(accelerator, partial(refuse_unwritable, Path(recipe.embed.to), "embed.to"))
    on_main(accelerator, partial(refuse_unwritable, recipe.folder, "train.runs"))
    report = Report(recipe.folder, accelerator.is_main_process)
    with compiling_explained(recipe.train.compile):
        _make_or_check(recipe, accelerator, report, check)


def _make_or_check(recipe: FeatureRecipe, accelerator: Accelerator, report: Report, check: int | None) -> None:
    """Run the teacher, as `run` says."""
    teacher_pass: TeacherPass = stages.embedding(recipe.stage).TeacherPass(recipe, accelerator)
    if check is not None:
        _check(recipe, teacher_pass, accelerator, report, check)
        return accelerator.end_training()
    root = Path(recipe.embed.to)
    # One process repairs, because two would cut the same tail.
    lines = on_main(accelerator, partial(open_store, recipe, root, teacher_pass, report))
    report.header(f"embed   {recipe.name}   {describe_hardware(accelerator)}", lines)
    started = time.monotonic()
    with StoreWriter(root, accelerator.process_index) as writer:
        # Every rank writes as soon as it starts; what is done must be read before anyone adds to it.
        accelerator.wait_for_everyone()
        embedded = sum(_embed(recipe, dataset, teacher_pass, writer, accelerator) for dataset in teacher_pass.datasets)
    # A rank that finished early must learn that another was stopped: the store is not complete then.
    counts = torch.tensor([embedded, int(STOP.asked)], device=accelerator.device)
    embedded, asked = accelerator.reduce(counts).tolist()
    if asked:
        report.say(f"asked to stop: {embedded:,} records made now are kept; the same command resumes from there")
        accelerator.end_training()
        sys.exit(STOPPED)
    on_main(accelerator, partial(close_store, root, teacher_pass, embedded, started, report))
    # A rank that exits with the group still up can be aborted by the group's own threads.
    accelerator.end_training()


def open_store(recipe: FeatureRecipe, root: Path, teacher_pass: TeacherPass, report: Report) -> dict[str, str]:
    """Make the store ready for all ranks to write; return lines for the header."""
    create_store(
        root, teacher_pass.fields(), teacher_pass.description(), expected=sum(map(len, teacher_pass.datasets))
    )
    for shard, records in repair_store(root).items():
        report.say(f"{shard}: {records} torn records of an interrupted pass cut off, they are made again")
    lines = teacher_pass.describe() | {"store": str(root)} | plan(recipe, root, teacher_pass)
    return lines | needs.header_lines(recipe, ("train", "merge", "evaluate"))


def close_store(root: Path, teacher_pass: TeacherPass, embedded: int, started: float, report: Report) -> None:
    """Complete the store once all ranks have written their records, `embedded` in all, and report what is in it."""
    refuse_many_skipped(teacher_pass.datasets, root, teacher_pass.max_unreadable)
    # From what was stored, not from what was computed: students learn from the stored values, rounding included.
    parts = [len(dataset) for dataset in teacher_pass.datasets]
    keys = (key for some in record_keys(teacher_pass.datasets) for key in some)
    manifest = finish_store(root, keys, _statistics(root, teacher_pass), parts)
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in root.glob("*.bin"))
    report.say(
        f"{manifest.records:,} records, {size / 1e9:.2f} GB in {root} ({embedded:,} made now, "
        f"{embedded / seconds:.3g} records/s, {len(manifest.skipped)} skipped)"
    )
    for entry in manifest.skipped[:10]:
        report.say(f"  skipped {entry['key']}: {entry['reason']}")
    report.say(f"next: train with the same recipe. Look inside: effsam3 store show {root}")


def record_keys(datasets: Iterable[StoredSamples]) -> Iterator[list[str]]:
    """Yield the keys of all records, in order, as many at a time as may be in memory."""
    return (dataset.record_keys(some) for dataset in datasets for some in blocks(len(dataset)))


def plan(recipe: FeatureRecipe, root: Path, teacher_pass: TeacherPass) -> dict[str, str]:
    """Return what is to be made, as lines for the header.

    Raises:
        UserError: the disk cannot hold it.
    """
    reader = StoreReader(root, allow_unfinished=True)
    total = missing = replaced = 0
    examples: list[str] = []
    for keys in record_keys(teacher_pass.datasets):
        absent = reader.missing(keys)
        names = reader.replaced(absent)
        total, missing, replaced = total + len(keys), missing + len(absent), replaced + len(names)
        examples = [*examples, *names][:3]
    needed = missing * reader.manifest.stride
    refuse_full_disk(
        root,
        needed,
        f"{missing:,} records of {reader.manifest.stride:,} bytes",
        f"{teacher_pass.less_room}data.limit=N takes fewer, teacher=online none; or name another disk with embed.to",
    )
    line = f"{missing:,} of {total:,} records, {gigabytes(needed)}; {gigabytes(free_bytes(root))} are free"
    if replaced:
        line += f"; {replaced:,} of them for what was replaced since, such as {', '.join(examples)}"
    return {"to make": line} | ({} if reader.manifest.ties_inputs else {"note": untied(root)})


def _embed(
    recipe: FeatureRecipe,
    dataset: StoredSamples,
    teacher_pass: TeacherPass,
    writer: StoreWriter,
    accelerator: Accelerator,
) -> int:
    """Write this rank's share of a dataset's missing records; return how many."""

    def mine() -> Iterator[int]:
        # Only missing records are divided, so that a resumed pass keeps all ranks busy.
        return islice(_missing(dataset, writer), accelerator.process_index, None, accelerator.num_processes)

    shown = accelerator.is_main_process and sys.stderr.isatty()
    bar = tqdm(total=sum(1 for _ in mine()) if shown else None, unit="record", desc="embed", disable=not shown)
    positions = mine()
    batches = iter(lambda: list(islice(positions, recipe.embed.batch_size)), [])
    written, checked = 0, False
    # One thread writes while the teacher works on the next batch; waiting for it here bounds the memory to two
    # batches.
    with ThreadPoolExecutor(1) as disk, bar:
        pending: Future | None = None
        for batch in loader(dataset, batches, recipe.data.workers, pin=False):
            if STOP.asked:
                break
            feat_BCHW = teacher_pass.features(batch, check=not checked).cpu()
            # Once is enough: a wrong teacher gives itself away in the first batch.
            checked = True
            if pending is not None:
                written += pending.result()
            pending = disk.submit(_write, teacher_pass, dataset, batch, feat_BCHW, writer)
            bar.update(len(batch["positions"]))
        if pending is not None:
            written += pending.result()
    return written


def _missing(dataset: StoredSamples, writer: StoreWriter) -> Iterator[int]:
    """Yield the positions whose records were not there when the writer was made."""
    for some in blocks(len(dataset)):
        yield from (some.start + np.flatnonzero(writer.done.find(dataset.record_keys(some)) < 0)).tolist()


def _write(
    teacher_pass: TeacherPass, dataset: StoredSamples, batch: Batch, feat_BCHW: torch.Tensor, writer: StoreWriter
) -> int:
    unreadable = dict(batch["unreadable"])
    written = 0
    positions = batch["positions"].tolist()
    keys = zip(dataset.names(positions), dataset.record_keys(positions), strict=True)
    for place, (name, key) in enumerate(keys):
        if name in unreadable:
            writer.skip(key, unreadable[name])
        else:
            writer.write(key, teacher_pass.record(batch, place, feat_BCHW[place], name))
            written += 1
    return written


def refuse_many_skipped(datasets: Sequence[StoredSamples], root: Path, most: int) -> None:
    """Leave the store unfinished when too much is missing: more likely a lost disk than that many bad images.

    Raises:
        StoreError: more than `data.max_unreadable` samples are not in the store.
    """
    reader = StoreReader(root, allow_unfinished=True)
    missing = [key for keys in record_keys(datasets) for key in reader.missing(keys)]
    if len(missing) > most:
        raise StoreError(
            f"{len(missing)} of {sum(map(len, datasets))} images could not be read, more than "
            f"data.max_unreadable={most} (first: {', '.join(missing[:3])}); see {root}/skipped-*.tsv. Repair them and "
            "embed again: it makes what is missing"
        )


def _statistics(root: Path, teacher_pass: TeacherPass) -> dict:
    """Per-channel mean and deviation over a fixed sample of the training data, from what was stored."""
    reader = StoreReader(root, allow_unfinished=True)
    train = teacher_pass.datasets[0]
    sample = stored_sample(reader, train, SAMPLE)
    if not sample:
        raise StoreError(
            f"none of the {len(train)} training samples could be embedded; {root}/skipped-*.tsv gives the reasons"
        )
    statistics = FeatureStatistics(teacher_pass.channels)
    for position in sample:
        statistics.update(*teacher_pass.stored(reader, train, [position]))
    return statistics.result()


def stored_sample(reader: StoreReader, dataset: StoredSamples, size: int) -> list[int]:
    """Return the first `size` positions of the statistics' fixed order whose images are in the store."""
    # A fixed order by key, so that any number of ranks and restarts yields the same statistics.
    asked = size
    while True:
        order = dataset.sample(asked)
        places = reader.find(dataset.record_keys(order))
        found = [position for position, place in zip(order, places, strict=True) if place >= 0]
        if len(found) >= size or len(order) == len(dataset):
            return found[:size]
        asked *= 2  # some of them were skipped


def _check(
    recipe: FeatureRecipe, teacher_pass: TeacherPass, accelerator: Accelerator, report: Report, samples: int
) -> None:
    """Recompute `samples` records and compare them with the store."""
    reader = StoreReader(recipe.embed.to)
    if not reader.manifest.ties_inputs:
        report.say(untied(recipe.embed.to))
    skipped = {entry["key"] for entry in reader.manifest.skipped}
    for keys in record_keys(teacher_pass.datasets):
        # Raises when the index has images that the store lacks: comparing only common ones would hide that.
        reader.positions([key for key in keys if key not in skipped])
    dataset = teacher_pass.datasets[0]
    positions = stored_sample(reader, dataset, samples)
    worst = 1.0
    for batch in loader(dataset, [[position] for position in positions], 0, pin=False):
        (key,) = dataset.names(batch["positions"].tolist())
        if batch["unreadable"]:
            raise UserError(f"{key} is stored but can no longer be read: {batch['unreadable'][0][1]}")
        made = teacher_pass.features(batch).cpu()
        stored, valid = teacher_pass.stored(reader, dataset, [int(batch["positions"][0])])
        # A single text is padded to its own length, a record to the longest; padding counts on neither side.
        made, stored = (feat[..., : made.shape[-1]] * valid[..., : made.shape[-1]] for feat in (made, stored))
        cosine = float(F.cosine_similarity(made.flatten(1), stored.flatten(1)))
        worst = min(worst, cosine)
        report.say(f"{key}  cosine {cosine:.6f}  largest difference {float((made - stored).abs().max()):.4g}")
    report.say(f"{len(positions)} of {len(reader):,} records recomputed; lowest cosine {worst:.6f}")
    if worst < CHECK_COSINE:
        raise StoreError(
            f"the store at {recipe.embed.to} does not hold this teacher's features of these samples (cosine "
            f"{worst:.4f}, expected {CHECK_COSINE} or more); embed again to another embed.to"
        )
