# SPDX-License-Identifier: Apache-2.0
"""Rows of the registry's SAM 3s, against the configs that they name and transformers' own classes."""

import pytest

from effsam3.models.chassis.classes import empty_model, key_map
from effsam3.models.chassis.config import config_from
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.registry import SAM3, SAM3S, Sizes, is_made_up, named, of_type


@pytest.mark.parametrize("name", SAM3S)
def test_a_row_says_what_its_config_says(name):
    row, config = SAM3S[name], SAM3S[name].config()
    detector, tracker = config.detector_config, config.tracker_config
    assert Sizes.of(detector.vision_config.to_dict()) == row.sizes
    assert (config.model_type, detector.vision_config.backbone_config.model_type) == (row.config_type, row.trunk_type)
    assert (detector.text_config.model_type, detector.text_config.max_position_embeddings) == (
        row.text_type,
        row.context_length,
    )
    assert (tracker.num_maskmem, tracker.max_object_pointers_in_encoder) == (row.memory_frames, row.memory_pointers)
    assert key_map(config).to_original


@pytest.mark.parametrize("name", [name for name, row in SAM3S.items() if row.counts is not None])
def test_counts_are_those_of_the_model(name):
    """`total` and `trunk` are of the authors' file: with what transformers leaves out, see docs/parameters.md."""
    row, model = SAM3S[name], empty_model(SAM3S[name].config())
    detector, counts = model.detector_model, row.counts
    assert type(model).__name__ == row.model_class
    assert count(model) == counts.transformers_total
    assert count(detector.vision_encoder.backbone) == row.sizes.trunk_params == counts.trunk - row.sizes.hidden_size
    assert count(detector.vision_encoder.neck) == count(model.tracker_neck) == counts.neck
    assert count(detector.text_encoder) + count(detector.text_projection) == counts.text


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_what_a_checkpoint_names():
    assert sam3_of(SAM3.hub_id) is named(SAM3.hub_id) is of_type("sam3_video") is SAM3
    assert named("some/folder") is SAM3
    assert [name for name in SAM3S if is_made_up(name)] == ["random", "tiny", "tiny_concepts"]
    with pytest.raises(LookupError, match="a model of type 'sam2'; expected 'sam3_video'"):
        of_type("sam2")


def test_a_config_of_another_type_in_a_sam3_pt_is_refused():
    content = SAM3S["tiny"].config().to_dict() | {"model_type": "sam2"}
    with pytest.raises(ValueError, match="it describes no model .*a model of type 'sam2'"):
        config_from(content, "it", "write it again")
