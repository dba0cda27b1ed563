# SPDX-License-Identifier: Apache-2.0
"""Stage vision from the recipe to masks: trained from the trunk of a stage 1 student, merged, loaded elsewhere; and to
a small video model, with a memory that learns on top of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, metrics, run, run_here, run_line
from run_folders import sure_chassis
from safetensors.torch import load_file

from effsam3.errors import UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, read_config, read_tensors
from effsam3.models.merging.slots import SLOTS
from effsam3.models.vision.slot import build_vision_student
from effsam3.models.vision.training import MAPS
from effsam3.recipe.reader import load_recipe
from effsam3.stages.memory.training import load_trackers
from effsam3.training import checkpoint

IMAGE, SMOKE, MEMORY, RELEASE = (
    REPOSITORY / f"recipes/smoke/{name}.yaml" for name in ("image", "vision", "memory", "release")
)
STEPS = 12
# Without effsam3's own loader: transformers' classes, once effsam3.auto has been imported.
RELOAD = """
import sys, torch, effsam3.auto
from safetensors.torch import save_file
from transformers import Sam3TrackerVideoModel, Sam3VideoModel
torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing was written to is NaN
pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
with torch.no_grad():
    whole = Sam3VideoModel.from_pretrained(sys.argv[1]).eval()
    maps = whole.detector_model.get_vision_features(pixels).fpn_hidden_states[:-1]
    tracker = Sam3TrackerVideoModel.from_pretrained(sys.argv[1]).eval()
    maps += tracker.vision_encoder(pixels).fpn_hidden_states[:-1]
