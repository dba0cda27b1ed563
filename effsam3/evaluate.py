# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: measure a merged model beside its teacher, and draw what both see.

python scripts/evaluate.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from effsam3.benchmarks.fidelity import feature_fidelity
from effsam3.benchmarks.masks import prompted_mask_quality
from effsam3.benchmarks.measurable import measurable
from effsam3.benchmarks.models import load_pair
from effsam3.benchmarks.pictures.images import draw
from effsam3.benchmarks.speed import speed
from effsam3.benchmarks.text import load_text_features, plot_similarity, text_similarity, text_speed
from effsam3.benchmarks.vos import vos, vos_table, write_objects
from effsam3.data.captions.sources import open_captions
from effsam3.data.images.features import ImageFeatures
from effsam3.data.images.sa1b import load_index
from effsam3.data.loader import loader
from effsam3.data.sampler import sequential_batches
from effsam3.data.videos.sav import VIDEO_FPS
from effsam3.data.videos.sav import load_index as load_videos
from effsam3.data.videos.vos import SavFile, VosVideo, open_vos
from effsam3.errors import UserError
from effsam3.hardware.accelerator import refuse_missing_gpu
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import elements, load_part, read_config
from effsam3.models.chassis.tiny import MADE_UP
from effsam3.models.inference.prompted import load_tracker
from effsam3.models.memory.slot import tracker_config
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors, in_mode
from effsam3.models.memory.training import read_tracker_tensors
from effsam3.models.merging.slots import read_card
from effsam3.models.text.student import TextTeacher, fold_repmixer
from effsam3.models.text.tokens import Tokenizer
from effsam3.publish.release import recipes_by_slot
from effsam3.training.report import Report, provenance, table, write_json, write_text


def run(recipe) -> dict:
    """Run the recipe's benchmarks on held-out data; returns what it writes to `runs/<name>/eval`.

    A release runs the benchmarks of every part's own recipe on the release's model; their names begin with the slot's.

    What the data do not allow is left out, and the summary says so.

    Raises:
        UserError: there is no merged model yet, it has no student where the recipe measures one, or nothing can be
            measured.
    """
    refuse_missing_gpu(recipe.hardware)
    folder = recipe.folder
    if not (folder / "merged" / "config.json").is_file():
        raise UserError(f"{folder}/merged is not there; run `effsam3 merge` first")
    # What was merged is what is measured, whatever has been changed in the recipe since.
    merged = read_card(folder / "merged", {"chassis": str, "revision": (str, None)})
    asked, unmeasured = recipes_by_slot(recipe)
    for slot in asked.keys() - merged["slots"].keys():
        raise UserError(
            f"{folder}/merged has no student in the slot {slot} (it has {', '.join(merged['slots']) or 'none'}); "
            "evaluate a recipe of that stage, or merge again"
        )
    if merged["chassis"] == merged.get("imported"):  # its own chassis: the recipe says against which it is measured
        merged |= {"chassis": recipe.sam3.checkpoint, "revision": recipe.sam3.revision}
    report = Report(folder)
    chassis = chassis_folder(merged["chassis"], merged["revision"])
    made_by = provenance() | {key: merged[key] for key in ("chassis", "slots", "weights") if key in merged}
    (folder / "eval").mkdir(exist_ok=True)
    results, tables, pictures, left_out = {}, [], [], []
    for slot, own in asked.items():
        benchmarks, tables_of = BENCHMARKS[slot]
        prefix = "" if own is recipe else f"{slot}_"
        found = {}
        for name, result in benchmarks(own, folder, chassis, merged):
            if name == "pictures":
                pictures += result
                continue
            if name == "left out":
                left_out += result
                continue
            found[name] = results[prefix + name] = result
            write_json(folder / "eval" / f"{prefix}{name}.json", result | {"provenance": made_by})
        tables += tables_of(found)
    summary = summarise([*tables, *left_out], merged)
    write_text(folder / "eval" / "summary.md", summary + "\n")
    report.say(summary)
    for line in unmeasured:
        report.say(f"\n{line}")
    if pictures:
        report.say(f"\n{len(pictures)} pictures in {folder / 'pictures'}")
    report.say(f"numbers in {folder}/eval/*.json, this table in {folder / 'eval' / 'summary.md'}")
    return results


