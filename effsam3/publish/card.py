# SPDX-License-Identifier: Apache-2.0
"""The model card: what a merged model is, how it is loaded, what was measured, under which licence it falls.

Everything on it is read from the run folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import yaml

from effsam3 import __version__, stages
from effsam3.benchmarks.flops import gflop_table, part_gflop
from effsam3.models.chassis.classes import empty_model
from effsam3.models.chassis.tensors import read_config
from effsam3.models.merging.slots import SLOTS
from effsam3.models.registry import SAM3S
from effsam3.publish.release import Release
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.reader import dump_recipe, flat
from effsam3.stages.base import CardEntry
from effsam3.training.report import source, table

# The same model in other formats: file -> whose names its tensors have
OTHER_FORMATS = {"sam3.pt": "the original SAM 3's", "efficientsam3.pt": "EfficientSAM3's"}
PICTURES = 4  # how many are shown on the card; the others are next to them


def model_card(release: Release, repo: str, revision: str = "main") -> str:
    """Return the card as Markdown, the Hub's metadata in front; `repo` (OWNER/NAME) is where it is loaded from."""
    sections = [
        f"# {repo.rpartition('/')[2]}\n\n{_introduction(release)}",
        f"## Slots\n\n{slots(release)}",
        f"## Parameters\n\n{parameter_table(release)}",
        f"## Operations\n\n{operations(release)}",
        f"## How to use it\n\n{_use(release, repo, revision)}",
        f"## Measured\n\n{measurements(release)}",
        f"## How it learned\n\n{_training(release)}",
        f"## Limitations\n\n{limitations(release)}",
        f"## Licence\n\n{licence(release)}",
    ]
    return f"---\n{yaml.safe_dump(metadata(release), sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def metadata(release: Release) -> dict:
    """Return what the Hub reads."""
    values = {"library_name": "transformers", "pipeline_tag": "mask-generation"}
    if release.has_sam3:
        terms = release.sam3.license
        link = terms.url if release.license_file is None else "LICENSE"
        values |= {"license": "other", "license_name": terms.name, "license_link": link}
        # Only an id of the Hub: a local folder's name would be a dead link there.
        if release.chassis == release.sam3.hub_id:
            values["base_model"] = release.chassis
    return values | {"tags": ["effsam3", "sam3", *(["knowledge-distillation"] if release.merged["slots"] else [])]}


def _introduction(release: Release) -> str:
    replaced = " and ".join(f"the {stages.recipe_class(slot).replaces}" for slot in release.merged["slots"])
    changed = [f"students have taken the place of {replaced}"] if replaced else []
    changed += ["some tensors have been adapted"] if "adapted" in release.merged else []
    if layers := release.merged.get("encoder_layers"):
        changed.append(f"the detector's fusion encoder keeps {layers} of its layers")
    rest = (
        f"in which {' and '.join(changed)}. It takes text, boxes, points and masks as prompts, on images and in "
        "videos. Made with effsam3."
    )
    if release.has_sam3:
        return f"[{release.sam3.label}](https://huggingface.co/{release.sam3.hub_id}) {rest}"
    return (
        f"A SAM 3 with random weights (the chassis `{release.chassis}`) {rest}\n\n"
        "> **A trial of the machinery, not a model.** The masks of random weights mean nothing."
    )


def slots(release: Release) -> str:
    """Tell who fills the slots, and what has been changed in place."""
    rows, filled = [], entries(release)
    for slot in counted_slots(release.merged["slots"]):
        row = [f"`{slot}`", stages.recipe_class(slot).replaces, "not replaced", ""]
        if slot in filled:
            row[2:] = [filled[slot].called, f"`{release.merged['slots'][slot]['from']}`"]
        rows.append(row)
    for one in release.merged.get("adapted", ()):
        places = {".".join(name.split(".")[:2]) for name in one["tensors"]}
        changed = f"adapted, `{one['name']}`: {len(one['tensors']):,} tensors"
        rows.append(["", ", ".join(f"`{place}`" for place in sorted(places)), changed, f"`{one['from']}`"])
    return table(rows, ["slot", "part of SAM 3", "replaced by", "from"], text_columns=4)


