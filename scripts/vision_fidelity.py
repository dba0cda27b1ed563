# SPDX-License-Identifier: Apache-2.0
"""A student of trunk and both necks next to a trunk's student before SAM 3's frozen necks, after equally many steps.

    python scripts/vision_fidelity.py SAM3 [--steps 400] [--images 400] [--to runs/vision-fidelity]

SAM3 is what both learn from, such as a merged run of smoke/tiny_teacher. The table has the mean cosine of every map of
both necks, and how well the masks of boxes agree with the teacher's (mean IoU, in points), on held-out drawn images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from concept_table import fresh
from torch.nn.functional import cosine_similarity

from effsam3 import embed, evaluate, merge, train
from effsam3.benchmarks.models import MapPair, load_pair
from effsam3.data.transforms import normalise
from effsam3.files import write_json
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.vision.training import MAPS, Necks
from effsam3.recipe.reader import load_recipe
from effsam3.stages.image.measuring import held_out_images
from effsam3.training.report import table

STUDENTS = {
    "trunk alone": ("smoke/image", ("head=fused",)),
    "trunk and necks": ("smoke/vision", ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sam3", help="a SAM 3: a folder, or the name of a tiny one")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=400, help="images to draw; a share of them is held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("runs/vision-fidelity"), help="where the runs go")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {title: learned(title, asked) for title in STUDENTS}
    names = [*MAPS, "boxes"]
    lines = [[title, *(f"{one[name]:.4f}" for name in MAPS), f"{one['boxes']:.1f}", f"{one['cpu_s']:.0f}"]
             for title, one in found.items()]  # fmt: skip
    print(table(lines, ["student", *MAPS, "boxes, agreement", "CPU s"], 1))
    first, second = found.values()
    print("difference: " + "  ".join(f"{name} {second[name] - first[name]:+.4f}" for name in names))
    write_json(asked.to / "fidelity.json", found)


def learned(title: str, asked: argparse.Namespace) -> dict[str, float]:
    """Train, merge and measure one of `STUDENTS`."""
    name, own = STUDENTS[title]
    run = title.replace(" ", "-")
    recipe = load_recipe(name, [
        f"name={run}", f"sam3.checkpoint={asked.sam3}", f"train.runs={asked.to}", f"train.seed={asked.seed}",
        f"data.synthetic_images={asked.images}", f"data.index={asked.to}/data/index.parquet",
        f"embed.to={asked.to}/teacher", f"train.steps={asked.steps}", f"train.eval_every={asked.steps}",
        f"train.save_every={asked.steps}", "evaluate.benchmarks=[fidelity,masks]", "evaluate.prompts=[box]",
        "evaluate.max_images=64", "evaluate.pictures=0", "merge.checkpoint=last", "train.loggers=[]", *own,
    ])  # fmt: skip
    fresh()
    embed.run(recipe)
    fresh()
    since = time.process_time()
    train.run(recipe)
    spent = time.process_time() - since
    merge.run(recipe)
    evaluate.run(recipe)
    masks = json.loads((asked.to / run / "eval/masks.json").read_text())["box"]
    return cosines(recipe, asked.sam3, asked.to / run / "merged") | {"boxes": 100 * masks["agreement"], "cpu_s": spent}


def cosines(recipe, sam3: str, merged: Path) -> dict[str, float]:
    """Return the mean cosine of each of `MAPS` over all positions of all held-out images, which are square."""
    folders = chassis_folder(sam3), merged
    pair = load_pair(*folders, torch.device("cpu"))
    teacher, student = map(Necks.from_folder, folders)
    both = MapPair(pair.teacher, pair.student, pair.device, necks=(teacher, student))
    held_out, _ = held_out_images(recipe, pair)
    rows = [
        [float(cosine_similarity(ours, theirs, dim=1).mean()) for theirs, ours in zip(*both.maps(pixels), strict=True)]
        for pixels in (normalise(batch["pixels"]) for batch in held_out)
    ]
    return dict(zip(MAPS, torch.tensor(rows).mean(0).tolist(), strict=True))


if __name__ == "__main__":
    main()
