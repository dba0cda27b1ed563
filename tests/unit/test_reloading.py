# SPDX-License-Identifier: Apache-2.0
"""What no file holds is computed when a model is loaded: every buffer that is not persistent, of every model.

transformers builds on `meta` and gives such buffers memory without contents. Memory that nobody has used is often
zero, so what is forgotten shows in one process of many; here it is filled with the biggest integer and NaN.
"""

from copy import deepcopy

import pytest
import torch
from run_folders import merged_run, tiny_trunk
from transformers import AutoModel, Sam3VideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.inference.concepts import ConceptModel
from effsam3.models.inference.prompted import load_tracker
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.models.text.student import TextTeacher

FAMILIES = {row.family: name for name, row in IMAGE_STUDENTS.items()}


@pytest.fixture
def filled_memory():
    """`torch.empty` and what is like it give NaN and the biggest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty_like(torch.empty(2, device="meta"), device="cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def computed(model) -> dict[str, torch.Tensor]:
    """The buffers that no file holds."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def assert_as_built(model, built) -> None:
    found, wanted = computed(model), computed(built)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("name", FAMILIES.values())
def test_a_student_alone(tmp_path, filled_memory, name):
    student = tiny_trunk(name)
    student.save_pretrained(tmp_path)
    assert_as_built(AutoModel.from_pretrained(tmp_path), student)


def test_a_whole_model_and_its_parts(tmp_path, filled_memory):
    merged = merged_run(tmp_path, "image", "text", "memory") / "merged"
    whole = Sam3VideoModel.from_pretrained(merged)
    for model in (whole, load_tracker(merged), ConceptModel(merged).model):
        assert_as_built(model, type(model)(deepcopy(model.config)))
    assert computed(whole)


def test_the_chassis(filled_memory):
    folder = chassis_folder("tiny")
    for model in (Sam3VideoModel.from_pretrained(folder), load_tracker(folder)):
        assert_as_built(model, type(model)(deepcopy(model.config)))
    encoder = TextTeacher.from_folder(folder).text_encoder
    assert_as_built(encoder, type(encoder)(encoder.config))
