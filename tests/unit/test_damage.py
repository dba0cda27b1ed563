# SPDX-License-Identifier: Apache-2.0
"""Files that are read back, damaged at random: an error that names the file, or exactly what the file holds."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from mutations import mutate_bytes, mutate_json, mutate_record
from run_folders import image_run, merged_run
from safetensors.torch import load_file, save_file

from effsam3 import cli, merge
from effsam3.errors import UserError
from effsam3.inspect_model import examine
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.pickled import open_pickled
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import load_part, map_tensors, read_config, read_tensors
from effsam3.models.chassis.torch_file import content_key
from effsam3.models.merging.slots import MergeError, first_chassis, read_card
from effsam3.recipe.reader import load_recipe
from effsam3.training.checkpoint import CheckpointError, read_trained, read_weights

MUTATIONS = 200
WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.half": torch.linspace(-1, 1, 7).half(),
    "b.num_batches_tracked": torch.tensor(3),
    "b.running_var": torch.ones(4),
}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7)), name


def refused_or(read, check) -> int:
    """1 if a file is refused by name, 0 if it is accepted and the check of what was read passes."""
    try:
        found = read()
    except UserError as error:
        assert len(str(error)) > 20 and "Traceback" not in str(error)
        return 1
    check(found)
    return 0


# ---- tensors


@pytest.mark.parametrize("kind", ["zip", "records with right checksums", "old"])
def test_files_of_torch_save(tmp_path, kind):
    rng, whole, path = np.random.default_rng(1), tmp_path / "whole.pt", tmp_path / "damaged.pt"
    torch.save({"model": WEIGHTS, "epoch": 3}, whole, _use_new_zipfile_serialization=kind != "old")
    same(open_pickled(whole).tensors, WEIGHTS)

    def check(pickled):
        if kind == "zip":  # the others have no checksum that tells
            same(pickled.tensors, WEIGHTS)
        str(pickled.tensors)
        content_key(path)

    refused = 0
    for _ in range(MUTATIONS):
        if kind.startswith("records"):
            mutate_record(whole, path, rng)
        else:
            path.write_bytes(mutate_bytes(whole.read_bytes(), rng))
        refused += refused_or(lambda: open_pickled(path), check)
    assert refused > MUTATIONS / 3


def by_hand(path) -> dict[str, torch.Tensor]:
    """Read a safetensors file without safetensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    types = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    return {
        name: torch.frombuffer(
            bytearray(data[8 + length :][slice(*said["data_offsets"])]), dtype=types[said["dtype"]]
        ).reshape(said["shape"])
        for name, said in json.loads(data[8 : 8 + length]).items()
        if name != "__metadata__"
    }


def test_safetensors(tmp_path):
    rng, whole = np.random.default_rng(2), tmp_path / "whole.safetensors"
    save_file(WEIGHTS, whole)
    path = tmp_path / "student.safetensors"
    refused = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate_bytes(whole.read_bytes(), rng))
        refused += refused_or(lambda: read_weights(tmp_path), lambda found: same(found, by_hand(path)))
    assert refused > MUTATIONS / 3


def quantised():
    return torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("a.weight", lambda: torch.tensor([1.0, float("nan")]), "has NaN in 1 of 2 numbers: its training went wrong"),
        ("a.weight", lambda: torch.tensor([1.0, float("-inf")]), "is infinite in 1 of 2 numbers"),
        ("a.weight", lambda: torch.tensor([float("inf")]).half(), "is infinite in 1 of 1"),
        ("b.running_var", lambda: torch.tensor([1.0, -0.5]), "is a variance and goes down to -0.5, below zero"),
        ("a.weight", lambda: torch.ones(2, dtype=torch.complex64), "is complex64, expected a weight in float32"),
        ("a.weight", lambda: torch.ones(2, dtype=torch.int8), "is int8, expected a weight in float32"),
        ("a.weight", lambda: torch.ones(2, dtype=torch.int64), "is int64, expected a weight"),
        ("a.weight", lambda: torch.ones(2).to(torch.float8_e4m3fn), "is float8_e4m3fn, expected a weight"),
        ("a.weight", quantised, "quantised"),
        ("a.weight", lambda: torch.eye(3).to_sparse(), "sparse"),
        ("a.weight", lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        ("a.weight", lambda: torch.ones(3, device="meta"), "meta"),
        ("a.weight", lambda: torch.ones(1).expand(1000), "repeats numbers instead of having its own"),
    ],
)
def test_tensors_that_cannot_be_weights(tmp_path, name, make, told):
    from effsam3.tensor_files import TensorFileError, refuse_unusable

    tensor = make()
    with pytest.raises(TensorFileError, match=told):
        refuse_unusable({"first": torch.ones(2), name: tensor}, "here", "fix it")
    torch.save({"model": WEIGHTS | {name: tensor}}, tmp_path / "m.pt")
    with pytest.raises(UserError, match=told):
        refuse_unusable(open_pickled(tmp_path / "m.pt").tensors, "here", "fix it")
    if type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_quantized:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            save_file(WEIGHTS | {name: tensor}, tmp_path / "student.safetensors")
            with pytest.raises(CheckpointError, match=f"student.safetensors: the tensor {name} {told}"):
                read_weights(tmp_path)


