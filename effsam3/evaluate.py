# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: measure a merged model next to its teacher, and draw what both see.

python scripts/evaluate.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

from effsam3 import stages
from effsam3.benchmarks.results import Results
from effsam3.errors import UserError
from effsam3.files import write_text
from effsam3.hardware.accelerator import device_for, launched_processes, make_accelerator, refuse_missing_gpu
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.merging.slots import read_card
from effsam3.models.registry import is_made_up
from effsam3.publish.release import unmeasured
from effsam3.recipe.common import AdaptingRecipe, Recipe
from effsam3.recipe.concepts import asked_concepts
from effsam3.stages import concept_pairs
from effsam3.training.report import Report, provenance

TIMEOUT_S = 24 * 3600  # the process with the slowest images may be far behind the others


def run(recipe: Recipe) -> dict:
    """Run the recipe's benchmarks on held-out data; return what it writes to `runs/<name>/eval`.

    A release runs the benchmarks of every part's own recipe on the release's model; their names begin with the slot's,
    or with that of the run that changed tensors in place.

    What the data do not allow is skipped, as the summary reports. Of several processes, which share the benchmark
    `concepts`, the first one returns it.

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
    asked = recipe.learned()
    owners = [*merged["slots"], *(one["name"] for one in merged.get("adapted", ()))]
    for owner in asked.keys() - set(owners):
        kind = "changes by" if isinstance(asked[owner], AdaptingRecipe) else "student in the slot"
        raise UserError(
            f"{folder}/merged has no {kind} {owner} (it has {', '.join(owners) or 'none'}); evaluate a recipe of what "
            "it has, or merge again"
        )
    if merged["chassis"] == merged.get("imported"):  # its own chassis: the recipe names the one to measure against
        merged |= {"chassis": recipe.sam3.checkpoint, "revision": recipe.sam3.revision}
    accelerator = make_accelerator(recipe.hardware, "fp32", timeout_s=TIMEOUT_S) if launched_processes() > 1 else None
    report = Report(folder, accelerator is None or accelerator.is_main_process)
    chassis = chassis_folder(merged["chassis"], merged["revision"])
    made_by = provenance() | {key: merged[key] for key in ("chassis", "slots", "adapted", "weights") if key in merged}
    (folder / "eval").mkdir(exist_ok=True)
    if accelerator is not None:
        # What several processes share is what the models answer to annotated concepts; the first one goes on alone.
        for own in asked.values():
            if (concepts := asked_concepts(own)) is not None:
                concept_pairs.record(concepts, folder, concept_pairs.models_of(own, folder, chassis), accelerator)
        accelerator.end_training()
        if not report.is_main:
            return {}
    found, tables, device = [], [], device_for(recipe.hardware)
    for owner, own in asked.items():
        results = Results(folder / "eval", "" if own is recipe else f"{owner}_", made_by)
        stages.measuring(own.stage).measure(own, folder, chassis, merged["chassis"], device, results)
        tables += stages.measuring(own.stage).tables(results.by_name)
        found.append(results)
    tables = list(dict.fromkeys(tables))  # two parts of a release may measure the same concepts
    summary = summarise([*tables, *(line for results in found for line in results.left_out)], merged)
    write_text(folder / "eval" / "summary.md", summary + "\n")
    report.say(summary)
    for line in unmeasured(recipe):
        report.say(f"\n{line}")
    if pictures := sum(len(results.pictures) for results in found):
        report.say(f"\n{pictures} pictures in {folder / 'pictures'}")
    report.say(f"numbers in {folder}/eval/*.json, this table in {folder / 'eval' / 'summary.md'}")
    return {results.prefix + name: result for results in found for name, result in results.by_name.items()}


def summarise(tables: list[str], merged: dict) -> str:
    """Return the tables under a title; `merged` is the model's effsam3.json."""
    inside = [f"{slot['student']} in the slot `{name}`" for name, slot in merged["slots"].items()]
    inside += [f"{one['name']} adapted" for one in merged.get("adapted", ())]
    parts = [f"# {', '.join(inside)} of {merged['chassis']}", *tables]
    if is_made_up(merged["chassis"]):
        parts.append(
            f"The chassis `{merged['chassis']}` has random weights: its features and masks mean nothing, only how "
            "near the student comes to them."
            + (" It is smaller than any student, too: no speed is gained." if merged["chassis"] == "tiny" else "")
        )
    return "\n\n".join(parts)
