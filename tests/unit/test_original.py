# SPDX-License-Identifier: Apache-2.0
"""What a recipe may name as its SAM 3: a sam3.pt, converted once, and the kinds of folder; and what is refused."""

import json
import multiprocessing
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3VideoModel, Sam3VideoProcessor

from effsam3.models.chassis import sam3_pt as original
from effsam3.models.chassis.cache import kept_in_cache
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.pickled import PickledError
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import (
    EXTRAS_FILE,
    TRUNK,
    ChassisError,
    fingerprint,
    map_tensors,
    read_config,
    read_tensors,
)
from effsam3.models.image.student import StudentTrunkConfig
from effsam3.models.image.teacher import Teacher
from effsam3.models.keymaps.sam3 import CLASS_ROW, POINTS, to_original
from effsam3.models.memory.tracker import EfficientTrackerConfig
from effsam3.models.registry import SAM3
from effsam3.models.text.student import TextTeacher, lite_text_config, lite_text_detector_config

ONE = {"tracker.no_mem_embed": torch.ones(1, 1, 128)}


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


@pytest.fixture(scope="module")
def extra():
    """What transformers has no place for, made up."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"direct": (128, 2), "pool": (128, 128), "pos_enc": (128, 128)}
    made = {CLASS_ROW: torch.randn(1, 1, 64, generator=generator)}
    for name in POINTS:
        what = next(what for what in shapes if f"points_{what}_" in name)
        made[name] = torch.randn(shapes[what] if name.endswith("weight") else 128, generator=generator)
    return made


@pytest.fixture(scope="module")
def tensors(folder, extra):
    """The tiny chassis in SAM 3's own format."""
    trunk = read_config(folder).detector_config.vision_config.backbone_config
    return to_original(read_tensors(folder), extra, trunk)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFSAM3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def saved(tmp_path, cache, folder):
    """Return a function that saves tensors as a sam3.pt with the tiny chassis' config, or with another or none."""

    tiny = json.loads((folder / "config.json").read_text())

    def save(tensors, name="sam3.pt", config=tiny, **others):
        about = {} if config is None else {"effsam3": json.dumps({"config": config, "slots": {}})}
        torch.save({"model": tensors, **about, **others}, tmp_path / name)
        return str(tmp_path / name)

    return save


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---- conversion


def test_a_converted_file_is_the_model_that_it_came_from(saved, tensors, folder, extra):
    converted = chassis_folder(saved(tensors))
    assert_same(read_tensors(converted), read_tensors(folder))
    assert_same(load_file(converted / EXTRAS_FILE), extra)
    assert read_config(converted).to_dict() == read_config(folder).to_dict()
    model, info = Sam3VideoModel.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    processor = Sam3VideoProcessor.from_pretrained(converted)
    assert processor.image_processor.size["height"] == 224
    assert (converted / "config.json").stat().st_mode & 0o777 == 0o644


def test_a_large_file_is_written_in_shards(saved, tensors, folder, monkeypatch):
    monkeypatch.setattr(original, "SHARD_BYTES", 2_000_000)
    converted = chassis_folder(saved(tensors))
    shards = sorted(converted.glob("model-*.safetensors"))
    largest = max(tensor.nbytes for tensor in read_tensors(folder).values())
    assert len(shards) > 5 and max(shard.stat().st_size for shard in shards) < largest + 50_000
    assert_same(read_tensors(converted), read_tensors(folder))
    assert not any(Sam3VideoModel.from_pretrained(converted, output_loading_info=True)[1].values())


def test_content_decides_not_the_name(saved, tensors, cache):
    first = chassis_folder(saved(tensors))
    written = (first / "config.json").stat().st_mtime_ns
    assert (
        chassis_folder(saved(tensors, "renamed.pth", epoch=1)) != first
    )  # another content, if only in the extra entries
    assert chassis_folder(saved(tensors, "another_name.pt")) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    changed = tensors | {"tracker.no_mem_embed": tensors["tracker.no_mem_embed"] + 1}
    assert chassis_folder(saved(changed)) != first
    assert not [path for path in cache.iterdir() if path.is_dir() and path.name.startswith(".")]


def _convert(path):
    return str(chassis_folder(path)), os.getpid()


def test_several_processes_convert_once(saved, tensors, cache, folder, capfd):
    path = saved(tensors)
    with multiprocessing.get_context("spawn").Pool(2) as pool:  # a fork of threads may hang
        found = pool.map(_convert, [path] * 2, chunksize=1)
    assert len({place for place, _ in found}) == 1
    assert capfd.readouterr().err.count("to transformers' format, once") == 1
    assert_same(read_tensors(Path(found[0][0])), read_tensors(folder))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_failure_leaves_nothing_behind(cache):
    def write(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_in_cache("something", write)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_named(saved, tensors, tmp_path, monkeypatch):
    path = saved(tensors)
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFSAM3_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ChassisError, match=r"cannot be written .*GB are free there.*EFFSAM3_CACHE"):
        chassis_folder(path)


def student_config(config, slot):
    """The tiny chassis' config with a student in a slot."""
    config = deepcopy(config)
    if slot == "image":
        student = StudentTrunkConfig(timm_name="test_convnext", hidden_size=64, image_size=224)
        config.detector_config.vision_config.backbone_config = deepcopy(student)
        config.tracker_config.vision_config.backbone_config = deepcopy(student)
    elif slot == "text":
        config.detector_config = lite_text_detector_config(config.detector_config, lite_text_config("tiny_text", 32))
    else:
        values = {key: value for key, value in config.tracker_config.to_dict().items() if key != "model_type"}
        config.tracker_config = EfficientTrackerConfig(**values)
    return config


