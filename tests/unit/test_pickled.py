# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save: what is read, and every way in which a file can be wrong, made for real."""

import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from effsam3.models.chassis.pickled import open_pickled
from effsam3.models.chassis.torch_file import PickledError, content_key


def weights(seed=0):
    """A few tensors of several types."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(40, 50, generator=generator),
        "a.half": torch.randn(7, generator=generator).half(),
        "b.count": torch.tensor(3),
    }


def prefixed(prefix, seed=0):
    return {prefix + name: tensor for name, tensor in weights(seed).items()}


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves something and returns the file."""

    def save(content, name="model.pt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---- what is read


WRAPPINGS = {
    "bare": lambda t: t,
    "ordered": OrderedDict,
    "model": lambda t: {"model": t, "epoch": 3, "args": {"lr": 0.1}},
    "state_dict": lambda t: {"state_dict": t, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "twice": lambda t: {"model": {"state_dict": t}},
    "parameters": lambda t: {n: torch.nn.Parameter(x) if x.is_floating_point() else x for n, x in t.items()},
    "a counter beside": lambda t: {"model": t, "steps": torch.tensor(7)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_model_is_found_in_what_stands_around_it(saved, wrapping):
    found = open_pickled(saved(WRAPPINGS[wrapping](weights()))).tensors
    assert_same(found, weights())
    assert not any(isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad for tensor in found.values())


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.model.",
    "model.module.",
    "module.module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(saved, prefix):
    assert_same(open_pickled(saved({"model": prefixed(prefix)})).tensors, weights())


def test_a_compiled_part_is_unwrapped_and_other_names_stay(saved):
    tensors = {"detector.model.w": torch.ones(1), "detector._orig_mod.v": torch.ones(2), "model.x": torch.ones(3)}
    assert list(open_pickled(saved(tensors)).tensors) == ["detector.model.w", "detector.v", "model.x"]
    assert list(open_pickled(saved({"x.module.y": torch.ones(1)})).tensors) == ["x.module.y"]


def test_tensors_stay_on_the_disk(saved):
    path = saved({"big": torch.ones(5_000_000)})
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()
    tensor = open_pickled(path).tensors["big"]
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    assert tensor.sum() == 5_000_000


def test_the_old_format_is_read_too(saved):
    path = saved({"model": weights()}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_same(open_pickled(path).tensors, weights())


def test_what_stands_beside_is_kept_apart(saved):
    found = open_pickled(saved({"model": weights(), "effsam3": '{"config": {}}', "meta": {"length": 16}}))
    assert found.entry == ("model",) and not found.is_average
    assert found.aside == {"effsam3": '{"config": {}}', "meta": {"length": 16}}


# ---- averaged weights


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"model": weights(0), "model_ema": weights(1)}, ("model_ema",)),
        ({"state_dict": prefixed("module.", 0), "state_dict_ema": weights(1)}, ("state_dict_ema",)),
        ({"model": weights(0), "ema": {"module": weights(1), "updates": 5}}, ("ema", "module")),
        ({"ema": weights(1)}, ("ema",)),
        (prefixed("model.", 0) | prefixed("model_ema.", 1), ("model_ema",)),
        ({"state_dict": prefixed("model.", 0) | prefixed("ema.", 1)}, ("state_dict", "ema")),
    ],
)
def test_the_averaged_weights_are_taken_and_that_is_said(saved, content, entry):
    found = open_pickled(saved(content))
    assert_same(found.tensors, weights(1))
    assert found.entry == entry and found.is_average


def test_torchs_own_average(saved):
    model = torch.nn.Linear(3, 2)
    average = AveragedModel(model)
    average.update_parameters(model)
    found = open_pickled(saved({"model": model.state_dict(), "ema_model": average.state_dict()}))
    assert found.entry == ("ema_model",)
    assert_same(found.tensors, model.state_dict())


def test_an_average_of_another_model_is_ambiguous(saved):
    other = weights() | {"c": torch.ones(1)}
    with pytest.raises(PickledError, match=r"both model and ema, whose tensors differ .*\(first: c\)"):
        open_pickled(saved({"model": weights(), "ema": other}))
    with pytest.raises(PickledError, match="holds 2 models: model, state_dict"):
        open_pickled(saved({"model": weights(), "state_dict": weights(1)}))


# ---- what is not a checkpoint of tensors


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_code_is_named_and_not_run(saved, tmp_path, new):
    path = saved({"model": weights(), "x": Code(tmp_path / "trace")}, _use_new_zipfile_serialization=new)
    with pytest.raises(PickledError, match="posix.system"):
        open_pickled(path)
    assert not (tmp_path / "trace").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "trace").exists()  # it would have run


