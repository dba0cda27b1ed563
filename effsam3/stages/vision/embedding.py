# SPDX-License-Identifier: Apache-2.0
"""Stage 1, vision, teacher pass: that of stage image.

A store keeps the trunk's features, 5 MB an image in int8; what the two necks make of them would be 56 MB. So the necks
run next to the student, at the cost of a small part of the trunk's pass, and one store serves both stages.
"""

from __future__ import annotations

from effsam3.stages.image.embedding import TeacherPass

__all__ = ["TeacherPass"]
