# SPDX-License-Identifier: Apache-2.0
"""COCO and LVIS JSON as pairs: categories are phrases, those that an image does not show are its negatives.

LVIS did not look for every category on every image: an image's negatives are those of its `neg_category_ids`, and its
`not_exhaustive_category_ids` were not marked to the end.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from effsam3.data import coco
from effsam3.data.concepts.pairs import (
    ConceptPair,
    Limits,
    LookedFor,
    Note,
    chosen,
    file_of,
    object_of,
    phrase_of,
    take,
)

LVIS_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")


def is_federated(content: dict) -> bool:
    """Return whether images name the categories that were looked for, as in LVIS."""
    return any(isinstance(one, dict) and LVIS_KEYS[0] in one for one in content["images"])


def phrases(content: dict, name: str, limits: Limits, notes: list[Note]) -> tuple[dict[int, str], dict[int, int]]:
    """Return the categories that can be asked for, and {category: which of them it is}: those of one name are one.

    LVIS writes blanks in their names as underscores.
    """
    found: dict[int, str] = {}
    same: dict[int, int] = {}
    first: dict[str, int] = {}
    for place, category in enumerate(coco.listed(content["categories"], "categories")):
        try:
            number = coco.whole(coco.mapping(category, "it", ("id", "name"))["id"], "id")
            label = category["name"]
            phrase = phrase_of(label.replace("_", " ") if isinstance(label, str) else label, limits)
        except coco.Malformed as fault:
            notes.append(Note(fault.reason or "bad_entry", f"{name}, categories[{place}]", str(fault)))
            continue
        same[number] = first.setdefault(phrase.lower(), number)  # texts are read in lower case
        found.setdefault(same[number], phrase)
        if same[number] != number:
            detail = f"{phrase!r} is category {same[number]}, too; both are taken as that"
            notes.append(Note("name_twice", f"{name}, categories[{place}]", detail))
    return found, same


def read_categories(
    path: Path, content: dict, asked: dict[int, str], same: dict[int, int], limits: Limits, notes: list[Note]
) -> tuple[list[ConceptPair], LookedFor]:
    """Return the pairs of every image with the categories `asked` {number: phrase}, and what was looked for.

    `same` is that of `phrases`.
    What cannot be used is left out, or repaired, and named in `notes`.
    """
    federated = is_federated(content)
    images = images_of(path, content, notes)
    for image in images.values():
        image |= {key: [same[one] for one in image[key] if one in same] for key in LVIS_KEYS}
    annotations = _by_pair(path, content, images, same, notes)
    looked = _looked_for(content, images, annotations, asked, federated)
    if unused := [phrase for number, phrase in asked.items() if number not in looked.used and not federated]:
        # Tools write names of groups as categories, too: nobody has looked for them.
        notes.append(Note("no_annotations", path.name, f"not asked for, as nothing is marked: {', '.join(unused)}"))
    candidates = []
    for number in images:
        present, absent = sorted(looked.marked.get(number, ())), sorted(looked.absent(number))
        if not present and not absent:
            notes.append(Note("no_pairs", f"{path.name}, image {number}", "no category was looked for on it"))
        if limits.absent is not None:
            places = {f"{number}:{category}": category for category in absent}
            absent = [places[key] for key in chosen(places, limits.absent)]
        candidates += [(number, category) for category in sorted([*present, *absent])]

    def build(candidate: tuple[int, int]) -> ConceptPair | None:
        number, category = candidate
        where = f"{path.name}, image {number}, category {category} ({asked[category]})"
        try:
            return _pair(
                images[number], category, asked[category], annotations.get(candidate, []), where, limits, notes
            )
        except coco.Malformed as fault:
            notes.append(Note(fault.reason or "bad_entry", where, str(fault)))
            return None

    return take(candidates, lambda candidate: images[candidate[0]]["file_name"], build, limits), looked


def _looked_for(
    content: dict, images: dict[int, dict], annotations: dict, asked: dict[int, str], federated: bool
) -> LookedFor:
    marked: dict[int, set[int]] = {}
    for number, category in annotations:
        marked.setdefault(number, set()).add(category)
    verified = {number: frozenset(image[LVIS_KEYS[0]]) for number, image in images.items()}
    families = {
        category["id"]: category["supercategory"]
        for category in content["categories"]
        if isinstance(category, dict)
        and category.get("id") in asked
        and isinstance(category.get("supercategory"), str)
    }
    return LookedFor(
        {number: (image["file_name"], (image["height"], image["width"])) for number, image in images.items()},
        {number: frozenset(found) for number, found in marked.items()},
        frozenset(category for _, category in annotations),
        verified if federated else None,
        families,
    )


def images_of(path: Path, content: dict, notes: list[Note]) -> dict[int, dict]:
    """Return the images by their id, with sizes and relative `file_name`, which LVIS leaves to the address."""
    found: dict[int, dict] = {}
    for place, image in enumerate(coco.listed(content["images"], "images")):
        try:
            number = coco.whole(coco.mapping(image, "it", ("id", "height", "width"))["id"], "id")
            name = image.get("file_name")
            if name is None and isinstance(image.get("coco_url"), str):
                name = "/".join(PurePosixPath(image["coco_url"]).parts[-2:])  # such as val2017/000000397133.jpg
            sides = {side: coco.whole(image[side], side, 1) for side in ("height", "width")}
            if number in found:
                raise coco.Malformed(f"id {number} is there twice; the first one counts", "id_twice")
            lists = {key: [coco.whole(one, key) for one in coco.listed(image.get(key, []), key)] for key in LVIS_KEYS}
            found[number] = {"file_name": file_of(name)} | sides | lists
        except coco.Malformed as fault:
            notes.append(Note(fault.reason or "bad_entry", f"{path.name}, images[{place}]", str(fault)))
    return found


def _by_pair(
    path: Path, content: dict, images: dict[int, dict], same: dict[int, int], notes: list[Note]
) -> dict[tuple[int, int], list[dict]]:
    """Sort the annotations by image and category."""
    found: dict[tuple[int, int], list[dict]] = {}
    for place, annotation in enumerate(coco.listed(content["annotations"], "annotations")):
        where = f"{path.name}, annotations[{place}]"
        if not isinstance(annotation, dict):
            notes.append(Note("bad_entry", where, "it is no object"))
            continue
        number, category = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(number, int) or number not in images:
            notes.append(Note("no_such_image", where, f"image_id {number!r}"))
            continue
        if not isinstance(category, int) or category not in same:
            notes.append(Note("no_such_category", where, f"category_id {category!r}"))
            continue
        found.setdefault((number, same[category]), []).append(annotation)
    return found


def _pair(
    image: dict, category: int, phrase: str, marked: list[dict], where: str, limits: Limits, notes: list[Note]
) -> ConceptPair:
    """Build a pair; raises Malformed where it cannot be used."""
    size, objects = (image["height"], image["width"]), []
    for place, annotation in enumerate(marked):
        at = f"{where}, annotation {annotation.get('id', place)}"
        try:
            objects.append(object_of(annotation, size, lambda *why, at=at: notes.append(Note(why[0], at, why[1]))))
        except coco.Malformed as fault:  # of a pair half of whose truth is lost, no score means anything
            raise coco.Malformed(f"annotation {annotation.get('id', place)}: {fault}", fault.reason) from fault
    if limits.objects is not None and len(objects) > limits.objects:
        notes.append(
            Note("many_objects", where, f"{len(objects)} instances; the model finds {limits.objects} at most")
        )
    # A crowd stands for instances that nobody counted.
    exhaustive = category not in image[LVIS_KEYS[1]] and not any(one.crowd for one in objects)
    key = f"{image['file_name']}:{category}"
    return ConceptPair(key, image["file_name"], size, phrase, (tuple(objects),), exhaustive, category)
