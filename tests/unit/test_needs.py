# SPDX-License-Identifier: Apache-2.0
"""What later verbs will need: every row of the table, on what is there and on what is not."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import image_run, text_run

from effsam3.data.images.index import build_index
from effsam3.data.synthetic.images import make_synthetic_sa1b
from effsam3.errors import UserError
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.stages import needs

ROOT = Path(__file__).parents[2]
RECIPES = {stage: ROOT / f"recipes/smoke/{stage}.yaml" for stage in ("image", "text", "memory")}
LATER = ("train", "merge", "evaluate", "push")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve drawn images, with and without their annotations, indexed both ways."""
    folder = tmp_path_factory.mktemp("needs")
    make_synthetic_sa1b(folder / "images", 12, side_px=64)
    build_index([folder / "images"], folder / "annotated.parquet", 0.4, workers=1, progress=False)
    for file in (folder / "images").glob("*.json"):
        file.unlink()
    build_index([folder / "images"], folder / "bare.parquet", 0.4, workers=1, progress=False)
    return folder


@pytest.fixture
def recipe(images, tmp_path):
    def of(stage, *overrides):
        own = [f"train.runs={tmp_path}/runs"]
        if stage == "image":
            own += ["data.source=sa1b", "data.synthetic_images=0", f"data.index={images}/bare.parquet"]
        if stage == "memory":
            own += ["sam3.checkpoint=tiny"]
        return load_recipe(RECIPES[stage], [*own, *overrides])

    return of


@pytest.mark.parametrize("stage", RECIPES)
def test_the_recipes_here_need_nothing(recipe, stage):
    missing, remarks = needs.lacking(recipe(stage), LATER)
    assert missing == []
    assert [remark[:39] for remark in remarks] == (
        ["evaluate: The benchmark `masks` is left"] if stage == "image" else []
    )


def test_annotations_are_no_remark_where_they_are(images, recipe):
    # The index says it; the files are gone here, which only costs those images.
    assert needs.lacking(recipe("image", f"data.index={images}/annotated.parquet"), ["evaluate"]) == ([], [])


HUGE = 10**18  # of parameters: no disk holds them

