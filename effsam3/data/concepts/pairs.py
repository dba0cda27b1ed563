# SPDX-License-Identifier: Apache-2.0
"""Pairs of an image and a noun phrase: what every reader of annotated concepts makes of its files.

A pair without objects is a negative: the phrase is not there, and a model should find nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from effsam3.data import coco
from effsam3.data.images.decoding import decode_image
from effsam3.data.problems import Note
from effsam3.data.unreadable import UnreadableImage


@dataclass(frozen=True)
class ConceptObject:
    """An annotated instance: compressed RLE, box [x, y, width, height] and area in pixels."""

    rle: dict[str, Any]
    box: list[float]
    area: float
    crowd: bool = False  # a region of many instances that were not told apart


@dataclass(frozen=True)
class ConceptPair:
    """An image, a phrase, and its instances by each annotator.

    Attributes:
        key: unique among the pairs of a subset.
        image: path of the file as the annotations have it.
        size: (H, W) of the image.
        exhaustive: every annotator has marked all instances there are; of other pairs only recall can be told.
        category: the phrase's number in COCO and LVIS.
    """

    key: str
    image: str
    size: tuple[int, int]
    phrase: str
    annotators: tuple[tuple[ConceptObject, ...], ...]
    exhaustive: bool = True
    category: int | None = None

    @property
    def objects(self) -> list[list[ConceptObject]]:
        """Instances by annotator, without crowds."""
        return [[one for one in annotated if not one.crowd] for annotated in self.annotators]

    @property
    def there(self) -> bool:
        """Whether the phrase is there, by half of the annotators or more."""
        return 2 * sum(map(bool, self.objects)) >= len(self.annotators)

    @property
    def marked(self) -> bool:
        """Whether any annotator has marked anything, crowds included."""
        return any(self.annotators)


@dataclass(frozen=True)
class LookedFor:
    """Which categories annotators looked for on every image: those that they did not mark are not there.

    Attributes:
        images: {id: (file_name, (H, W))} of all images.
        marked: {image: categories with an annotation, usable or not}.
        used: categories that are marked anywhere.
        verified: {image: categories that were looked for}; None: all `used` ones, on every image.
        families: {category: what its `supercategory` is}, where the file says so.
    """

    images: dict[int, tuple[str, tuple[int, int]]]
    marked: dict[int, frozenset[int]]
    used: frozenset[int]
    verified: dict[int, frozenset[int]] | None
    families: dict[int, str]

    def absent(self, image: int) -> frozenset[int]:
        """Return the categories that an image does not show."""
        looked = self.used if self.verified is None else self.verified[image]
        return looked - self.marked.get(image, frozenset())


@dataclass
class Subset:
    """Pairs of one file, or of the files of several annotators.

    `categories` {number: phrase} are those of COCO and LVIS, whose pairs ask every image for all of them or, where
    `federated`, for those that were verified; None: phrases are free.
    """

    name: str
    pairs: list[ConceptPair]
    folders: Sequence[Path]
    notes: list[Note] = field(default_factory=list)
    categories: dict[int, str] | None = None
    federated: bool = False
    looked: LookedFor | None = None  # with `categories`

    def images(self) -> dict[str, list[ConceptPair]]:
        """Return the pairs by their image, in order."""
        found: dict[str, list[ConceptPair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.image, []).append(pair)
        return found

    def read_image(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Read an image, uint8 RGB (H, W, 3), from the first of the folders that has it.

        Raises:
            UnreadableImage: none has it, it does not decode, or it is not of the size that was annotated.
        """
        path = next((folder / name for folder in self.folders if (folder / name).is_file()), None)
        if path is None:
            searched = ", ".join(map(str, self.folders))
            raise UnreadableImage(name, "missing", f"it is not in {searched}; name its folder")
        try:
            content = path.read_bytes()
        except OSError as fault:
            raise UnreadableImage(name, "unreadable", str(fault)) from fault
        image_HW3, _ = decode_image(content, key=name)
        if image_HW3.shape[:2] != size:
            is_, was = (f"{width}x{height} px" for height, width in (image_HW3.shape[:2], size))
            raise UnreadableImage(name, "size_mismatch", f"it is {is_}, annotated was one of {was}")
        return image_HW3

    def reasons(self) -> dict[str, int]:
        """Count the notes by their reason."""
        return dict(Counter(note.reason for note in self.notes))