def image_benchmarks(recipe, folder: Path, chassis: Path, merged: dict):
    """Yield (name, result) as they are made, pictures last."""
    index_path, asked = Path(recipe.data.index), recipe.evaluate
    index = load_index(index_path, "val", recipe.data.limit)
    measured, left_out = measurable(recipe)
    yield "left out", left_out
    pair = load_pair(chassis, folder / "merged")
    rows = index.select(range(min(asked.max_images, len(index))))
    images = ImageFeatures(rows, index_path.parent, pair.image_size, recipe.data.resize)
    batches = sequential_batches(len(images), recipe.embed.batch_size, 0, 1)
    held_out = loader(images, batches, recipe.data.workers, pin=False)
    if not pair.mean_C.any():  # an imported student brings no statistics of the teacher's features
        pair = pair.with_statistics(held_out)
    if "fidelity" in measured:
        yield "fidelity", feature_fidelity(pair, held_out)
    if "masks" in measured:
        yield (
            "masks",
            prompted_mask_quality(
                pair, index, index_path.parent, asked.prompts, asked.max_images, asked.masks_per_image
            ),
        )
    if "speed" in measured:
        yield "speed", speed(pair, {"teacher": elements(chassis), "student": elements(folder / "merged")})
    # Masks of random weights are noise: they are measured, for how far both agree, but not worth a look.
    with_masks = "masks" in measured and merged["chassis"] not in MADE_UP
    yield "pictures", draw(pair, index, index_path.parent, asked.pictures, folder / "pictures", with_masks)


def text_benchmarks(recipe, folder: Path, chassis: Path, merged: dict):
    """Yield (name, result) as they are made, pictures last."""
    teacher, student = TextTeacher(chassis), load_text_features(folder / "merged")
    asked, data = recipe.evaluate, recipe.data
    measured, left_out = measurable(recipe)
    yield "left out", left_out
    if "similarity" in measured:
        phrases, phrase_column = data.phrases, data.phrase_column
        if asked.phrases is not None:
            phrases, phrase_column = (asked.phrases,), asked.phrase_column
        captions = open_captions(
            data.captions,
            data.column,
            phrases,
            data.phrase_share,
            held_out=data.held_out,
            limit=data.limit,
            phrase_column=phrase_column,
        )
        encode = partial(Tokenizer().encode, context_length=data.context_length)
        result = {}
        for source in ("captions", "phrases"):
            part = captions.only("val", source)
            if len(part) > 1:
                texts = part.texts(range(min(len(part), asked.max_captions)))
                result[source] = text_similarity(teacher, student, encode, texts)
        yield "similarity", result
        picture = folder / "pictures" / "similarity.png"
        picture.parent.mkdir(exist_ok=True)
        plot_similarity(result, picture)
    if "speed" in measured:
        yield "speed", text_speed(teacher, fold_repmixer(student))
    if "similarity" in measured:
        yield "pictures", [picture]


def image_tables(results: dict) -> list[str]:
    """The image benchmarks' results as Markdown."""
    parts = []
    if (fidelity := results.get("fidelity")) is not None:
        rows = [
            ["student", *(f"{fidelity[name]:.4f}" for name in ("cosine", "cosine_centred", "mse", "neck"))],
            ["mean of the features", f"{fidelity['cosine_of_mean']:.4f}", "0.0000", "1.0000", "-"],
        ]
        header = [f"features, {fidelity['images']} held-out images", "cosine", "centred cosine", "mse", "neck error"]
        parts.append(table(rows, header))
    if (masks := results.get("masks")) is not None:
        rows = []
        for prompt in (prompt for prompt in ("box", "point") if prompt in masks):
            for label, group in [
                (prompt, masks[prompt]),
                *((f"{prompt}, {s}", g) for s, g in masks[prompt]["by_size"].items()),
            ]:
                rows.append(
                    [
                        label,
                        str(group["masks"]),
                        *(f"{100 * group[name]:.1f}" for name in ("student", "teacher", "agreement")),
                    ]
                )
        header = [f"masks, {masks['images']} images, mIoU in %", "masks", "student", "teacher", "student vs teacher"]
        parts.append(table(rows, header))
    if (timing := results.get("speed")) is not None:
        rows = [
            [
                f"{name}, {timing['image_size'][name]} px",
                f"{timing[name]['trunk_parameters'] / 1e6:.2f} M",
                f"{timing[name]['trunk_ms']:.1f}",
                f"{timing[name]['trunk_images_per_s']:.1f}",
                f"{timing[name]['model_parameters'] / 1e6:.2f} M",
                f"{timing[name]['model_ms']:.1f}",
                f"{timing[name]['model_images_per_s']:.1f}",
            ]
            for name in ("teacher", "student")
        ]
        timed = (
            "trunk_parameters",
            "trunk_ms",
            "trunk_images_per_s",
            "model_parameters",
            "model_ms",
            "model_images_per_s",
        )
        rows.append(["gain", *(f"{timing['ratio'][name]:.2f}x" for name in timed)])
        header = [
            f"speed on {timing['device']}",
            "trunk",
            "ms",
            f"images/s (x{timing['batch']})",
            "whole model",
            "ms",
            "images/s",
        ]
        parts.append(table(rows, header))
    return parts


