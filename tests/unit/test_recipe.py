# SPDX-License-Identifier: Apache-2.0
"""The reader of recipes: every recipe in the repository, every kind of mistake, derived numbers."""

import dataclasses
import random
from pathlib import Path

import pytest
import yaml

from effsam3 import stages
from effsam3.hardware.accelerate_configs import read_config
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.recipe.derived import accumulation, total_steps, warmup_steps
from effsam3.recipe.reader import (
    RecipeError,
    differing_keys,
    dump_recipe,
    flat,
    load_recipe,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted(file for file in (ROOT / "recipes").rglob("*.yaml") if not file.name.endswith("base.yaml"))
BASE = ROOT / "recipes" / "stage1" / "image" / "base.yaml"
SMOKE = ROOT / "recipes" / "smoke" / "image.yaml"
CHOICES = ", ".join(stages.STAGES)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a recipe which inherits the smoke recipe, and returns its path."""

    def writer(text, name="recipe.yaml", inherits=SMOKE):
        path = tmp_path / name
        path.write_text((f"inherits: {inherits}\n" if inherits else "") + text, encoding="utf-8")
        return path

    return writer


def problems_of(path, overrides=()):
    """Return the lines of the error that loading raises, without the file's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


# ---- the recipes of the repository


def test_all_recipes_are_here():
    leaves = {f"es_{family}_{size}" for family in ("rv", "tv", "ev") for size in "sml"}
    assert {file.stem for file in RECIPES if file.parent == BASE.parent} == leaves
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_loads_and_round_trips(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe
    assert (ROOT / "accelerate_configs" / f"{recipe.hardware}.yaml").is_file()


def test_names_of_runs_are_unique():
    names = [load_recipe(path).name for path in RECIPES]
    assert len(set(names)) == len(names)


def test_stage1_image_recipes_name_every_published_student():
    students = {load_recipe(path).student for path in RECIPES if path.parent == BASE.parent}
    assert students == {name for name, row in IMAGE_STUDENTS.items() if row.published_millions is not None}


def test_a_base_lacks_only_what_makes_it_one_run():
    assert problems_of(BASE) == ["name is missing; expected text", "student is missing; expected text"]


def test_published_hyperparameters():
    recipe = load_recipe(BASE.with_name("es_rv_m.yaml"))
    assert recipe.name == "stage1-image-es_rv_m"
    optim, train = recipe.optim, recipe.train
    assert (optim.lr, optim.warmup_lr, optim.min_lr) == (1e-3, 1e-6, 1e-5)
    assert (optim.weight_decay, optim.betas, optim.eps, optim.clip_grad_norm) == (0.01, (0.9, 0.999), 1e-8, 5.0)
    assert (train.epochs, optim.warmup_epochs, train.global_batch_size) == (50, 5, 512)


# ---- reading


def test_child_merges_mappings_and_replaces_the_rest(write):
    recipe = load_recipe(write("optim: {lr: 0.5}\ntrain: {loggers: [wandb]}\n"))
    parent = load_recipe(SMOKE)
    assert differing_keys(parent, recipe) == ["optim.lr 0.002 -> 0.5", "train.loggers () -> ('wandb',)"]


def test_inherits_is_relative_to_the_file_and_goes_on(write):
    write("name: middle\nhardware: gpu\n", "middle.yaml")
    recipe = load_recipe(write("name: leaf\n", inherits="middle.yaml"))
    assert (recipe.name, recipe.hardware, recipe.student) == ("leaf", "gpu", "tiny_convnext")


def test_inheriting_in_a_circle(write):
    write("", "a.yaml", inherits="b.yaml")
    with pytest.raises(RecipeError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_recipe(write("", "b.yaml", inherits="a.yaml").with_name("a.yaml"))


@pytest.mark.parametrize("parent", ["[a.yaml, b.yaml]", "", "{a: b}"])
def test_inherits_takes_one_path(write, parent):
    with pytest.raises(RecipeError, match="inherits: expected the path of one recipe"):
        load_recipe(write(f"inherits: {parent}\n", inherits=None))


@pytest.mark.parametrize(
    ("old", "new"),
    [("export: {to: x}", "export; it is called embed"), ("train: {trackers: []}", "train.trackers; it is")],
)
def test_old_names_are_answered_with_the_new_ones(old, new, write):
    with pytest.raises(RecipeError, match=f"unknown key {new}"):
        load_recipe(write(f"{old}\n"))


def test_missing_parent_is_named(write):
    with pytest.raises(RecipeError, match=r"bse.yaml \(inherited by recipe.yaml\); did you mean .*base.yaml"):
        load_recipe(write("", inherits=BASE.with_name("bse.yaml")))


def test_missing_recipe_suggests_a_neighbour():
    with pytest.raises(RecipeError, match=r"es_rvm.yaml; did you mean .*image/es_rv_m.yaml\?$"):
        load_recipe(BASE.with_name("es_rvm.yaml"))


def test_a_folder_lists_its_recipes():
    with pytest.raises(RecipeError, match=r"is a folder; name one recipe in it: base.yaml, es_ev_l.yaml"):
        load_recipe(BASE.parent)


def test_a_folder_without_a_recipe_names_the_run_that_it_is_in(tmp_path):
    inside = tmp_path / "runs/first/checkpoints/step-000010"
    inside.mkdir(parents=True)
    with pytest.raises(RecipeError, match="step-000010 is a folder without a recipe in it, nor is it .* of a run$"):
        load_recipe(inside)
    (tmp_path / "runs/first/recipe.yaml").touch()
    with pytest.raises(RecipeError, match="in it; it belongs to the run runs/first, name that$"):
        load_recipe(inside)


def test_overrides_come_last_and_are_yaml():
    recipe = load_recipe(SMOKE, ["optim.lr=5e-4", "evaluate.prompts=[box]", "train={seed: 3, ema: .9}"])
    assert (recipe.optim.lr, recipe.evaluate.prompts) == (5e-4, ("box",))
    assert (recipe.train.seed, recipe.train.ema, recipe.train.steps) == (3, 0.9, 200)


def test_a_later_override_wins():
    assert load_recipe(SMOKE, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("override", ["optim.lr", "=3", "--lr"])
def test_what_is_not_an_override(override):
    assert problems_of(SMOKE, [override])[0].startswith(f"{override!r} is not an override; write section.key=value")


# ---- mistakes


def test_all_mistakes_at_once_with_suggestions(write):
    path = write("""
student: repvit_m11
lr: 1.0e-3
optimizer: {lr: 3}
data: {contxt_length: 77}
train: {stepz: 3, micro_batch_size: two, precision: bf32, warmup_steps: 3}
""")
    found = problems_of(path, ["loss.mse=-1", "checkpoint=last"])
    expected = [
        "unknown key lr; did you mean optim.lr? (recipe.yaml line 4)",
        "unknown key optimizer; did you mean optim? (recipe.yaml line 5)",
        "unknown key checkpoint; did you mean sam3.checkpoint or merge.checkpoint? (command line)",
        "student: no image student is called 'repvit_m11' (backbones of timm are called timm/NAME); did you mean "
        "repvit_m1_1? (recipe.yaml line 3)",
        "loss.mse: must be 0 or more, got -1.0 (command line)",
        "unknown key train.stepz; did you mean train.steps? (recipe.yaml line 7)",
        "unknown key train.warmup_steps; did you mean optim.warmup_steps? (recipe.yaml line 7)",
        "train.micro_batch_size: expected int, got 'two' (recipe.yaml line 7)",
        "train.precision: 'bf32' is not one of bf16, fp16, fp32; did you mean fp32? (recipe.yaml line 7)",
    ]
    assert set(expected) < set(found)
    assert any(problem.startswith("unknown key data.contxt_length; choose from source, index,") for problem in found)
    assert len(found) == len(expected) + 1


def test_a_mistake_in_a_parent_names_the_parent(write):
    write("optm: {}\n", "parent.yaml")
    assert problems_of(write("", inherits="parent.yaml")) == [
        "unknown key optm; did you mean optim? (parent.yaml line 2)"
    ]


def test_missing_keys_are_all_named(write):
    found = problems_of(write("stage: image\nname: x\nstudent: tiny_convnext\n", inherits=None))
    assert "data.index is missing; expected text" in found
    assert "data.source is missing; expected sa1b or folder or synthetic" in found
    assert "optim.lr is missing; expected float" in found
    assert "train.eval_every is missing; expected int" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"stage is missing; choose from {CHOICES}"),
        ("stage: imag\n", "stage: 'imag' is not a stage; did you mean image? (recipe.yaml line 1)"),
        ("stage: films\n", f"stage: 'films' is not a stage; choose from {CHOICES} (recipe.yaml line 1)"),
        ("stage: [image]\n", f"stage: 'a list' is not a stage; choose from {CHOICES} (recipe.yaml line 1)"),
    ],
)
def test_stage(write, text, message):
    assert problems_of(write("name: x\n" if not text else text, inherits=None)) == [message]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.synthetic_images=0", "data.synthetic_images: source synthetic needs to know how many to make"),
        ("data.source=sa1b", "data.synthetic_images: 160 asked for, but source is sa1b"),
        ("data.index=photos", "data.index: 'photos' must end in .parquet"),
        ("data.limit=0", "data.limit: must be above 0, got 0"),
        ("optim.min_lr=1", "optim.min_lr: 1.0 is above optim.lr (0.002)"),
        ("optim.warmup_lr=1", "optim.warmup_lr: 1.0 is above optim.lr (0.002)"),
        ("optim.warmup_epochs=1", "optim.warmup_epochs: warmup_epochs (1) and warmup_steps (10) are both set"),
        ("optim.warmup_steps=null", "optim.warmup_epochs: give it or warmup_steps; neither is set"),
        ("optim.warmup_steps=200", "optim.warmup_steps: 200 is not below train.steps (200)"),
        ("optim.betas=[0.9, 1]", "optim.betas: must be at least 0 and below 1, got 1.0"),
        ("optim.betas=[0.9]", "optim.betas: expected a list of 2, got 1 values"),
        ("optim.clip_grad_norm=0", "optim.clip_grad_norm: must be above 0, got 0.0"),
        ("train.epochs=1", "train.epochs: epochs (1) and steps (200) are both set; set one of them to null"),
        ("train.steps=null", "train.epochs: give it or steps; neither is set"),
        ("train.micro_batch_size=3", "train.global_batch_size: 8 is not a multiple of train.micro_batch_size (3)"),
        ("train.ema=1", "train.ema: must be at least 0 and below 1, got 1.0"),
        ("train.loggers=[wandb, wandb]", "train.loggers: wandb is listed twice"),
        ("train.loggers=wandb", "train.loggers: expected a list, got 'wandb'; write [wandb]"),
        ("evaluate.benchmarks=[]", "evaluate.benchmarks: is empty; list at least one"),
        ("evaluate.benchmarks=[mask]", "evaluate.benchmarks: 'mask' is not one of fidelity, masks, speed, concepts"),
        ("loss={mse: 0, cosine: 0}", "loss.mse: all weights (mse, cosine, neck) are 0"),
        ("loss=3", "loss: expected keys below it, got '3'"),
        ("loss=", "loss: expected keys below it, got nothing"),
        ("optim.lr.max=3", "optim.lr: expected float, got a mapping"),
        ("optim.lr=[3]", "optim.lr: expected float, got a list"),
        ("name=../x", "name: '../x' must be letters, digits"),
        ("name=", "name: expected text, got nothing"),
        ("hardware=zero2/x", "hardware: 'zero2/x' must be letters, digits"),
        ("student_init=imagenet1k", "student_init: 'imagenet1k' is not imagenet, random or a weights file"),
        ("inherits=x", "unknown key inherits; it belongs at the top of a file"),
    ],
)
def test_mistake(override, message):
    found = problems_of(SMOKE, [override])
    assert len(found) == 1
    assert found[0].startswith(message)


