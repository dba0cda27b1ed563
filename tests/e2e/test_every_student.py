# SPDX-License-Identifier: Apache-2.0
"""Every registered student goes the whole way: recipe, training, merge, reload in every format, evaluation.

They are reloaded in one fresh process for all, in memory that is full of garbage (see reload_students.py): a process
that has built a student itself may read the right values where a load forgot to write them. Two steps on drawn images
and captions show what this is about, that what was trained is what is released, and cost seconds a student.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, REPOSITORY, SMOKE, metrics
from reload_students import OUTPUTS, inputs
from safetensors.torch import load_file
from test_embed import call

from effsam3.models.merging.formats import BUILDER_NAMES
from effsam3.models.registry import IMAGE_STUDENTS, TEXT_STUDENTS, TINY_TEXT_STUDENTS
from effsam3.recipe.reader import load_recipe
from effsam3.stages.image import training as image
from effsam3.stages.text import training as text
from effsam3.training import checkpoint

TEXT = REPOSITORY / "recipes/smoke/text.yaml"
FAMILIES = {row.family: name for name, row in IMAGE_STUDENTS.items()}
# EfficientSAM3's files know one head, that at stride 32, and one rule for padding, that texts attend to it: so all of
# its students go with these, and some with ours.
STUDENTS = {
    f"{name}-{choice}": (stage, f"student={name}", f"{key}={choice}")
    for stage, key, choice, names in (
        ("image", "head", "stride32", [name for name, row in IMAGE_STUDENTS.items() if row.strides[-1] == 32]),
        ("image", "head", "fused", FAMILIES.values()),
        ("image", "head", "linear", ["tiny_separable_w4"]),
        ("text", "student_padding", "attended", TEXT_STUDENTS | TINY_TEXT_STUDENTS),
        ("text", "student_padding", "masked", TINY_TEXT_STUDENTS),
    )
    for name in names
}
SHORT = (
    "teacher=online", "train.steps=2", "train.eval_every=2", "train.log_every=1", "train.save_every=2",
    "train.global_batch_size=2", "train.micro_batch_size=2", "train.loggers=[]", "optim.lr=0.01",
    "optim.warmup_steps=0",
)  # fmt: skip


def formats(name: str) -> list[str]:
    """The formats that a student can be written in."""
    student, choice = name.split("-")
    known = student in BUILDER_NAMES.keys() | TEXT_STUDENTS.keys() and choice in ("stride32", "attended")
    return ["transformers", "sam3", *(["efficientsam3"] if known else [])]


def own_data(stage: str, folder: Path) -> tuple[str, ...]:
    """Overrides for a stage's drawn data, shared by its students."""
    if stage == "image":
        return (
            "data.synthetic_images=12", f"data.index={folder}/images/index.parquet", "train.eval_samples=9",
            "evaluate.benchmarks=[fidelity]", "evaluate.max_images=9", "evaluate.pictures=1",
        )  # fmt: skip
    return (
        "data.synthetic_captions=40", f"data.captions={folder}/recap", f"data.phrases=[{folder}/phrases.txt]",
        "train.eval_samples=8", "evaluate.benchmarks=[similarity]", "evaluate.max_captions=8",
    )  # fmt: skip


@torch.no_grad()
def trained(run: Path) -> torch.Tensor:
    """What the trained student puts out: built as for training, with the weights of its checkpoint."""
    recipe = load_recipe(run / "recipe.yaml")
    weights = checkpoint.read_weights(checkpoint.chosen(run / "checkpoints", "best"))
    channels = len(weights["feature_mean"])
    if recipe.stage == "text":
        student, (ids_BL, mask_BL) = text.make_student(recipe, channels)[0], inputs("text")
        student.load_state_dict(weights)
        return student.eval()(ids_BL, mask_BL)[mask_BL]
    student = image.make_student(recipe, channels, 224, 14)
    student.load_state_dict(weights)
    return student.eval()(*inputs("image")).last_hidden_state


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of all runs, merged in every format, reloaded and evaluated; what the trained students put out.

    The fresh process works on one student while the next one is trained: two cores, and few models on the disk.
    """
    folder, expected = tmp_path_factory.mktemp("students"), {}
    script, log = Path(__file__).with_name("reload_students.py"), folder / "reloaded.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, script],
            cwd=folder, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True,
        ) as fresh,
    ):  # fmt: skip
        for name, (stage, *own) in STUDENTS.items():
            recipe = SMOKE if stage == "image" else TEXT
            overrides = (*own, *SHORT, *own_data(stage, folder), f"name={name}", f"train.runs={folder}")
            call("train", overrides, recipe=recipe)
            expected[name] = trained(folder / name)
            call("merge", overrides, f"merge.formats=[{','.join(formats(name))}]", recipe=recipe)
            shutil.rmtree(folder / name / "checkpoints")  # up to a gigabyte each
            assert fresh.poll() is None, log.read_text()[-6000:]
            print(folder / name, file=fresh.stdin, flush=True)
    assert fresh.returncode == 0, log.read_text()[-6000:]
    return folder, expected


@pytest.mark.parametrize("name", STUDENTS)
def test_what_was_trained_is_what_is_released(released, name):
    folder, expected = released
    found = load_file(folder / name / OUTPUTS)
    assert sorted(found) == sorted(formats(name))
    for tensor in found.values():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_what_is_measured_is_what_validation_saw(released, name):
    """On the same held-out images; of the texts, they take different ones."""
    run = released[0] / name
    if STUDENTS[name][0] == "text":
        results = json.loads((run / "eval/similarity.json").read_text())
        assert all(math.isfinite(results[texts]["cosine"]) for texts in ("captions", "phrases"))
    else:
        results = json.loads((run / "eval/fidelity.json").read_text())
        assert results["cosine"] == pytest.approx(metrics(run, "val/cosine")[2]["val/cosine"], abs=1e-4)
