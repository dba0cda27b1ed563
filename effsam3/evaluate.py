# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: measure a merged model beside its teacher, and draw what both see.

python scripts/evaluate.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from effsam3.benchmarks.fidelity import feature_fidelity
from effsam3.benchmarks.masks import prompted_mask_quality
from effsam3.benchmarks.models import load_pair
from effsam3.benchmarks.pictures import draw
from effsam3.benchmarks.speed import speed
from effsam3.benchmarks.text import load_text_features, plot_similarity, text_similarity, text_speed
from effsam3.data.captions import open_captions
from effsam3.data.image_features import ImageFeatures
from effsam3.data.loader import loader
from effsam3.data.sa1b import load_index
from effsam3.data.sampler import sequential_batches
from effsam3.errors import UserError
from effsam3.models.sam3 import chassis_folder, elements
from effsam3.models.text import TextTeacher, fold_repmixer
from effsam3.models.tiny import MADE_UP
from effsam3.models.tokens import Tokenizer
from effsam3.report import Report, provenance, table, write_json, write_text


def run(recipe) -> dict:
    """Run the recipe's benchmarks on held-out data; returns what it writes to `runs/<name>/eval`.

    Raises:
        UserError: there is no merged model yet, or prompts are asked for and no held-out image has annotations.
    """
    folder = Path(recipe.train.runs) / recipe.name
    if not (folder / "merged" / "config.json").is_file():
        raise UserError(f"{folder}/merged is not there; run `effsam3 merge` first")
    report = Report(folder)
    # What was merged is what is measured, whatever has been changed in the recipe since.
    merged = json.loads((folder / "merged" / "effsam3.json").read_text())
    chassis = chassis_folder(merged["chassis"], merged["revision"])
    made_by = provenance() | {"chassis": merged["chassis"], "slots": merged["slots"]}
    results, pictures = {}, []
    benchmarks = {"image": _image_benchmarks, "text": _text_benchmarks}[recipe.stage]
    for name, result in benchmarks(recipe, folder, chassis, merged):
        if name == "pictures":
            pictures = result
            continue
        results[name] = result
        (folder / "eval").mkdir(exist_ok=True)
        write_json(folder / "eval" / f"{name}.json", result | {"provenance": made_by})
    summary = summarise(results, merged)
    write_text(folder / "eval" / "summary.md", summary + "\n")
    report.say(summary)
    if pictures:
        report.say(f"\n{len(pictures)} pictures in {folder / 'pictures'}")
    report.say(f"numbers in {folder}/eval/*.json, this table in {folder / 'eval' / 'summary.md'}")
    return results


def _image_benchmarks(recipe, folder: Path, chassis: Path, merged: dict):
    """Yield (name, result) as they are made, pictures last."""
    index_path, asked = Path(recipe.data.index), recipe.evaluate
    index = load_index(index_path, "val", recipe.data.limit)
    if "masks" in asked.benchmarks and not any(index["num_masks"]):
        raise UserError(
            f"evaluate.benchmarks has `masks`, but no held-out image of {index_path} has annotations; leave `masks` "
            "out (evaluate.benchmarks=[fidelity,speed]), or index images with their sa_*.json"
        )
    pair = load_pair(chassis, folder / "merged")
    if "fidelity" in asked.benchmarks:
        rows = index.select(range(min(asked.max_images, len(index))))
        images = ImageFeatures(rows, index_path.parent, pair.image_size, recipe.data.resize)
        batches = sequential_batches(len(images), recipe.export.batch_size, 0, 1)
        yield "fidelity", feature_fidelity(pair, loader(images, batches, recipe.data.workers, pin=False))
    if "masks" in asked.benchmarks:
        yield (
            "masks",
            prompted_mask_quality(
                pair, index, index_path.parent, asked.prompts, asked.max_images, asked.masks_per_image
            ),
        )
    if "speed" in asked.benchmarks:
        yield "speed", speed(pair, {"teacher": elements(chassis), "student": elements(folder / "merged")})
    # Masks of random weights are noise: they are measured, for how far both agree, but not worth a look.
    with_masks = "masks" in asked.benchmarks and merged["chassis"] not in MADE_UP
    yield "pictures", draw(pair, index, index_path.parent, asked.pictures, folder / "pictures", with_masks)


def _text_benchmarks(recipe, folder: Path, chassis: Path, merged: dict):
    """Yield (name, result) as they are made, pictures last."""
    teacher, student = TextTeacher(chassis), load_text_features(folder / "merged")
    asked, data = recipe.evaluate, recipe.data
    if "similarity" in asked.benchmarks:
        if data.streaming:
            raise UserError("evaluate reads held-out texts from disk; fetch captions and set data.streaming=false")
        phrases = data.phrases if asked.phrases is None else (asked.phrases,)
        captions = open_captions(
            data.captions, data.column, phrases, data.phrase_share, held_out=data.held_out, limit=data.limit
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
    if "speed" in asked.benchmarks:
        yield "speed", text_speed(teacher, fold_repmixer(student))
    if "similarity" in asked.benchmarks:
        yield "pictures", [picture]


def summarise(results: dict, merged: dict) -> str:
    """The results as Markdown tables; `merged` is the model's effsam3.json."""
    filled = ", ".join(f"{slot['student']} in the slot `{name}`" for name, slot in merged["slots"].items())
    parts = [f"# {filled} of {merged['chassis']}"]
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
    if (similarity := results.get("similarity")) is not None:
        names = ("cosine", "cosine_centred", "pooled_cosine", "retrieval", "neighbour_agreement")
        rows = [[name, str(one["texts"]), *(f"{one[key]:.4f}" for key in names)] for name, one in similarity.items()]
        header = ["held-out texts", "texts", "cosine", "centred cosine", "pooled", "retrieval", "same neighbour"]
        parts.append(table(rows, header))
    if (timing := results.get("speed")) is not None and "text" in merged["slots"]:
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
    elif timing is not None:
        rows = [
            [
                name,
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
    if merged["chassis"] in MADE_UP:
        parts.append(
            f"The chassis `{merged['chassis']}` has random weights: its features and masks mean nothing, only how "
            "near the student comes to them."
            + (" It is smaller than any student, too: no speed is gained." if merged["chassis"] == "tiny" else "")
        )
    return "\n\n".join(parts)
