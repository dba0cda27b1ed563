# SPDX-License-Identifier: Apache-2.0
"""The verb `show`: the resolved recipe and the numbers that follow from it, without reading data.

`show` itself goes without torch; `budget` measures, and takes a few seconds, for stage 2 up to a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from effsam3.checked_files import read_json
from effsam3.errors import RecipeError, UserError, did_you_mean
from effsam3.hardware.accelerate_configs import layout_file, layout_processes
from effsam3.models.image.backbones import image_student
from effsam3.models.memory.token_counts import CHANNELS, FRAMES, POINTERS, count_tokens
from effsam3.models.registry import TEACHER, chassis_facts, head_params, text_student_row
from effsam3.recipe.reader import accumulation, dump_recipe, flat, load_recipe, total_steps, warmup_steps

PAGE, SMALL, LINE = 4096, 64 << 10, 64  # a store pads records to whole pages, small ones to cache lines
CONTEXT_LENGTH = 32  # positions of a text student: what transformers' SAM 3 processors pad every prompt to
BYTES = {"float16": 2, "int8": 1}


def show(recipe: Any, key: str | None = None) -> str:
    """Return the recipe as YAML followed by the derived numbers as YAML comments, or the value of one dotted key.

    Raises:
        UserError: there is no such key, or a number cannot be derived because keys contradict the layout or the data.
    """
    if key is not None:
        values = flat(recipe)
        if key not in values:
            raise UserError(f"--key: the recipe has no {key}{did_you_mean(key, values)}")
        value = values[key]
        return " ".join(value) if isinstance(value, tuple) and value and isinstance(value[0], str) else str(value)
    lines = [f"# {title:<9} {_known(number, recipe)}" for title, number in DERIVED[recipe.stage].items()]
    return dump_recipe(recipe) + "\n" + "\n".join(lines)


def budget(recipe: Any, device_gib: float | None = None) -> str:
    """Return what the training takes of a device's memory and of the disk as YAML comments.

    Raises:
        UserError: there is no such layout, or `device_gib` is not above 0.
    """
    if device_gib is not None and not device_gib > 0:
        raise UserError(f"--device-gib: {device_gib:g} is not above 0")
    if recipe.stage == "release":
        return "# device    nothing is trained here; the recipes of its parts say what theirs takes"
    from effsam3.hardware.budget.estimates import table

    text = _known(partial(table, device_gib=device_gib), recipe)
    if text.startswith("unknown"):
        text = f"device    {text}"
    return "\n".join(f"# {line}" for line in text.splitlines())


def _known(number: Callable[[Any], str], recipe: Any) -> str:
    try:
        return number(recipe)
    except RecipeError:
        raise
    except UserError as error:  # something is not on this machine yet: the other numbers still hold
        return f"unknown yet: {error}"


def _layout(recipe: Any) -> str:
    file = layout_file(recipe.hardware)
    return f"{file}, processes: {layout_processes(file)}"


def _batch(recipe: Any) -> str:
    processes = layout_processes(layout_file(recipe.hardware))
    micros = accumulation(recipe, processes)
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    return f"{batch} = {micro} per process x {processes} (processes) x {micros} (accumulated)"


def image_counts(recipe: Any) -> dict[str, int]:
    """Return how many images of each split the recipe uses, from the report that was written beside the index.

    Raises:
        UserError: there is no report.
    """
    report = Path(recipe.data.index.removesuffix(".parquet") + ".report.json")
    if not report.is_file():
        if recipe.data.source == "synthetic":
            raise UserError(f"{recipe.data.synthetic_images} images will be drawn by embed or train")
        if recipe.data.source == "folder":
            raise UserError(f"the photographs in {recipe.data.folder} will be indexed by embed or train")
        raise UserError(f"no {report}; make it with: python scripts/index_sa1b.py FOLDER --out {recipe.data.index}")
    counts = read_json(report, {"images": {"train": int, "val": int}}, "make the index again")["images"]
    return {split: min(counts[split], recipe.data.limit or counts[split]) for split in ("train", "val")}


def _images(recipe: Any) -> str:
    counts = image_counts(recipe)
    return f"{counts['train']:,} to learn from, {counts['val']:,} held out"


def _length(recipe: Any) -> str:
    images = image_counts(recipe)["train"]
    steps, warmup = total_steps(recipe, images), warmup_steps(recipe, images)
    epochs = steps * recipe.train.global_batch_size / images
    return f"{steps:,} steps = {epochs:.1f} epochs, {warmup:,} steps of them warm-up"


def _student(recipe: Any) -> str:
    facts = chassis_facts(recipe.sam3.checkpoint)
    seen = recipe.student_image_size or facts.image_size
    student = image_student(recipe.student, seen)
    head = head_params(recipe.head, student.channels, _channels(recipe))
    total = student.trunk_params + head
    saved = 100 * (1 - total / facts.trunk_params)
    verdict = f"{abs(saved):.2f} % {'fewer' if saved > 0 else 'more'} than the {facts.trunk_params:,} they replace"
    counts = f"{student.trunk_params:,} trunk + {head:,} {recipe.head} head = {total:,} parameters, {verdict}"
    return counts if seen == facts.image_size else f"{counts}; sees {seen} px instead of {facts.image_size}"


def _channels(recipe: Any) -> int:
    facts = chassis_facts(recipe.sam3.checkpoint)
    return facts.hidden_size if recipe.embed.tap == "trunk" else facts.fpn_hidden_size


def record_bytes(recipe: Any) -> int:
    """Return the bytes that one image takes in the store, padding included.

    Raises:
        UserError: the sizes of the recipe's SAM 3 are not known.
    """
    facts, channels = chassis_facts(recipe.sam3.checkpoint), _channels(recipe)
    grid = recipe.embed.grid or facts.grid
    payload = channels * grid * grid * BYTES[recipe.embed.dtype]
    if recipe.embed.dtype == "int8":
        payload += 4 * channels  # one float32 scale per channel
    if recipe.embed.pixels:
        payload += 3 * facts.image_size**2 + 2 * 4  # uint8 image and its size before padding
    unit = PAGE if payload >= SMALL else LINE
    return -(-payload // unit) * unit


def _store(recipe: Any) -> str:
    if recipe.teacher == "online":
        return "none: the teacher runs beside the student"
    size = record_bytes(recipe)
    grid = recipe.embed.grid or chassis_facts(recipe.sam3.checkpoint).grid
    text = f"{size:,} bytes per image ({_channels(recipe)} x {grid} x {grid} {recipe.embed.dtype}"
    text += " and pixels)" if recipe.embed.pixels else ")"
    try:
        total = size * sum(image_counts(recipe).values())
    except UserError:
        return text
    return f"{text}, {total / 1e9:,.2f} GB in all"


def _text_length(recipe: Any) -> str:
    if recipe.train.steps is None:
        raise UserError("the captions are counted when they are opened; embed or train prints the steps")
    return f"{recipe.train.steps:,} steps of {recipe.train.global_batch_size} texts"


def _text_student(recipe: Any) -> str:
    row = text_student_row(recipe.student)
    total = row.params(CONTEXT_LENGTH, chassis_facts(recipe.sam3.checkpoint).fpn_hidden_size)
    text = f"{total:,} parameters with {CONTEXT_LENGTH} positions and the projector"
    if recipe.sam3.checkpoint == "tiny":
        return text
    return f"{text}, {100 * (1 - total / TEACHER.text):.2f} % fewer than the {TEACHER.text:,} they replace"


def _text_store(recipe: Any) -> str:
    if recipe.teacher == "online":
        return "none: the teacher runs beside the student"
    channels = chassis_facts(recipe.sam3.checkpoint).fpn_hidden_size
    size = recipe.data.context_length * channels * 2 + 4  # float16 features and the number of tokens
    return f"{-(-size // LINE) * LINE:,} bytes per text ({recipe.data.context_length} x {channels} float16)"


def _videos(recipe: Any) -> str:
    data = recipe.data
    report = Path(data.index.removesuffix(".parquet") + ".report.json")
    clip = f"clips of {data.frames} frames, at most {data.objects} objects"
    if not report.is_file():
        if data.source == "synthetic":
            raise UserError(f"{data.synthetic_videos} videos will be drawn by train; {clip}")
        raise UserError(f"no {report}; make it with: python scripts/index_sav.py FOLDER --out {data.index}")
    counts = read_json(report, {"videos": {"train": int, "val": int}}, "make the index again")["videos"]
    return f"{counts['train']:,} to learn from, {counts['val']:,} held out; {clip}"


def _memory_length(recipe: Any) -> str:
    return f"{recipe.train.steps:,} steps of {recipe.train.global_batch_size} clips" if recipe.train.steps else ""


def _memory(recipe: Any) -> str:
    asked, facts = recipe.memory, chassis_facts(recipe.sam3.checkpoint)
    count = partial(
        count_tokens,
        grid=facts.grid,
        pool=asked.pool,
        latents=asked.global_latents + asked.window_latents,
        hot_frames=asked.hot_frames,
        pointer_tokens=facts.fpn_hidden_size // CHANNELS,
    )
    read = f"{count(asked.mode):,} tokens of {FRAMES} frames and {POINTERS} pointers"
    return f"{asked.mode}: {read}, {count('dense'):,} when dense"


PARTS = {"image": _student, "text": _text_student, "memory": _memory}  # slot -> what is said of its student


def _part(slot: str, recipe: Any) -> str:
    """Say who fills a slot of a release, as far as that run or model is there."""
    folder = recipe.parts.filled().get(slot)
    if folder is None:
        return "SAM 3's own"
    if (folder / "recipe.yaml").is_file():
        trained = load_recipe(folder / "recipe.yaml")
        return f"{folder}: {trained.student}, {PARTS[slot](trained)}"
    for made in (folder / "effsam3.json", folder / "merged" / "effsam3.json"):
        if made.is_file():
            slots = read_json(made, {"slots": {str: {"student": str}}}, "merge or import the model again")["slots"]
            return f"{made.parent}: {slots[slot]['student'] if slot in slots else 'no student in this slot'}"
    raise UserError(f"there is no run and no model in {folder}")


DERIVED = {
    "image": {
        "layout": _layout,
        "batch": _batch,
        "images": _images,
        "length": _length,
        "student": _student,
        "store": _store,
    },
    "text": {
        "layout": _layout,
        "batch": _batch,
        "length": _text_length,
        "student": _text_student,
        "store": _text_store,
    },
    "memory": {
        "layout": _layout,
        "batch": _batch,
        "videos": _videos,
        "length": _memory_length,
        "memory": _memory,
    },
    "release": {"layout": _layout} | {slot: partial(_part, slot) for slot in PARTS},
}