save_file({str(place): feat.contiguous() for place, feat in enumerate(maps)}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with a student of stage image, and one of stage vision that begins with its trunk, merged."""
    folder = tmp_path_factory.mktemp("vision")
    common = (
        f"sam3.checkpoint={sure_chassis(folder / 'chassis')}",
        f"data.index={folder}/data/index.parquet", "data.synthetic_images=24", f"embed.to={folder}/teacher",
        f"train.runs={folder}/runs", "train.global_batch_size=4", "train.micro_batch_size=4", "train.eval_samples=8",
        "train.log_every=1", "optim.warmup_steps=2", "evaluate.max_images=4", "evaluate.pictures=1",
        "evaluate.benchmarks=[fidelity,masks]",
    )  # fmt: skip
    image = (*common, "name=stage1", "train.steps=4", "train.eval_every=4", "train.save_every=4")
    for verb in ("embed", "train", "merge"):
        run_here(folder, verb, *image, recipe=IMAGE)
    lasting = (f"train.steps={STEPS}", "train.eval_every=6", "train.save_every=6")
    own = (*common, f"student_init={folder}/runs/stage1", *lasting)
    printed = run_here(folder, "train", *own, recipe=SMOKE)
    assert f"those of {folder}/runs/stage1" in printed
    printed = run_here(folder, "merge", *own, recipe=SMOKE)
    assert "what stood in the slot vision" in printed
    return folder, own


def test_every_map_comes_nearer(runs):
    held_out = metrics(runs[0] / "runs/smoke-vision", "val/cosine")
    start, end = held_out[0], held_out[STEPS]
    assert end["val/cosine"] > start["val/cosine"] + 0.02 and end["val/mse"] < start["val/mse"]
    for name in MAPS:
        assert end[f"val/cosine_{name}"] > start[f"val/cosine_{name}"], name


def test_each_tensor_has_one_owner_and_the_rest_is_sam3s(runs):
    before, after = read_tensors(runs[0] / "chassis"), read_tensors(runs[0] / "runs/smoke-vision/merged")
    owns = SLOTS["vision"].owns
    rest, there = ({name for name in one if not name.startswith(owns)} for one in (before, after))
    assert rest == there and all(torch.equal(before[name], after[name]) for name in rest)
    assert not {name for name in before if name.startswith(owns)} & after.keys()
    trunk = read_tensors(runs[0] / "runs/stage1/merged", TRUNK + "trunk.")
    assert trunk.keys() == read_tensors(runs[0] / "runs/smoke-vision/merged", TRUNK + "trunk.").keys()


def test_a_fresh_process_computes_what_was_trained(runs, tmp_path):
    run_folder = runs[0] / "runs/smoke-vision"
    run_line(tmp_path, [sys.executable, "-c", RELOAD, str(run_folder / "merged"), "maps.safetensors"])
    recipe = load_recipe(run_folder / "recipe.yaml")
    encoder = read_config(chassis_folder("tiny")).detector_config.vision_config
    student = build_vision_student(encoder, recipe.student, recipe.widths, None)
    student.load_state_dict(checkpoint.read_weights(checkpoint.chosen(run_folder / "checkpoints", "best")))
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        _, wanted = student.eval()(pixels)
    found = load_file(tmp_path / "maps.safetensors")
    for place, expected in enumerate(wanted):
        torch.testing.assert_close(found[str(place)], expected, rtol=1e-5, atol=1e-5)


def test_measured_and_predicted_with(runs, tmp_path):
    folder, own = runs
    printed = run_here(folder, "evaluate", *own, recipe=SMOKE)
    assert "maps of both necks, 4 held-out images" in printed and "| tracker, top " in printed
    results = folder / "runs/smoke-vision/eval"
    fidelity = json.loads((results / "fidelity.json").read_text())
    last = metrics(folder / "runs/smoke-vision", "val/cosine")[STEPS]
    assert fidelity["cosine"] == pytest.approx(last["val/cosine"], abs=1e-4)
    assert sorted(fidelity["maps"]) == sorted(MAPS)
    assert 0 < json.loads((results / "masks.json").read_text())["box"]["agreement"] <= 1
    image = next((folder / "data").rglob("*.jpg"))
    line = [sys.executable, "-m", "effsam3.cli", "predict", str(folder / "runs/smoke-vision"), str(image)]
    run_line(tmp_path, [*line, "--box", "20,20,90,90", "--out", "by_box"])
    run_line(tmp_path, [*line, "--text", "red circle", "--out", "by_text"])
    assert (tmp_path / "by_box/overlay.png").is_file() and (tmp_path / "by_text/predictions.json").is_file()


def test_a_small_video_model(runs, tmp_path):
    """A memory learns on top of the student; both are released in one model, measured next to SAM 3's dense memory on
    its own trunk, and predicted with."""
    folder, _ = runs
    vision, memory = folder / "runs/smoke-vision", folder / "runs/smoke-memory"
    own = (
        f"sam3.checkpoint={vision}", f"train.runs={folder}/runs", f"data.index={tmp_path}/videos/index.parquet",
        "data.synthetic_videos=10", "data.synthetic_frames=16", "data.synthetic_side_px=64", "data.frames=3",
        "train.steps=2", "train.eval_every=2", "train.save_every=2", "train.log_every=1", "train.eval_samples=1",
        "train.global_batch_size=2", "train.micro_batch_size=2", "train.loggers=[]", "optim.warmup_steps=1",
        "loss.side_px=56", "evaluate.modes=[dense]", "evaluate.untrained=false", "evaluate.max_videos=1",
    )  # fmt: skip
    with pytest.raises(UserError, match="memory.trains: neck: in .* one student is trunk and both necks"):
        load_trackers(load_recipe(MEMORY, [*own, "memory.trains=[memory,neck]"]), vision / "merged")
    printed = run_here(folder, "train", *own, recipe=MEMORY)
    assert "184 tokens for a frame to read, 1,824 when dense" in printed
    assert all(line["train/memory"] > 0 for line in list(metrics(memory).values())[1:])  # the first step: as it starts
    run_here(folder, "merge", recipe=memory)
    parts = (f"parts.vision={vision}", f"parts.memory={memory}", "parts.image=null", "parts.text=null")
    own = (*parts, f"sam3.checkpoint={folder}/chassis", "merge.formats=[transformers]", f"runs={folder}/runs")
    run_here(folder, "merge", *own, recipe=RELEASE)
    release = folder / "runs/smoke-release"
    student, built_on, whole = (read_tensors(place / "merged") for place in (vision, memory, release))
    assert whole.keys() == built_on.keys() and all(torch.equal(whole[name], built_on[name]) for name in whole)
    owned = [name for name in student if name.startswith(SLOTS["vision"].owns)]
    assert owned and all(torch.equal(whole[name], student[name]) for name in owned)
    printed = run_here(folder, "evaluate", *own, recipe=RELEASE)
    assert "| hybrid, trained " in printed and "| tracker, top " in printed
    trackers = json.loads((release / "eval/memory_vos.json").read_text())["trackers"]
    dense, trained = trackers[f"{folder}/chassis, dense"], trackers["hybrid, trained"]
    assert dense["agreement"] == 1 and 0 < trained["agreement"] < 1 and dense["J&F"] > 0.005 < trained["J&F"]
    # Not only the memory is another: with SAM 3's on every cell it is another model still.
    assert 0 < trackers["dense, same weights"]["agreement"] < 1
    assert trained["memory_tokens"] < trackers["dense, same weights"]["memory_tokens"] == dense["memory_tokens"]
    video = next((tmp_path / "videos").rglob("*.mp4"))
    run_here(tmp_path, "predict", str(video), "--box", "10,10,40,40", "--out", "tracked", recipe=release)
    assert len(list((tmp_path / "tracked/masks").iterdir())) == 16


def test_two_processes_learn_the_same(runs):
    folder, own = runs
    short = ("train.steps=4", "train.eval_every=4", "train.save_every=4")
    run_here(folder, "train", *own, *short, "name=one", recipe=SMOKE)
    more = ("name=two", "train.micro_batch_size=2", "hardware=ddp_cpu")
    assert "2 x cpu" in run(folder, "train", *own, *short, *more, recipe=SMOKE, launch=True)
    one, two = (metrics(folder / "runs" / name) for name in ("one", "two"))
    for step, row in one.items():
        for key in ("train/loss", "train/mse", "train/cosine", "train/grad_norm"):
            assert two[step][key] == pytest.approx(row[key], rel=2e-3), (step, key)