@dataclass(frozen=True)
class Limits:
    """What may be asked, and how much of it.

    Attributes:
        refuse: why a phrase cannot be asked, "" if it can.
        objects: more instances of a pair than this cannot all be found, which is noted.
        pairs: of a subset, at most; whole images are chosen, the same ones every time. None: all.
        absent: categories asked of an image that are not there, at most; None: all. For COCO and LVIS.
    """

    refuse: Callable[[str], str] = lambda phrase: ""
    objects: int | None = None
    pairs: int | None = None
    absent: int | None = None


def chosen(keys: Iterable[str], most: int | None = None) -> list[str]:
    """Return the keys in an order that follows from each alone and has nothing to do with their meaning."""
    import xxhash

    # surrogatepass: JSON can hold texts that are no UTF-8
    ordered = sorted(keys, key=lambda key: (xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")), key))
    return ordered[:most]


def take(candidates: Sequence, image_of: Callable, build: Callable[..., ConceptPair | None], limits: Limits) -> list:
    """Build the pairs of as many images as the limit allows; candidates that cannot be built do not count."""
    by_image: dict[str, list] = {}
    for candidate in candidates:
        by_image.setdefault(image_of(candidate), []).append(candidate)
    names = list(by_image) if limits.pairs is None else chosen(by_image)
    pairs: list[ConceptPair] = []
    for name in names:
        if limits.pairs is not None and pairs and len(pairs) + len(by_image[name]) > limits.pairs:
            break
        pairs += filter(None, map(build, by_image[name]))
    return pairs


# ---- what is checked of every entry


def phrase_of(value: object, limits: Limits) -> str:
    """Return a phrase without spaces around it. Raises Malformed: no_phrase, bad_phrase."""
    if not isinstance(value, str) or not value.strip():
        raise coco.Malformed(f"the phrase is {value!r}; it must be a text that is not empty", "no_phrase")
    if why := limits.refuse(value):
        raise coco.Malformed(why, "bad_phrase")
    return value.strip()


def file_of(value: object) -> str:
    """Return an image's relative path. Raises Malformed: bad_name."""
    path = PurePosixPath(value) if isinstance(value, str) and value else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise coco.Malformed(f"file_name is {value!r}; it must be a path below the images' folder", "bad_name")
    return str(path)


def object_of(
    annotation: dict, size: tuple[int, int], repaired: Callable[[str, str], None], scale: tuple[float, float] = (1, 1)
) -> ConceptObject:
    """Return an annotated instance, its mask checked; a box that is missing or elsewhere becomes the mask's own.

    Args:
        repaired: is told reason (no_box, bad_box) and detail of what was repaired.
        scale: of the box: width and height of the image where it is in shares of them.

    Raises:
        Malformed: no_mask, bad_mask, size_mismatch.
    """
    from pycocotools import mask

    if annotation.get("segmentation") in (None, []):
        raise coco.Malformed("it has no mask", "no_mask")
    height, width = size
    try:
        rle = coco.to_rle(annotation["segmentation"], height, width)
        area = float(coco.runs_of(rle)[1::2].sum())
    except coco.Malformed as fault:
        raise coco.Malformed(str(fault), fault.reason or "bad_mask") from fault
    if not area:
        raise coco.Malformed("its mask is empty", "bad_mask")
    around, box = mask.toBbox(rle).tolist(), annotation.get("bbox")
    if box in (None, []):
        repaired("no_box", "made from its mask")
        box = around
    else:
        try:
            box = [value * side for value, side in zip(coco.numbers(box, "bbox", 4), (*scale, *scale), strict=True)]
            coco.check_box(box, around, height, width)
        except coco.Malformed as fault:
            repaired("bad_box", f"{fault}; the mask's own is taken")
            box = around
    given = annotation.get("area")
    if isinstance(given, (int, float)) and given > 0 and scale == (1, 1):  # of polygons, which pixels only approach
        area = float(given)
    return ConceptObject(rle, box, area, bool(annotation.get("iscrowd")))