def test_objects_are_named(saved):
    with pytest.raises(PickledError, match=r"\(types.SimpleNamespace\); nothing of it was run.*torch.save"):
        open_pickled(saved({"model": weights(), "args": SimpleNamespace(lr=1)}))
    with pytest.raises(PickledError, match="torch.nn.modules.linear.Linear"):
        open_pickled(saved(torch.nn.Linear(2, 2)))


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_a_file_cut_short(saved, share, new):
    path = saved(weights(), _use_new_zipfile_serialization=new)
    cut(path, share)
    with pytest.raises(PickledError, match="is cut short or damaged|is damaged or holds"):
        open_pickled(path)


def test_a_damaged_byte_is_found(saved):
    path = saved(weights())
    content = bytearray(path.read_bytes())
    content[content.index(weights()["a.weight"].numpy().tobytes()) + 99] ^= 1
    path.write_bytes(content)
    torch.load(path, mmap=True)  # does not see it
    with pytest.raises(PickledError, match="record model/data/0 does not have its checksum"):
        open_pickled(path)


def test_files_of_something_else(saved, tmp_path):
    path = tmp_path / "other.pt"

    def refused(match):
        with pytest.raises(PickledError, match=match):
            open_pickled(path)

    for match in ("cannot be read .No such file", "cannot be read .Is a directory"):
        with pytest.raises(PickledError, match=match):
            content_key(path)
        refused(match)
        path.mkdir(exist_ok=True)
    path.rmdir()
    path.touch()
    refused("it is empty")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("begins with b'version https://git-lfs")
    save_file(weights(), path)
    refused(r'begins with .*\{"b.count":\{"dtype"')
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused("is damaged or holds more than tensors")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    refused("is .*TorchScript")
    path.write_bytes(pickle.dumps(weights()))
    refused("is damaged or holds more than tensors")
    with zipfile.ZipFile(saved(weights())) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    refused("was packed again after torch.save wrote it")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.ones(3), "holds a Tensor; expected tensors by name"),
        ([torch.ones(3)], "holds a list"),
        ({}, "does not hold tensors by name: nothing"),
        ({"model": {}}, r"tensors by name \(under model\): nothing"),
        ({"epoch": 3}, r"tensors by name: epoch \(int\)"),
        ({"first": weights(), "second": weights()}, r"first \(dict\), second \(dict\); .* under model, state_dict"),
        ({**weights(), "epoch": 3}, r"tensors by name: epoch \(int\); expected"),
        ({"model": {**weights(), "parts": [1]}}, r"\(under model\): parts \(list\);"),
        ({"model": {"n_averaged": torch.ones(1)}}, "nothing"),
        (torch.optim.AdamW([torch.ones(2)]).state_dict(), r"state \(dict\), param_groups \(list\)"),
        ({"optimizer": {"state": {}}, "epoch": 1}, r"optimizer \(dict\), epoch \(int\)"),
        ({"model": {"a": torch.eye(3).to_sparse()}}, "the tensor a is sparse"),
        ({"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}, "1 tensors twice, .*a._orig_mod.w and a.w"),
        ({"module.w": torch.ones(1), "w": torch.ones(1)}, "1 tensors twice, .*module.w and w"),
    ],
)
def test_contents_that_are_no_model(saved, content, match):
    with pytest.raises(PickledError, match=match):
        open_pickled(saved(content))


# ---- the key of the content


def test_the_key_is_of_the_content_not_of_the_name(saved, tmp_path):
    key = content_key(saved(weights()))
    assert len(key) == 16
    assert content_key(saved(weights(), "renamed_before_saving.pt")) == key
    shutil.copyfile(tmp_path / "model.pt", tmp_path / "copy.pth")
    assert content_key(tmp_path / "copy.pth") == key
    others = [
        weights() | {"b.count": torch.tensor(4)},
        {"model": weights()},
        {name.upper(): tensor for name, tensor in weights().items()},
        weights() | {"a.weight": weights()["a.weight"].T},
        weights() | {"a.half": weights()["a.half"].view(torch.bfloat16)},
    ]
    keys = {content_key(saved(other)) for other in others}
    assert len(keys | {key}) == 6


def test_files_without_checksums_are_keyed_by_their_bytes(saved):
    torch.serialization.set_crc32_options(False)
    try:
        keys = {content_key(saved(weights(seed))) for seed in range(3)}
        assert_same(open_pickled(saved(weights())).tensors, weights())
    finally:
        torch.serialization.set_crc32_options(True)
    old = {content_key(saved(weights(seed), _use_new_zipfile_serialization=False)) for seed in range(3)}
    assert len(keys | old) == 6