def entries(release: Release) -> dict[str, CardEntry]:
    """Describe every student by its stage."""
    config = read_config(release.model)
    return {
        slot: stages.merging(slot).card(filled, SLOTS[slot].config_of(config), release.model)
        for slot, filled in release.merged["slots"].items()
    }


def parameter_table(release: Release) -> str:
    """Count the parameters of each slot, next to the SAM 3's where that is at hand."""
    counted = counted_slots(release.merged["slots"])
    columns = {"this model": parameters(read_config(release.model), counted)}
    original = _chassis_config(release.chassis)
    if original is not None:
        columns[release.sam3.label if release.has_sam3 else "chassis"] = parameters(original, counted)
    rows = []
    # In the order of the slots, whatever this model replaces: cards can be laid side by side.
    replaced = {slot: stages.recipe_class(slot).replaces for slot in counted}
    for key, title in {**replaced, "rest": "everything else", "total": "**whole model**"}.items():
        counts = [column[key] for column in columns.values()]
        if counts[-1]:  # a slot that this SAM 3 has
            saved = [f"{100 * (1 - counts[0] / counts[1]):.2f} %"] if len(counts) == 2 else []
            rows.append([title, *(f"{count:,}" for count in counts), *saved])
    return table(rows, ["parameters", *columns, *(["saved"] if len(columns) == 2 else [])])


def operations(release: Release) -> str:
    """Lay out what every use of the model takes, so that none is judged by its trunk."""
    original, row = _chassis_config(release.chassis), release.sam3
    known = row.gflop if release.chassis in SAM3S else {}
    theirs = None if original is None else known or part_gflop(original)
    gflop = gflop_table(part_gflop(read_config(release.model)), theirs, row.label if release.has_sam3 else "chassis")
    return (
        f"{gflop}\n\nBillions of operations, two for every multiplication and its addition, in matrix products and "
        "convolutions. A phrase is padded to 32 tokens; an object is shown by a point; the memory is full. No time of "
        "any machine follows from these."
    )


def counted_slots(filled: Collection[str]) -> list[str]:
    """Return the slots of which each tensor is in at most one, for a model that has students in those `filled`."""
    other = "image" if "vision" in filled else "vision"  # both have the trunk
    return [slot for slot in SLOTS if slot != other]


def parameters(config, slots: Collection[str]) -> Counter:
    """Count the parameters of the model of a `Sam3VideoConfig`: per slot, in the `rest`, in `total`."""
    counts: Counter[str] = Counter()
    for name, parameter in empty_model(config).named_parameters():
        owner = next((slot for slot in slots if name.startswith(SLOTS[slot].owns)), "rest")
        counts[owner] += parameter.numel()
    return counts + Counter(total=counts.total())


def _chassis_config(chassis: str):
    """Return the config of the SAM 3 that was merged into, None when it would have to be downloaded."""
    if chassis in SAM3S:
        return SAM3S[chassis].config()
    return read_config(Path(chassis)) if (Path(chassis) / "config.json").is_file() else None


# ---- how to use it

BLOCKS = {
    "On an image": """\
from effsam3 import Predictor

predictor = Predictor($source)
found = predictor.image("photo.jpg", text="a dog", threshold=0.5)  # every dog
print(found.scores_O, found.boxes_O4, found.masks_OHW.shape)

# Objects, in pixels: a box each (x1, y1, x2, y2), or points of one (x, y, and 1 on the object or 0 next to it).
boxes = predictor.image("photo.jpg", box=[[10, 20, 90, 80], [5, 5, 40, 60]])
points = predictor.image("photo.jpg", point=[[60, 40, 1], [5, 5, 0]])
""",
    "Through a video, by a text, or by boxes or points on its first frame": """\
from effsam3 import Predictor

for frame, found in Predictor($source).video("clip.mp4", text="a dog"):
    print(frame, found.ids, found.scores_O, found.masks_OHW.shape)
""",
    "With transformers' own classes": """\
import effsam3.auto  # registers the students' classes with transformers
from transformers import AutoModel

model = AutoModel.from_pretrained($source)
print(type(model).__name__)
""",
}


