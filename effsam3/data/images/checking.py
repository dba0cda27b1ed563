# SPDX-License-Identifier: Apache-2.0
"""Look through images with masks as training reads them: what is there, and everything that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from effsam3.data.images.pairs import Pair
from effsam3.data.problems import Note, mask_problems, problems_of
from effsam3.data.unreadable import Unreadable


@dataclass
class PairsCheck:
    """A data set of images and masks, and what is wrong with it."""

    images: int = 0
    objects: int = 0
    empty: int = 0  # images without an object
    most: int = 0  # objects on one image
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # rows, columns
    categories: Counter[str] = field(default_factory=Counter)  # objects
    views: Counter[str] = field(default_factory=Counter)  # images
    problems: list[Note] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        """Read an image and its masks."""
        self.images += 1
        self.views[pair.view] += 1
        try:
            height, width = pair.image().shape[:2]
            self.sizes[height, width] += 1
            found = pair.masks(height, width)
        except Unreadable as fault:
            self.problems += problems_of(fault, pair.name)
            return
        self.objects += len(found)
        self.empty += not found
        self.most = max(self.most, len(found))
        self.categories.update(category for category, _ in found)
        for number, (_, mask_HW) in enumerate(found, 1):
            self.problems += mask_problems(mask_HW, f"{pair.name}, object {number}")


def check_pairs(pairs: Iterable[Pair]) -> PairsCheck:
    """Read all images and masks."""
    check = PairsCheck()
    for pair in pairs:
        check.add(pair)
    if check.images and not check.objects:
        check.problems.append(Note("no_object", "all images"))
    return check
