# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: measure a merged model beside its teacher, and draw what both see.

python scripts/evaluate.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

from pathlib import Path

from effsam3.benchmarks.fidelity import feature_fidelity
from effsam3.benchmarks.masks import prompted_mask_quality
from effsam3.benchmarks.models import load_pair
from effsam3.benchmarks.pictures import draw
from effsam3.benchmarks.speed import speed
from effsam3.data.image_features import ImageFeatures
from effsam3.data.loader import loader
from effsam3.data.sa1b import load_index
from effsam3.data.sampler import sequential_batches
from effsam3.errors import UserError
from effsam3.models.sam3 import chassis_folder
from effsam3.models.tiny import MADE_UP
from effsam3.report import Report, provenance, table, write_json, write_text


def run(recipe) -> dict:
    """Run the recipe's benchmarks on the held-out images; returns what it writes to `runs/<name>/eval`.

    Raises:
        UserError: there is no merged model yet, or prompts are asked for and no held-out image has annotations.
    """
    folder = Path(recipe.train.runs) / recipe.name
    if not (folder / "merged" / "config.json").is_file():
        raise UserError(f"{folder}/merged is not there; run `effsam3 merge` first")
    report = Report(folder)
    chassis = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
    pair = load_pair(chassis, folder / "merged")
    index_path = Path(recipe.data.index)
    index = load_index(index_path, "val", recipe.data.limit)
    out = folder / "eval"
    out.mkdir(exist_ok=True)
    results = {}
    if "fidelity" in recipe.evaluate.benchmarks:
        rows = index.select(range(min(recipe.evaluate.max_images, len(index))))
        images = ImageFeatures(rows, index_path.parent, pair.image_size, recipe.data.resize)
        batches = loader(
            images, sequential_batches(len(images), recipe.export.batch_size, 0, 1), recipe.data.workers, False
        )
        results["fidelity"] = feature_fidelity(pair, batches)
    if "masks" in recipe.evaluate.benchmarks:
        if not any(index["num_masks"]):
            raise UserError(
                f"evaluate.benchmarks has `masks`, but no held-out image of {index_path} has annotations; leave "
                "`masks` out, or index images with their sa_*.json"
            )
        results["masks"] = prompted_mask_quality(
            pair, index, index_path.parent, recipe.evaluate.prompts, recipe.evaluate.max_images,
            recipe.evaluate.masks_per_image,
        )  # fmt: skip
    if "speed" in recipe.evaluate.benchmarks:
        results["speed"] = speed(pair)
    made_by = provenance() | {"chassis": recipe.sam3.checkpoint, "data": str(index_path)}
    for name, result in results.items():
        write_json(out / f"{name}.json", result | {"provenance": made_by})
    # Masks of random weights are noise: they are measured, for how far both agree, but not worth a look.
    with_masks = "masks" in results and recipe.sam3.checkpoint not in MADE_UP
    pictures = draw(pair, index, index_path.parent, recipe.evaluate.pictures, folder / "pictures", with_masks)
    summary = summarise(results, recipe)
    write_text(out / "summary.md", summary + "\n")
    report.say(summary)
    if pictures:
        report.say(f"\n{len(pictures)} pictures in {folder / 'pictures'}")
    report.say(f"numbers in {out}/*.json, this table in {out / 'summary.md'}")
    return results


def summarise(results: dict, recipe) -> str:
    """The results as Markdown tables."""
    parts = [f"# {recipe.name}: {recipe.student} in the place of {recipe.sam3.checkpoint}'s trunk"]
    if (fidelity := results.get("fidelity")) is not None:
        rows = [
            ["student", *(f"{fidelity[name]:.4f}" for name in ("cosine", "cosine_centred", "mse", "neck"))],
            ["mean of the features", f"{fidelity['cosine_of_mean']:.4f}", "0.0000", "1.0000", "-"],
        ]
        header = [f"features, {fidelity['images']} held-out images", "cosine", "centred cosine", "mse", "neck error"]
        parts.append(table(rows, header))
    if (masks := results.get("masks")) is not None:
        rows = []
        for prompt in recipe.evaluate.prompts:
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
                name,
                f"{timing[name]['trunk_parameters'] / 1e6:.2f} M",
                f"{timing[name]['trunk_ms']:.1f}",
                f"{timing[name]['trunk_images_per_s']:.1f}",
                f"{timing[name]['model_parameters'] / 1e6:.2f} M",
                f"{timing[name]['model_ms']:.1f}",
            ]
            for name in ("teacher", "student")
        ]
        timed = ("trunk_parameters", "trunk_ms", "trunk_images_per_s", "model_parameters", "model_ms")
        rows.append(["gain", *(f"{timing['ratio'][name]:.2f}x" for name in timed)])
        header = [
            f"speed on {timing['device']}",
            "trunk",
            "ms",
            f"images/s (x{timing['batch']})",
            "trunk + tracker",
            "ms",
        ]
        parts.append(table(rows, header))
    if recipe.sam3.checkpoint in MADE_UP:
        parts.append(
            f"The chassis `{recipe.sam3.checkpoint}` has random weights: its masks mean nothing, only how far the "
            "student's agree with them."
            + (" It is smaller than any student, too: no speed is gained." if recipe.sam3.checkpoint == "tiny" else "")
        )
    return "\n\n".join(parts)