def test_neck_loss_needs_the_trunk():
    found = problems_of(SMOKE, ["loss.neck=1", "embed.tap=neck"])
    assert found == ["loss.neck: 1.0 needs the trunk's output, but embed.tap is neck; set one of them back"]


# ---- the resolved copy


AWKWARD = [
    "null",
    "~",
    "",
    " x ",
    "no",
    "1e-3",
    "012",
    "a: b",
    "# x",
    "*x",
    "!x",
    "\u4e2d",
    "a\nb",
    "'",
    '"',
    "{a",
    "\x85",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_the_copy(text, tmp_path):
    recipe = load_recipe(SMOKE)
    recipe = dataclasses.replace(recipe, sam3=dataclasses.replace(recipe.sam3, checkpoint=text, revision=text))
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    assert load_recipe(copy) == recipe


def test_any_number_survives_the_copy(tmp_path):
    recipe, random_numbers = load_recipe(SMOKE), random.Random(0)
    for _ in range(50):
        lr = 10 ** random_numbers.uniform(-12, 12)
        optim = dataclasses.replace(recipe.optim, lr=lr, min_lr=lr / 3, warmup_lr=lr / 7)
        copy = tmp_path / "copy.yaml"
        copy.write_text(dump_recipe(dataclasses.replace(recipe, optim=optim)), encoding="utf-8")
        assert load_recipe(copy).optim == optim


def test_the_copy_is_plain_yaml_too():
    recipe = load_recipe(SMOKE)
    read = yaml.safe_load(dump_recipe(recipe))
    assert "inherits" not in read
    assert read["optim"]["betas"] == [0.9, 0.999] and read["train"]["epochs"] is None
    assert list(read) == [field.name for field in dataclasses.fields(stages.recipe_class("image"))]


def test_flat_has_every_key_once():
    keys = list(flat(load_recipe(SMOKE)))
    assert {"stage", "optim.betas", "merge.checkpoint"} < set(keys) and len(keys) == len(set(keys))


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe(SMOKE).train.steps = 3


# ---- derived numbers


def test_accumulation():
    recipe = load_recipe(BASE.with_name("es_rv_m.yaml"))
    assert [accumulation(recipe, world) for world in (1, 2, 8, 32)] == [32, 16, 4, 1]
    message = r"global_batch_size \(512\) is not a multiple of micro_batch_size x world size \(16 x 7 = 112\); change"
    with pytest.raises(RecipeError, match=message):
        accumulation(recipe, 7)


def test_steps_of_epochs():
    recipe = load_recipe(BASE.with_name("es_rv_m.yaml"))
    assert total_steps(recipe, 512) == 50 and warmup_steps(recipe, 512) == 5
    assert total_steps(recipe, 513) == 51  # a begun step is a step
    assert total_steps(recipe, 100_000) == -(-100_000 * 50 // 512)
    recipe = load_recipe(BASE.with_name("es_rv_m.yaml"), ["train.epochs=1.1", "optim.warmup_epochs=0.1"])
    assert total_steps(recipe, 51200) == 110  # floats make it 110.00000000000001 and then 111
    assert warmup_steps(recipe, 51200) == 10
    assert total_steps(load_recipe(SMOKE), 3) == 200 and warmup_steps(load_recipe(SMOKE), 3) == 10


def test_warmup_longer_than_training():
    recipe = load_recipe(SMOKE, ["train.steps=null", "train.epochs=1"])
    with pytest.raises(RecipeError, match="warm-up takes 10 steps and the whole training 10"):
        warmup_steps(recipe, 80)


# ---- hardware


def test_processes_of_configs():
    processes = {file.stem: read_config(file).processes for file in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert processes == {
        "cpu": 1,
        "gpu": 1,
        "ddp": 8,
        "ddp_cpu": 2,
        "zero1": 8,
        "zero2": 8,
        "zero3": 8,
        "zero2_offload": 8,
        "zero3_offload": 8,
        "zero1_cpu": 2,
        "zero2_cpu": 2,
        "zero3_cpu": 2,
        "zero2_offload_cpu": 2,
        "multinode_ddp": 16,
        "multinode_zero2": 16,
        "multinode_ddp_cpu": 2,
        "multinode_zero2_cpu": 2,
    }


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_accepts_the_config_and_it_says_nothing_about_learning(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == read_config(path).processes
    assert config.mixed_precision is None
    learning = {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"}
    assert not learning & set(config.deepspeed_config)
