# SPDX-License-Identifier: Apache-2.0
"""Merging: every tensor has one owner, or the merge names the tensor."""

import pytest

from effsam3.merge import MergeError, assign, refuse_neck
from effsam3.models.sam3 import TRUNK

EXPECTED = {TRUNK + "head.weight": (2, 3), "detector_model.x": (4,), "tracker_neck.y": (5,)}
STUDENT = {TRUNK + "head.weight": (2, 3)}
CHASSIS = {TRUNK + "layers.0.weight": (9, 9), "detector_model.x": (4,), "tracker_neck.y": (5,)}


def test_every_tensor_gets_its_owner_and_the_teachers_trunk_is_dropped():
    owners = assign(EXPECTED, {"image": STUDENT}, CHASSIS)
    assert owners == {TRUNK + "head.weight": "image", "detector_model.x": "chassis", "tracker_neck.y": "chassis"}


@pytest.mark.parametrize(
    ("student", "chassis", "message"),
    [
        ({}, CHASSIS, "head.weight has no owner"),
        (STUDENT, {"detector_model.x": (4,)}, "tracker_neck.y has no owner"),
        ({**STUDENT, "detector_model.x": (4,)}, CHASSIS, "detector_model.x has the owners image and chassis"),
        ({TRUNK + "head.weight": (3, 2)}, CHASSIS, r"is \(3, 2\), the model needs \(2, 3\)"),
        ({**STUDENT, TRUNK + "extra": (1,)}, CHASSIS, "extra of image lands nowhere"),
        (STUDENT, {**CHASSIS, "unknown.z": (1,)}, "unknown.z of chassis lands nowhere"),
    ],
)
def test_what_is_not_owned_once_is_named(student, chassis, message):
    with pytest.raises(MergeError, match=message):
        assign(EXPECTED, {"image": student}, chassis)


def test_neck_features_are_refused_with_the_reason():
    refuse_neck({"tap": "trunk", "channels": 1024})
    with pytest.raises(MergeError, match="the tracker's; neck features cannot be turned back"):
        refuse_neck({"tap": "neck", "channels": 256})
