# SPDX-License-Identifier: Apache-2.0
"""`import effsam3.auto`: transformers' Auto classes know the students from then on, before or after it is imported.

It also names what a model needs that is put together of transformers' own classes. `effsam3.load_model` and
`effsam3.Predictor` do without it.
"""

from effsam3.models.image.student import StudentTrunk
from effsam3.models.inference.concepts import encode_geometry_always
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.text.padding import AttendedLiteTextModel
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.models.vision.student import VisionTrunk

__all__ = [
    "AttendedLiteTextModel",
    "EfficientTracker",
    "PromptTokenizer",
    "StudentTrunk",
    "VisionTrunk",
    "encode_geometry_always",
]