def text_tables(results: dict) -> list[str]:
    """The text benchmarks' results as Markdown."""
    parts = []
    if (similarity := results.get("similarity")) is not None:
        names = ("cosine", "cosine_centred", "pooled_cosine", "retrieval", "neighbour_agreement")
        rows = [[name, str(one["texts"]), *(f"{one[key]:.4f}" for key in names)] for name, one in similarity.items()]
        header = ["held-out texts", "texts", "cosine", "centred cosine", "pooled", "retrieval", "same neighbour"]
        parts.append(table(rows, header))
    if (timing := results.get("speed")) is not None:
        timed = ("8_tokens_ms", "32_tokens_ms", "8_tokens_captions_per_s", "32_tokens_captions_per_s")
        rows = [
            [name, f"{timing[name]['parameters'] / 1e6:.2f} M", *(f"{timing[name][key]:.1f}" for key in timed)]
            for name in ("teacher", "student")
        ]
        rows.append(["gain", *(f"{timing['ratio'][key]:.2f}x" for key in ("parameters", *timed))])
        header = [
            f"text on {timing['device']}",
            "parameters",
            "ms, 8 tokens",
            "32 tokens",
            "texts/s, 8 tokens",
            "32 tokens",
        ]
        parts.append(table(rows, header))
    return parts


def memory_benchmarks(recipe, folder: Path, chassis: Path, merged: dict):
    """Yield (name, result) as they are made, pictures last."""
    asked, data = recipe.evaluate, recipe.data
    if asked.videos is not None:
        videos = open_vos(asked.videos, split=asked.split)
    else:
        rows, root = load_videos(Path(data.index), "val", data.limit), Path(data.index).parent
        videos = [
            VosVideo(row["key"], root / row["video_file"], SavFile(root / row["annotation_file"]), VIDEO_FPS)
            for row in rows
        ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trackers = {f"{merged['chassis']}, dense": load_tracker(chassis).to(device)}
    student = load_tracker(folder / "merged").to(device)
    if isinstance(student, EfficientTracker):
        trackers |= {f"{student.config.memory_mode}, trained": student}
        trackers |= {f"{mode}, same weights": in_mode(student, mode) for mode in asked.modes}
        if asked.untrained:
            config = tracker_config(read_config(chassis).tracker_config, recipe.memory)
            start = efficient_tracker_tensors(read_tracker_tensors(chassis), config, seed=recipe.train.seed)
            untrained = load_part(EfficientTracker, config, start).float().to(device)
            trackers |= {f"{config.memory_mode}, untrained": untrained}
    else:
        trackers |= {"dense, trained": student}
    result = vos(
        trackers,
        videos[: asked.max_videos],
        asked.evaluator,
        appearing_later=asked.appearing_later,
        predictions=folder / "eval" / "predictions" if asked.predictions else None,
        pictures=folder / "pictures",
        max_pictures=asked.pictures,
    )
    result["available"] = len(videos)
    write_objects(result, folder / "eval" / "objects.csv")
    yield "vos", result
    yield "pictures", sorted((folder / "pictures").glob("*.png"))


def memory_tables(results: dict) -> list[str]:
    """The video benchmark's results as Markdown."""
    result = results["vos"]
    parts, tracked = [vos_table(result)], result["videos"] + len(result["failed"])
    if tracked < result["available"]:
        parts.append(f"The first {tracked} of {result['available']} videos (evaluate.max_videos).")
    return parts


def summarise(tables: list[str], merged: dict) -> str:
    """The tables under a title; `merged` is the model's effsam3.json."""
    filled = ", ".join(f"{slot['student']} in the slot `{name}`" for name, slot in merged["slots"].items())
    parts = [f"# {filled} of {merged['chassis']}", *tables]
    if merged["chassis"] in MADE_UP:
        parts.append(
            f"The chassis `{merged['chassis']}` has random weights: its features and masks mean nothing, only how "
            "near the student comes to them."
            + (" It is smaller than any student, too: no speed is gained." if merged["chassis"] == "tiny" else "")
        )
    return "\n\n".join(parts)


# slot -> what is measured in it: a generator of (name, result), and the tables of all results
BENCHMARKS = {
    "image": (image_benchmarks, image_tables),
    "text": (text_benchmarks, text_tables),
    "memory": (memory_benchmarks, memory_tables),
}
