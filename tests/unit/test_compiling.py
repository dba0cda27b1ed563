# SPDX-License-Identifier: Apache-2.0
"""`train.compile`: the same run, compiled, or an error that says why not."""

import json

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config as inductor
from counting import made_up_stage, one_process
from safetensors.torch import load_file

from effsam3 import embed, train
from effsam3.errors import RecipeError, UserError
from effsam3.models.chassis.tiny import tiny_config
from effsam3.models.image.student import StudentTrunk, student_config
from effsam3.models.image.teacher import Teacher
from effsam3.recipe.reader import load_recipe
from effsam3.stages.base import StageBase
from effsam3.training.compiling import compiling_explained

STEPS = ("train.steps=4", "train.eval_every=4", "train.save_every=2", "train.log_every=1", "data.found=[0]")


@pytest.fixture
def fresh_graphs(tmp_path, monkeypatch):
    """What is compiled goes into the test's own folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def basket(tmp_path, monkeypatch, fresh_graphs):
    """A recipe of the stage `counting`."""
    with inductor.patch(compile_threads=1):  # else a pool of processes is started
        yield from made_up_stage(tmp_path, monkeypatch)


def learn(basket, *overrides, **options):
    """Train in this process; return the losses by step and the files of the last checkpoint."""
    one_process()
    recipe = load_recipe(basket, [*STEPS, *overrides])
    train.run(recipe, **options)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    last = recipe.folder / "checkpoints/step-000004"
    return losses, [load_file(last / f"{name}.safetensors") for name in ("student", "optimizer")]


def test_a_compiled_run_learns_the_same_and_resumes(basket):
    """With averaged weights, whose copy of the student stays as it is."""
    compiled = ("name=compiled", "train.compile=true", "train.ema=0.9")
    losses, files = learn(basket, "train.ema=0.9")
    torch._dynamo.utils.counters.clear()
    found, same = learn(basket, *compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert found == pytest.approx(losses, rel=1e-5)
    # Tensors keep their names: a checkpoint is for runs, merges and exports that know nothing of it.
    torch.testing.assert_close(same, files, rtol=0, atol=1e-4)  # Adam makes much of small gradients
    folder = load_recipe(basket, compiled).folder
    for later in ("checkpoints/step-000004", "checkpoints/best-step-000004"):
        (folder / later).rename(folder / later.replace("step", "old"))
    resumed, again = learn(basket, *compiled)
    assert resumed == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(again, files, rtol=0, atol=1e-4)


def test_without_a_compiler_it_ends(basket):
    told = r"train.compile: torch.compile failed, \w+: .*C\+\+ compiler.*=false"
    with pytest.raises(UserError, match=told), inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        learn(basket, "train.compile=true")


def test_switched_off_it_ends(basket):
    told = "config.disable is set.*unset TORCHDYNAMO_DISABLE"
    with pytest.raises(UserError, match=told), torch._dynamo.config.patch(disable=True):
        learn(basket, "train.compile=true")


def test_parts_that_cannot_be_compiled_are_not_left_out():
    class Breaks(torch.nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    student = Breaks(2, 2)
    StageBase.compile(None, student)
    with pytest.raises(UserError, match="train.compile: torch.compile failed, Unsupported"), compiling_explained(True):
        student(torch.ones(1, 2))


def test_image_students_are_compiled_whole():
    config = student_config("tiny_convnext", "fused", None, hidden_size=32, image_size=112, patch_size=14)
    student, pixels = StudentTrunk(config).eval(), torch.randn(1, 3, 112, 112)
    whole = torch.compile(student, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(pixels).last_hidden_state, student(pixels).last_hidden_state)


def test_a_teacher_takes_two_graphs(fresh_graphs):
    """One of its layers with windows, one of those without, however many there are."""
    teacher, pixels = Teacher(tiny_config().detector_config.vision_config), torch.rand(2, 3, 224, 224) * 2 - 1
    features = teacher(pixels)
    teacher.compile_layers()
    with torch.compiler.set_stance(force_backend="eager"):  # what is compiled is looked at, not the compiler
        torch.testing.assert_close(teacher(pixels), features)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_embed_compiles_its_teacher_or_ends(tmp_path, monkeypatch, fresh_graphs):
    monkeypatch.chdir(tmp_path)
    one_process()
    recipe = load_recipe("smoke/image", ["train.compile=true", "data.synthetic_images=8"])
    told = r"train.compile: torch.compile failed, \w+: .*C\+\+ compiler.*=false"
    broken = inductor.patch({"cpp.cxx": ("no-such-compiler",), "compile_threads": 1})
    with pytest.raises(UserError, match=told), broken:
        embed.run(recipe)


def test_other_stages_are_refused_with_the_recipe():
    with pytest.raises(RecipeError, match="train.compile: torch.compile does not take students of stage memory whole"):
        load_recipe("smoke/memory", ["train.compile=true"])