@pytest.mark.parametrize("slot", ["image", "text", "memory"])
def test_a_file_with_students_in_it(saved, folder, slot):
    config = student_config(read_config(folder), slot)
    model = Sam3VideoModel(deepcopy(config)).eval()
    shared = model.tracker_model.shared_image_embedding.positional_embedding
    model.tracker_model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    wanted = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    trunk = None if slot == "image" else config.detector_config.vision_config.backbone_config
    converted = chassis_folder(saved(to_original(wanted, {}, trunk), config=config.to_dict()))
    assert_same(read_tensors(converted), wanted)
    again, info = Sam3VideoModel.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()) and type(again.tracker_model) is type(model.tracker_model)


# ---- half precision


def test_half_precision_becomes_float32(saved, tensors, folder, tmp_path):
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    rounded = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in read_tensors(folder).items()
    }
    converted = chassis_folder(saved(halves))
    assert_same(map_tensors(converted), rounded)
    # The same numbers in a folder that keeps them in half precision.
    shutil.copytree(folder, tmp_path / "half")
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in rounded.items()},
        tmp_path / "half" / "model.safetensors",
        {"format": "pt"},
    )
    half = tmp_path / "half"
    assert {tensor.dtype for tensor in map_tensors(half, TRUNK).values()} == {torch.float16}
    assert_same(read_tensors(half), rounded)
    assert fingerprint(map_tensors(half)) == fingerprint(rounded)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[49406, 320, 1929, 49407]])
    for tap in ("trunk", "neck"):
        ours, theirs = Teacher.from_folder(converted, tap), Teacher.from_folder(half, tap)
        assert ours.fingerprint == theirs.fingerprint
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=1e-4, atol=1e-5)
    ours, theirs = TextTeacher.from_folder(converted), TextTeacher.from_folder(half)
    assert ours.fingerprint == theirs.fingerprint
    torch.testing.assert_close(ours(ids, ids > 0), theirs(ids, ids > 0), rtol=1e-4, atol=1e-5)


# ---- files that are refused


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: without(t, "geometry_encoder"),
            r"not a whole SAM 3 .*missing: 42 \(detector_model.geometry_encoder",
        ),
        (lambda t: t | {"detector.extra": torch.ones(1)}, "not in SAM 3's own format: 1 of .*detector.extra"),
        (lambda t: t | {"tracker.no_mem_embed": torch.ones(1, 1, 7)}, r"of another shape: 1 \(.*\(1, 1, 7\) for"),
        (lambda t: {"encoder.weight": torch.ones(1)}, "not in SAM 3's own format: 1 of 1 tensors"),
    ],
)
def test_what_is_not_a_whole_sam3(saved, tensors, cache, change, match):
    with pytest.raises(ChassisError, match=match):
        chassis_folder(saved(change(dict(tensors))))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_without_a_config_the_sizes_must_be_the_published_ones(saved, tensors):
    with pytest.raises(ChassisError, match="of the published sizes, which it must have as it names no others"):
        chassis_folder(saved(tensors, config=None))


def test_a_config_that_cannot_be_read(saved):
    for broken in ("{", "[]", '{"slots": {}}'):
        with pytest.raises(ChassisError, match="the description of .* under 'effsam3' is damaged"):
            chassis_folder(saved(ONE, config=None, effsam3=broken))


def test_efficientsam3_is_to_be_imported(saved):
    name = "detector.backbone.vision_backbone.trunk.model.backbone.model.stem.0.c.weight"
    with pytest.raises(ChassisError, match="`effsam3 import .*sam3.pt`"):
        chassis_folder(saved({name: torch.ones(1)}, config=None))


def test_files_that_cannot_be_read(saved, tensors, tmp_path):
    with pytest.raises(PickledError, match="nowhere.pt cannot be read"):
        chassis_folder("nowhere.pt")
    path = Path(saved(tensors))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PickledError, match="is cut short"):
        chassis_folder(str(path))


# ---- folders


def test_of_a_run_folder_it_is_the_merged_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "merged")
    (tmp_path / "run" / "recipe.yaml").touch()
    assert chassis_folder(str(tmp_path / "run")) == tmp_path / "run" / "merged"
    assert sam3_of(str(tmp_path / "run")).sizes == sam3_of("tiny").sizes


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["recipe.yaml"], "a run folder without a merged model; run `effsam3 merge`"),
        (["student.safetensors", "trainer.json"], "a training checkpoint: a student without the rest"),
        (["optimizer.bin", "random_states_0.pkl", "model.safetensors"], "accelerate's training state"),
        (["sam3.pt", "readme.txt"], r"if .*sam3.pt is meant, name that file"),
        (["readme.txt"], "has no config.json; expected a folder in transformers' format"),
        ([], "has no config.json; expected"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, match):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ChassisError, match=match):
        chassis_folder(str(tmp_path))


def test_a_single_file_of_another_kind(folder, tmp_path):
    with pytest.raises(ChassisError, match=f"name its folder, {folder}"):
        chassis_folder(str(folder / "model.safetensors"))
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ChassisError, match="weights.safetensors cannot be read"):
        chassis_folder(str(tmp_path / "weights.safetensors"))
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ChassisError, match="single file of another kind; expected .*sam3.pt.*facebook/sam3, `tiny`"):
        chassis_folder(str(tmp_path / "weights.onnx"))


# ---- sizes without torch


def test_facts_of_a_file(saved):
    assert sam3_of(saved(ONE)).sizes == sam3_of("tiny").sizes
    assert sam3_of(saved(ONE, config=None)).sizes == SAM3.sizes


def test_the_made_up_chassis_is_in_both_formats(folder):
    held = read_tensors(folder, "tracker_model.")
    shared = held["shared_image_embedding.positional_embedding"]
    assert torch.equal(held["prompt_encoder.shared_embedding.positional_embedding"], shared)
