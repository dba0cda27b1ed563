# SPDX-License-Identifier: Apache-2.0
"""A small SAM 3 in both formats, with what transformers cannot hold made up."""

import torch

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.keymaps.sam3 import CLASS_ROW, POINTS, to_original


def trunk_config(config):
    return config.detector_config.vision_config.backbone_config


def same(found, wanted):
    assert found.keys() == wanted.keys()
    return [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


def small_sam3():
    """(config, tensors by transformers' names, tensors that transformers cannot hold) of a small SAM 3."""
    folder = chassis_folder("tiny")
    config, tensors = read_config(folder), read_tensors(folder)
    generator = torch.Generator().manual_seed(1)
    shapes = {CLASS_ROW: (1, 1, 64)} | {name: (128,) for name in POINTS if name.endswith("bias")}
    shapes |= {name: (128, 2) if "direct" in name else (128, 128) for name in POINTS if name.endswith("weight")}
    return config, tensors, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def small_original():
    """The same model by SAM 3's own names."""
    config, tensors, extra = small_sam3()
    return to_original(tensors, extra, trunk_config(config))
