# SPDX-License-Identifier: Apache-2.0
"""Stage 2, memory: every verb, the same learning on any hardware, and the merged tracker in transformers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, REPOSITORY, command, metrics, run, run_here
from PIL import Image
from run_folders import image_run, sure_chassis, text_run
from safetensors.torch import load_file
from test_trajectories import wait_for
from transformers import AutoModel, Sam3TrackerVideoModel, Sam3VideoModel
from vos_folders import write_vos_trees

from effsam3 import evaluate, merge
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, read_config, read_tensors
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import PARTS
from effsam3.models.merging.slots import MergeError
from effsam3.recipe.reader import load_recipe

MEMORY, TEACHER, RELEASE = (
    REPOSITORY / f"recipes/smoke/{name}.yaml" for name in ("memory", "tiny_teacher", "release")
)
STEPS = 3
SHORT = (
    f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=3", "train.save_every=1", "train.eval_samples=2",
    "train.keep_checkpoints=9", "train.pictures=1", "train.loggers=[]", "optim.warmup_steps=1", "loss.side_px=56",
    # Three frames read a pooled map and latents; corrections make the clicks' randomness count.
    "data.frames=3", "memory.hot_frames=0", "prompts.corrected_frames=2", "prompts.clicks=1",
    "evaluate.max_videos=1", "evaluate.pictures=1", "evaluate.modes=[]", "evaluate.untrained=false",
)  # fmt: skip
BRIEF = ("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "train.eval_samples=1")
MEMORY_TENSORS = tuple(f"tracker_model.{start}" for start in PARTS["memory"])
KEYS = ("loss", "focal", "dice", "iou", "presence", "memory", "grad_norm", "lr")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with drawn videos and a run of one process, `reference`, and the overrides that made it."""
    folder = tmp_path_factory.mktemp("memory")
    overrides = (
        *SHORT, f"sam3.checkpoint={sure_chassis(folder / 'chassis')}", f"train.runs={folder}/runs",
        "data.synthetic_videos=10", "data.synthetic_frames=16", "data.synthetic_side_px=64",
        f"data.index={folder}/videos/index.parquet",
    )  # fmt: skip
    run_here(folder, "train", *overrides, "name=reference", recipe=MEMORY)
    return folder, overrides


def assert_same(folder: Path, name: str, tolerance: float) -> None:
    expected, found = metrics(folder / "runs/reference"), metrics(folder / "runs" / name)
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, values in expected.items():
        for key in (f"train/{key}" for key in KEYS):
            assert found[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-9), (step, key)
    # Drawn by all ranks together; ZeRO-3 would hang where only one does.
    assert (folder / "runs" / name / f"pictures/validation/step-{STEPS:06d}.png").is_file()
    held_out = metrics(folder / "runs/reference", "val/j")
    assert held_out[0]["val/j"] > 0.005
    for step, values in metrics(folder / "runs" / name, "val/j").items():
        assert values["val/j"] == pytest.approx(held_out[step]["val/j"], rel=tolerance)


# ---- the same learning


def test_micro_batches_and_objects_in_turns(runs):
    folder, overrides = runs
    options = ("train.micro_batch_size=2", "train.objects_at_once=1", "train.trunk_batch=2", "train.recompute=true")
    run_here(folder, "train", *overrides, *options, "name=micro", recipe=MEMORY)
    assert_same(folder, "micro", 1e-4)


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero3_cpu"])
def test_two_processes(runs, hardware):
    folder, overrides = runs
    more = ("train.micro_batch_size=2", f"hardware={hardware}", f"name={hardware}")
    assert "2 x cpu" in run(folder, "train", *overrides, *more, recipe=MEMORY, launch=True)
    assert_same(folder, hardware, 1e-4)