def test_a_nan_student_is_refused_for_the_reason_and_leaves_nothing(tmp_path):
    run = image_run(tmp_path)
    (weights,) = run.glob("checkpoints/best-*/student.safetensors")
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=f"{name} has NaN in 1 of .*; choose another merge.checkpoint"):
        merge.run(load_recipe(run / "recipe.yaml"))
    assert not list(tmp_path.rglob("*.partial")) and not (run / "merged").exists()


# ---- folders


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged model of one shard and an index, and the run that it is of."""
    return merged_run(tmp_path_factory.mktemp("runs"), "image")


def sharded(folder, to):
    """A copy of a model's folder with its weights in two shards."""
    to = shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for number, half in enumerate(halves):
        save_file(half, to / f"model-{number}.safetensors", {"format": "pt"})
    where = {name: f"model-{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return to, tensors


def test_a_folder_holds_one_model(merged, tmp_path):
    folder, tensors = sharded(merged / "merged", tmp_path / "model")
    same(map_tensors(folder), tensors)
    save_file({"older": torch.ones(1)}, folder / "model.safetensors")
    for read in (map_tensors, read_tensors):
        with pytest.raises(UserError, match="holds two models, model.safetensors and the shards of"):
            read(folder)


def readers(folder, run, chassis):
    """File -> what reads it in the verbs, cheap ones alone."""
    return {
        folder / "model.safetensors.index.json": lambda: map_tensors(folder),
        folder / "effsam3.json": lambda: first_chassis(read_card(folder, {"chassis": str, "revision": (str, None)})),
        folder / "config.json": lambda: read_config(folder),
        chassis / "config.json": lambda: (read_config(chassis), sam3_of(str(chassis)).sizes),
        run / "provenance.json": lambda: merge.part_of("image", run, "best", read_config(chassis_folder("tiny"))),
        run / "recipe.yaml": lambda: load_recipe(run / "recipe.yaml"),
    }


@pytest.mark.parametrize("number", range(6))
def test_json_of_models_and_runs(merged, tmp_path, number):
    folder, tensors = sharded(merged / "merged", tmp_path / "model")
    run = shutil.copytree(merged, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    chassis = shutil.copytree(chassis_folder("tiny"), tmp_path / "chassis")
    path, read = list(readers(folder, run, chassis).items())[number]
    rng, whole = np.random.default_rng(3), path.read_bytes()
    read()
    refused = 0
    as_json = path.suffix == ".json"
    builds = path in (folder / "config.json", run / "provenance.json")  # a student each time, which takes long
    count = MUTATIONS // 5 if builds else MUTATIONS
    for _ in range(count):
        path.write_bytes((mutate_json if as_json else mutate_bytes)(whole, rng))
        refused += refused_or(read, lambda found: number or same(found, tensors))
    assert refused > count / 10


@pytest.mark.parametrize("name", ["trainer.json", "recipe.yaml", "provenance.json", "metrics.jsonl", "progress.json"])
def test_status_of_a_damaged_run(merged, tmp_path, name, capsys):
    run = shutil.copytree(merged, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 0.4}\n')
    if name == "progress.json":
        numbers = dict.fromkeys(("step", "steps", "first_step", "pid", "global_batch"), 4)
        times = dict.fromkeys(("started", "updated", "interval_s", "samples_per_s"), 1.5)
        texts = {"state": "complete", "host": "here", "hardware": "1 x cpu", "error": ""}
        (run / name).write_text(json.dumps(numbers | times | texts))
    (path,) = run.glob("checkpoints/*step-*/trainer.json") if name == "trainer.json" else [run / name]
    rng, whole = np.random.default_rng(4), path.read_bytes()
    for number in range(MUTATIONS):
        path.write_bytes((mutate_json if name.endswith(".json") else mutate_bytes)(whole, rng))
        arguments = ["inspect", str(path.parent)] if name == "trainer.json" and number < 20 else ["status", str(run)]
        assert cli.main(arguments) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_checkpoint_to_go_on_from(merged, tmp_path):
    from effsam3.training.resume import read_trainer

    (checkpoint,) = merged.glob("checkpoints/*step-*")
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    save_file({"exp_avg/a": torch.ones(2)}, folder / "optimizer.safetensors")
    content = {"step": 7, "best": {"step": 7, "val/cosine": 0.5}, "untrained": None, "worse": 0, "ended": True}
    whole = json.dumps(content).encode()
    rng = np.random.default_rng(5)
    for _ in range(MUTATIONS):
        (folder / "trainer.json").write_bytes(mutate_json(whole, rng))
        refused_or(lambda: read_trainer(folder), lambda found: found["step"] + 1)
    read_trained(folder)
    (folder / "optimizer.safetensors").unlink()
    (folder / "optimizer.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="optimizer.safetensors cannot be read .it is a folder, expected a file"):
        read_trained(folder)


@pytest.mark.parametrize("name", ["config.json", "effsam3.json", "model.safetensors"])
def test_inspect_of_a_damaged_model(merged, tmp_path, name):
    folder = shutil.copytree(merged / "merged", tmp_path / "model")
    path = folder / name
    rng, whole = np.random.default_rng(6), path.read_bytes()
    tensors = {key: tensor.clone() for key, tensor in map_tensors(folder).items()}
    for _ in range(12):
        path.write_bytes((mutate_json if name.endswith(".json") else mutate_bytes)(whole, rng))
        refused_or(lambda: examine(str(folder)), lambda facts: facts["parts"])
    path.write_bytes(whole)
    same(map_tensors(folder), tensors)
    examine(str(folder))


def test_integers_and_layers_without_end_are_refused_before_they_are_built(tmp_path):
    folder = shutil.copytree(chassis_folder("tiny"), tmp_path / "model")
    whole = json.loads((folder / "config.json").read_text())
    for key, value in (("num_hidden_layers", 10**9), ("hidden_size", 2**40), ("num_attention_heads", 7)):
        content = json.loads(json.dumps(whole))
        content["detector_config"]["vision_config"]["backbone_config"][key] = value
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="config.json describes no SAM 3: .*backbone_config"):
            read_config(folder)
    (folder / "config.json").write_text(json.dumps(whole))
    with torch.device("meta"):
        layer = torch.nn.Linear
    whole_numbers = {"weight": torch.ones(2, 2, dtype=torch.int64), "bias": torch.ones(2)}
    with pytest.raises(UserError, match="not floating point: 1 .weight torch.int64"):
        load_part(layer(2, 2), whole_numbers)


def test_moments_of_another_student_are_refused():
    from effsam3.training.optimizer_state import refuse_other_moments

    student = torch.nn.Linear(3, 2)
    good = {"exp_avg/weight": -torch.ones(2, 3), "exp_avg_sq/weight": torch.ones(2, 3)}
    refuse_other_moments(student, good, "here")
    for wrong in (
        good | {"exp_avg/weight": torch.ones(3, 2)},
        good | {"exp_avg/other": torch.ones(2)},
        good | {"exp_avg_sq/weight": -torch.ones(2, 3)},
    ):
        with pytest.raises(UserError, match="here: exp_avg.* is not the state of this student's optimizer"):
            refuse_other_moments(student, wrong, "here")


def test_a_merge_that_fails_while_it_writes_leaves_nothing(tmp_path, monkeypatch):
    run = image_run(tmp_path)
    folder = tmp_path / "image" / ".merged.partial" / "config.json"

    def full(path, content):
        assert folder.is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effsam3.models.merging.formats.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        merge.run(load_recipe(run / "recipe.yaml"))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_chassis_that_was_merged_into_itself_ends(merged, tmp_path):
    folder = shutil.copytree(merged / "merged", tmp_path / "model")
    card = json.loads((folder / "effsam3.json").read_text())
    card |= {"chassis": str(folder), "revision": None}
    (folder / "effsam3.json").write_text(json.dumps(card))
    with pytest.raises(MergeError, match="names a chassis that was merged into itself"):
        first_chassis(read_card(folder))