WRONG = {  # what is wrong: (stage, overrides, what is said)
    "run folder": ("image", ["train.runs=/proc/nowhere"], "train: train.runs: /proc/nowhere/smoke-image cannot be"),
    "index": ("image", ["data.index=nowhere.parquet"], "train: no index at nowhere.parquet"),
    "folder": (
        "image",
        ["data.source=folder", "data.folder=/nowhere", "data.index=nowhere.parquet"],
        "train: data.folder: there is no folder /nowhere",
    ),
    "image weights": ("image", ["student_init=nowhere.pth"], "train: student_init: nowhere.pth cannot be read"),
    "a model to start from": ("text", ["student_init=runs/nowhere"], "train: there is no model in runs/nowhere"),
    "maps for the neck": ("image", ["loss.neck=1", "embed.grid=8"], "train: loss.neck compares .* 8x8 grid"),
    "maps for the heads": (
        "image",
        ["train.monitor=val/heads", "embed.grid=8"],
        "train: train.monitor compares .* 8x8 grid",
    ),
    "checkpoint": ("image", ["merge.checkpoint=step-000123"], "merge: merge.checkpoint: no checkpoint will be called"),
    "late checkpoint": ("text", ["merge.checkpoint=step-000300"], "merge: .* the last step 200"),
    "dropped checkpoint": (
        "text",
        ["merge.checkpoint=step-000100", "train.keep_checkpoints=1"],
        "merge: merge.checkpoint: step-000100 will be gone",
    ),
    "tap": ("image", ["embed.tap=neck"], "merge: this student learned tap=neck"),
    "format of a head": (
        "image",
        ["student=repvit_m0_9", "merge.formats=[efficientsam3]"],
        "merge: .*stride32",
    ),
    "format of a memory": (
        "memory",
        ["merge.formats=[efficientsam3]"],
        "merge: merge.formats: EfficientSAM3's builder",
    ),
    "format of a text": (
        "text",
        ["merge.formats=[efficientsam3]"],
        "merge: merge.formats: the text student tiny_text_plain masks padding",
    ),
    "chassis": ("text", ["sam3.checkpoint=./nowhere"], "merge: sam3.checkpoint: there is no folder or file ./nowhere"),
    "nothing to measure": ("image", ["evaluate.benchmarks=[masks]"], "evaluate: evaluate.benchmarks: nothing is left"),
    "phrases": ("text", ["evaluate.phrases=nowhere.txt"], "evaluate: evaluate.phrases: there is no file nowhere.txt"),
    "videos": ("memory", ["evaluate.videos=/nowhere"], "evaluate: evaluate.videos: there is no folder or file"),
    "licence file": (
        "image",
        ["push.repo=me/mine", "push.license=nowhere", "sam3.checkpoint=facebook/sam3"],
        "push: push.license: nowhere is not there",
    ),
    "licence": (
        "text",
        ["push.repo=me/mine", "push.private=false", "sam3.checkpoint=facebook/sam3"],
        "push: push.private is false, and there is no copy of the SAM License",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there_is_said(recipe, name):
    stage, overrides, said = WRONG[name]
    with pytest.raises(UserError, match=rf"nothing has begun, because[\s\S]*\n  - {said}"):
        needs.refuse(recipe(stage, *overrides), LATER)


def test_photographs_that_are_gone(images, recipe, tmp_path):
    for file in images.glob("images/*.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    build_index([tmp_path / "images"], tmp_path / "gone.parquet", 0.4, workers=1, progress=False)
    for file in (tmp_path / "images").glob("*.jpg"):
        file.unlink()
    with pytest.raises(UserError, match="evaluate: none of the first 3 held-out images of .*gone.parquet can be read"):
        needs.refuse(recipe("image", f"data.index={tmp_path}/gone.parquet"), ["evaluate"])


def test_room(recipe, tmp_path):
    """A student whose checkpoints no disk holds; what is saved already is not asked for twice."""
    with pytest.raises(UserError, match=r"3 checkpoints, the next one .* will take .* GB .*; lower train.keep_check"):
        needs.room_for_checkpoints(recipe("image"), HUGE)
    needs.room_for_checkpoints(recipe("image"), 10**6)


def test_a_run_of_another_recipe(recipe, tmp_path):
    image_run(tmp_path / "runs", "smoke-image")
    step = tmp_path / "runs/smoke-image/checkpoints/step-000007"
    (tmp_path / "runs/smoke-image/checkpoints/best-step-000007").rename(step)
    (step / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="train: .* holds a run of another recipe"):
        needs.refuse(recipe("image", "optim.lr=1"), ["train"])


def test_a_release_is_asked_for_what_its_parts_measure(tmp_path):
    runs = tmp_path / "runs"
    file = text_run(runs) / "recipe.yaml"
    file.write_text(dump_recipe(load_recipe(file, ["evaluate.phrases=nowhere.txt"])))
    parts = [f"parts.image={image_run(runs)}", f"parts.text={runs}/text", f"runs={runs}"]
    release = load_recipe(ROOT / "recipes/smoke/release.yaml", parts)
    with pytest.raises(UserError, match="evaluate: evaluate.phrases: there is no file nowhere.txt"):
        needs.refuse(release, ["merge", "evaluate"])


def test_every_need_can_be_lacking(recipe):
    """Each is one of the cases above, or has a test of its own."""
    own = {"same_run", "photographs", "room_for_checkpoints", "annotated_concepts"}
    covered = {
        "writable_folder": "cannot be",
        "initial_weights": "student_init",
        "both_splits": "no index at",
        "whole_maps": "loss.neck",
        "kept_checkpoint": "merge.checkpoint",
        "whole_merge": "tap=neck",
        "something_to_measure": "nothing is left",
        "phrase_list": "evaluate.phrases",
        "videos_to_track": "evaluate: evaluate.videos",
        "licence": "SAM License",
    }
    found = {need.func.__name__ for stage in RECIPES for verb in LATER for need in needs.needs_of(recipe(stage), verb)}
    assert found == own | covered.keys()
    assert all(any(words in said for _, _, said in WRONG.values()) for words in covered.values())


def test_launch_refuses_before_anything_has_begun(tmp_path):
    """The real chain: nothing is drawn, embedded or made when its last verb could not do its work."""
    overrides = ["merge.checkpoint=step-000123", "evaluate.benchmarks=[masks]", "embed.tap=neck"]
    command = [sys.executable, "-m", "effsam3.cli", "launch", str(RECIPES["image"]), *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\n  - merge: merge.checkpoint: " in done.stderr and "\n  - merge: this student learned tap" in done.stderr
    assert list(tmp_path.iterdir()) == []