def test_stopped_and_resumed(runs):
    folder, overrides = runs
    arguments, checkpoints = ("train", *overrides, "name=resumed"), folder / "runs/resumed/checkpoints"
    process = subprocess.Popen(
        command(*arguments, recipe=MEMORY),
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: (checkpoints / "step-000001").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "resuming from step" in run_here(folder, *arguments, recipe=MEMORY)
    assert_same(folder, "resumed", 1e-12)
    whole, resumed = (
        load_file(folder / "runs" / name / f"checkpoints/step-{STEPS:06d}/student.safetensors")
        for name in ("reference", "resumed")
    )
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_videos_that_break_after_indexing_are_left_out_and_named(runs, tmp_path):
    folder, overrides = runs
    shutil.copytree(folder / "videos", tmp_path / "videos")
    (tmp_path / "videos/synthetic.json").unlink()  # now they are anyone's
    broken = sorted((tmp_path / "videos/videos").glob("*.mp4"))[1]
    broken.write_bytes(broken.read_bytes()[:700])
    own = (f"data.index={tmp_path}/videos/index.parquet", "data.source=sav", "data.synthetic_videos=0", "name=broken")
    printed = run_here(folder, "train", *overrides, *own, "data.limit=4", recipe=MEMORY)
    lines = [json.loads(line) for line in (folder / "runs/broken/unreadable.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{broken.stem}_manual"] and "unreadable.jsonl names them" in printed
    assert len(metrics(folder / "runs/broken")) == STEPS


# ---- merged and measured


@pytest.fixture(scope="module")
def merged(runs) -> tuple[Path, str]:
    """The reference's run folder, merged in both formats and measured, and what was printed."""
    folder, overrides = runs
    names = (*overrides, "name=reference", "evaluate.modes=[dense]", "evaluate.untrained=true")
    merge.run(load_recipe(MEMORY, [*names, "merge.formats=[transformers,sam3]"]))
    return folder / "runs/reference", run_here(folder, "evaluate", *names, recipe=MEMORY)


def test_trained_tensors_and_no_others_are_replaced(runs, merged):
    folder, _ = merged
    model, chassis = read_tensors(folder / "merged"), read_tensors(runs[0] / "chassis")
    student = load_file(next((folder / "checkpoints").glob("best-*")) / "student.safetensors")
    trained = {f"tracker_model.{name}": tensor for name, tensor in student.items()}
    assert {name.split(".")[1] for name in trained} == {prefix.split(".")[0] for prefix in PARTS["memory"]}
    kept = {name for name in chassis if not name.startswith(MEMORY_TENSORS)}
    assert model.keys() == trained.keys() | kept and not trained.keys() & kept
    assert all(torch.equal(model[name], chassis[name]) for name in kept)
    assert all(torch.equal(model[name], tensor) for name, tensor in trained.items())
    unchanged = {name for name, tensor in trained.items() if name in chassis and torch.equal(tensor, chassis[name])}
    # No object was absent in these few steps.
    assert unchanged <= {"tracker_model.occlusion_spatial_embedding_parameter"}


def test_transformers_loads_the_tracker(merged):
    folder, _ = merged
    for model_class in (Sam3VideoModel, EfficientTracker, AutoModel):
        model, info = model_class.from_pretrained(folder / "merged", output_loading_info=True)
        assert not any(info.values()), model_class
    assert type(model) is Sam3VideoModel and type(model.tracker_model) is EfficientTracker
    assert model.tracker_model.config.memory_mode == "hybrid" and model.tracker_model.config.memory_hot_frames == 0


def test_sam3_pt_has_the_memory_under_its_own_names_and_comes_back(merged):
    folder, _ = merged
    names = torch.load(folder / "merged/sam3.pt", mmap=True, weights_only=True)["model"].keys()
    student = load_file(next((folder / "checkpoints").glob("best-*")) / "student.safetensors")
    resampler = {f"tracker.{name}" for name in student if name.startswith("memory_resampler.")}
    assert resampler and resampler == {name for name in names if name.startswith("tracker.memory_resampler.")}
    back = chassis_folder(str(folder / "merged/sam3.pt"))
    before, after = read_tensors(folder / "merged"), read_tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_config(back).to_dict() == read_config(folder / "merged").to_dict()


def test_the_benchmark_measures_every_memory(runs, merged):
    folder, printed = merged
    result = json.loads((folder / "eval/vos.json").read_text())
    teacher = f"{runs[0]}/chassis, dense"
    names = [teacher, "hybrid, trained", "dense, same weights", "hybrid, untrained"]
    trackers = result["trackers"]
    assert list(trackers) == names and result["protocol"] == "sav" and not result["failed"]
    assert trackers[teacher]["agreement"] == 1 and trackers[teacher]["J"] > 0.005
    assert trackers["hybrid, trained"]["memory_tokens"] < trackers["dense, same weights"]["memory_tokens"]
    assert trackers["hybrid, trained"]["J"] != trackers["hybrid, untrained"]["J"]  # other weights
    # Untrained, the latents are means of windows: nearer to the dense memory than three steps of noise.
    assert trackers["hybrid, untrained"]["agreement"] > trackers["hybrid, trained"]["agreement"]
    rows = (folder / "eval/objects.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(one["objects"] for one in trackers.values())
    (picture,) = (folder / "pictures").glob("*.png")
    with Image.open(picture) as image:
        assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 100
    assert (folder / "eval/summary.md").read_text().strip() in printed


@pytest.mark.parametrize(("evaluator", "tree", "mask"), [
    ("sav", "sav_val", "000/00004.png"), ("davis", "davis", "00003.png"),
])  # fmt: skip
def test_videos_in_folders(runs, merged, tmp_path, evaluator, tree, mask):
    folder, overrides = runs
    write_vos_trees(tmp_path, 1, frames=12, side_px=48, objects=2)
    own = [f"evaluate.videos={tmp_path}/{tree}", f"evaluate.evaluator={evaluator}", "evaluate.predictions=true"]
    results = evaluate.run(load_recipe(MEMORY, [*overrides, "name=reference", *own]))
    assert results["vos"]["protocol"] == evaluator and results["vos"]["videos"] == 1
    predictions = folder / "runs/reference/eval/predictions/hybrid, trained/sav_000001"
    assert (predictions / mask).is_file()


# ---- with other runs


@pytest.fixture(scope="module")
def teacher(runs) -> Path:
    """A run that trained the whole tracker and keeps a dense memory, merged."""
    folder, overrides = runs
    own = (*BRIEF, "name=teacher", "data.frames=2", "sam3.checkpoint=tiny")
    run_here(folder, "train", *overrides, *own, recipe=TEACHER)
    merge.run(load_recipe(folder / "runs/teacher/recipe.yaml"))
    return folder / "runs/teacher"


def test_a_tracker_that_learned_everything_is_a_plain_sam3(teacher):
    model, chassis = read_tensors(teacher / "merged"), read_tensors(chassis_folder("tiny"))
    assert read_config(teacher / "merged").to_dict() == read_config(chassis_folder("tiny")).to_dict()
    for model_class in (Sam3VideoModel, Sam3TrackerVideoModel):
        _, info = model_class.from_pretrained(teacher / "merged", output_loading_info=True)
        assert not any(info.values()), model_class
    assert model.keys() == chassis.keys()
    student = load_file(next((teacher / "checkpoints").glob("best-*")) / "student.safetensors")
    student = {name: tensor for name, tensor in student.items() if not name.startswith("memory_resampler.")}
    places = {"vision_encoder.backbone.": TRUNK, "vision_encoder.neck.": "tracker_neck.", "": "tracker_model."}
    trained = {}
    for name, tensor in student.items():
        start = next(start for start in places if name.startswith(start))
        trained[places[start] + name.removeprefix(start)] = tensor
    assert all(torch.equal(model[name], trained.get(name, chassis[name])) for name in model)
    changed = {name for name in model if not torch.equal(model[name], chassis[name])}
    assert all(
        any(name.startswith(start) for name in changed) for start in (*places.values(), "tracker_model.mask_dec")
    )


def test_a_memory_for_a_trained_tracker_and_one_for_an_image_student(runs, teacher):
    """The memory learns from the tracker and the trunk that it will have; then all parts become one model."""
    folder, overrides = runs
    image, text = (make(folder / "runs", name) for make, name in ((image_run, "image"), (text_run, "text")))
    merge.run(load_recipe(image / "recipe.yaml"))
    for name, chassis in (("on-teacher", teacher), ("on-image", image)):
        own = (*BRIEF, f"name={name}", f"sam3.checkpoint={chassis}", "memory.mode=latents")
        run_here(folder, "train", *overrides, *own, recipe=MEMORY)
        together = merge.run(load_recipe(folder / "runs" / name / "recipe.yaml"))
        model, below = read_tensors(together), read_tensors(chassis / "merged")
        assert all(torch.equal(model[name], below[name]) for name in below if not name.startswith(MEMORY_TENSORS))
        slots = json.loads((together / "effsam3.json").read_text())["slots"]
        assert list(slots) == (["image", "memory"] if name == "on-image" else ["memory"])

    def release(memory: str):
        parts = [f"parts.image={image}", f"parts.text={text}", f"parts.memory={folder}/runs/{memory}"]
        own = ["merge.formats=[transformers,sam3]", "sam3.checkpoint=tiny", f"runs={folder}/runs", *parts]
        return merge.run(load_recipe(RELEASE, own))

    whole = release("on-image")
    model, alone = read_tensors(whole), read_tensors(folder / "runs/on-image/merged")
    kept = {name for name in alone if not name.startswith("detector_model.text_")}
    assert kept == {name for name in model if not name.startswith("detector_model.text_")}
    assert all(torch.equal(model[name], alone[name]) for name in kept)
    for model_class in (Sam3VideoModel, EfficientTracker):
        _, info = model_class.from_pretrained(whole, output_loading_info=True)
        assert not any(info.values()), model_class
    with pytest.raises(
        MergeError, match="both tiny_convnext in the slot image .* and dense memory .* bring detector_mod"
    ):
        release("teacher")
