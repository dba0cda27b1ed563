# SPDX-License-Identifier: Apache-2.0
"""The chassis `tiny_concepts`: its answers follow image and phrase before any training, where `tiny`'s do not."""

import numpy as np
import pytest
import torch

from effsam3.data.synthetic.concepts import PHRASES, draw_scene
from effsam3.data.transforms import normalise
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.inference.concepts import ConceptModel
from effsam3.models.inference.prompted import load_tracker, prompted_masks
from effsam3.models.registry import SAM3S


def scenes(count=12):
    return [draw_scene(160, np.random.default_rng([3, number, 1])) for number in range(count)]


def queries(checkpoint):
    """Outputs of the decoder's last layer (P, Q, C): a drawn image and a phrase for each P."""
    model, kept = ConceptModel(chassis_folder(checkpoint)), []
    decoder = model.model.detector_model.detr_decoder
    decoder.register_forward_hook(lambda module, inputs, output: kept.append(output.intermediate_hidden_states[-1]))
    for scene, phrase in zip(scenes(), PHRASES, strict=True):
        model.detect(model.look(scene.image_HW3), [phrase])
    return torch.cat(kept)


def shares(states_PQC):
    """How much of the variance there is between the queries of a pair, and between the pairs of a query."""
    total = states_PQC.flatten(0, 1).var(0, correction=0).sum()
    return [float(states_PQC.var(dim, correction=0).mean(0).sum() / total) for dim in (1, 0)]


def test_queries_differ_from_each_other_and_between_pairs():
    """Otherwise what the heads make of two trunks, or of any loss, is the same, and every test of it passes."""
    between_queries, between_pairs = shares(queries("tiny_concepts"))
    assert between_queries > 0.1 and between_pairs > 0.1
    # What this guards against: image and phrase do not reach the queries of the other tiny chassis.
    assert shares(queries("tiny"))[1] < 0.001


def test_shares():
    states_PQC = torch.randn(50, 1, 8).expand(50, 40, 8) + 0.1 * torch.randn(50, 40, 8)
    assert shares(states_PQC) == pytest.approx([0.01, 1], abs=0.02)


def test_masks_of_boxes_follow_image_and_box():
    """Through the tracker's neck and heads, which share the trunk."""
    tracker = load_tracker(chassis_folder("tiny_concepts"))
    boxes_O4 = torch.tensor([[16.0, 16, 80, 80], [80, 80, 144, 144], [32, 96, 64, 144]])
    masks = []
    for scene in scenes(6):
        pixels_13SS = normalise(torch.from_numpy(scene.image_HW3).permute(2, 0, 1)[None])
        masks.append(prompted_masks(tracker, tracker.get_image_embeddings(pixels_13SS), boxes_O4, None)[0].flatten(1))
    between_boxes, between_images = shares(torch.stack(masks))
    assert between_images > 0.1 and between_boxes > 0.01


@pytest.mark.parametrize("part", ["detector_model.vision_encoder.neck", "tracker_neck"])
def test_levels_of_the_necks_are_of_size_one(part):
    model = ConceptModel(chassis_folder("tiny_concepts"))
    trunk_BND = model.model.detector_model.vision_encoder.backbone(torch.randn(4, 3, 160, 160)).last_hidden_state
    levels = model.model.get_submodule(part)(trunk_BND.transpose(1, 2).unflatten(2, (8, 8)))[0]
    assert [level.shape[-1] for level in levels] == [32, 16, 8, 4]
    assert all(0.9 < float(level.std()) < 1.1 for level in levels)


def test_its_sizes():
    row = SAM3S["tiny_concepts"]
    assert row.sizes.trunk_params == 214_912 and row.sizes.grid == 8
    decoder = row.config().detector_config.detr_decoder_config
    assert (decoder.hidden_size, decoder.num_layers, decoder.num_queries) == (64, 3, 12)