def _use(release: Release, repo: str, revision: str) -> str:
    source = f'"{repo}"' if revision == "main" else f'"{repo}", revision="{revision}"'
    blocks = [f"{title}:\n\n```python\n{code.replace('$source', source)}```" for title, code in BLOCKS.items()]
    others = [f"`{file}`, {whose} names" for file, whose in OTHER_FORMATS.items() if (release.model / file).is_file()]
    if others:
        blocks.append(f"The same model in other formats: {'; '.join(others)}.")
    return "\n\n".join([f"It needs `transformers` and the package `effsam3` {_package()}", *blocks])


def _package() -> str:
    """Return the package's version and where to get it."""
    address = source()
    if address is None:
        return (
            f"{__version__}, which is not on PyPI: `pip install -e .` in a clone of its repository. Whoever published "
            "this model can say where that is."
        )
    return f"{__version__}:\n\n```bash\npip install git+{address}\n```"


# ---- what is known of it


def measurements(release: Release) -> str:
    """The newest evaluation's tables as they were written, where they are of this merged model, and pictures."""
    if release.summary is None:
        return "Nothing: no evaluation of this merged model is in its run folder."
    files = ", ".join(f"`eval/{path.name}`" for path in release.measured)
    text = (
        f"{measured_tables(release.summary)}\n\nAll digits, and the versions and the machine that made them: {files}."
    )
    return text + "".join(f"\n\n![{path.stem}](pictures/{path.name})" for path in release.pictures[:PICTURES])


def measured_tables(summary: Path) -> str:
    """Return what a summary.md holds below its title."""
    lines = summary.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("# ")).strip()


def _training(release: Release) -> str:
    made, recipes = _made(release), release.recipes
    learned = {owner: _how_it_learned(recipe) for owner, recipe in recipes.items()}
    rows = []
    for title in dict.fromkeys(title for values in learned.values() for title in values):
        cells = [learned.get(owner, {}).get(title) for owner in made]
        if any(cells):
            rows.append([title, *(cell or "-" for cell in cells)])
    blocks = [table(rows, ["", *made], text_columns=1 + len(made))] if rows else []
    for owner, origin in made.items():
        if owner in recipes:
            recipe = f"```yaml\n{dump_recipe(recipes[owner])}```"
            blocks.append(f"<details><summary>Recipe, {owner}</summary>\n\n{recipe}\n\n</details>")
        else:
            blocks.append(f"`{owner}`: no recipe is known; it is from `{origin}`.")
    return "\n\n".join(blocks)


def _made(release: Release) -> dict[str, str]:
    """Return {slot, or name of changed tensors: where they come from}."""
    slots = {slot: filled["from"] for slot, filled in release.merged["slots"].items()}
    return slots | {one["name"]: one["from"] for one in release.merged.get("adapted", ())}


def _how_it_learned(recipe: StageRecipe) -> dict[str, str | None]:
    """Return the card's rows of a recipe by title, None for what is not set."""
    values = flat(recipe)
    cells = {title: values.get(key) for title, key in recipe.card_keys.items()}
    cells["data"] = {"synthetic": "made-up data", **recipe.data_names}.get(recipe.data.source, recipe.data.source)
    return {
        title: None if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)
        for title, value in cells.items()
    }


def limitations(release: Release) -> str:
    """List what is known not to be known, or not to work."""
    points = []
    if not release.has_sam3:
        points.append("The chassis has random weights: this model tells nothing about one of SAM 3's quality.")
    points.append(
        "It has not been measured at all."
        if release.summary is None
        else "Nothing but the numbers above has been measured: accuracy elsewhere is not known."
    )
    points += [limit for recipe in release.recipes.values() for limit in recipe.limits()]
    points += [limit for entry in entries(release).values() for limit in entry.limits]
    return "\n".join(f"- {point}" for point in points)


def licence(release: Release) -> str:
    """List the licence terms of the weights: SAM 3's, and those of the weights that students started from."""
    if not release.has_sam3:
        text = f"No weights of SAM 3 are in this model: the chassis `{release.chassis}` was drawn at random."
    else:
        terms = release.sam3.license
        text = f"The weights contain {release.sam3.label}'s and fall under the [{terms.title}]({terms.url}). "
        text += (
            "Its full text is in `LICENSE` and must accompany them wherever they go."
            if release.license_file is not None
            else "**Its full text must accompany them and has still to be added here:** `LICENSE` is a notice only."
        )
    return "\n\n".join([text, *filter(None, (entry.origin for entry in entries(release).values()))])
