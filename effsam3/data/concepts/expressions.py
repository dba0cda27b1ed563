# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg as pairs: expressions are phrases, each of which means one object.

They are published as a pickle of references next to COCO's JSON. Expected is one JSON with both, made by

    content = json.load(open("instances.json")) | {"refs": pickle.load(open("refs(unc).p", "rb"))}
    json.dump({name: content[name] for name in ("images", "annotations", "refs")}, open("refcoco.json", "w"))

`refs` is a list of {"ref_id", "image_id", "ann_id", "sentences": [{"sent": text}, ...]}; other keys are not read.
Nothing is said of what is not there, so there are no negatives.
"""

from __future__ import annotations

from pathlib import Path

from effsam3.data import coco
from effsam3.data.concepts.categories import images_of
from effsam3.data.concepts.pairs import ConceptObject, ConceptPair, Limits, object_of, phrase_of, take
from effsam3.data.problems import Note


def is_expressions(content: dict) -> bool:
    """Return whether a JSON has references to its annotations."""
    return isinstance(content.get("refs"), list)


def read_expressions(path: Path, content: dict, limits: Limits, notes: list[Note]) -> list[ConceptPair]:
    """Return a pair for every expression of an image; where several of its objects have the same one, it means all.

    What cannot be used is left out, or repaired, and named in `notes`.
    """
    images = images_of(path, content, notes)
    marked = {
        annotation["id"]: annotation
        for annotation in coco.listed(content["annotations"], "annotations")
        if isinstance(annotation, dict) and isinstance(annotation.get("id"), int)
    }
    meant: dict[tuple[int, str], list[int]] = {}  # annotations by image and phrase
    for place, reference in enumerate(coco.listed(content["refs"], "refs")):
        where = f"{path.name}, refs[{place}]"
        try:
            reference = coco.mapping(reference, "it", ("image_id", "ann_id", "sentences"))
            image, annotation = (
                coco.whole(reference["image_id"], "image_id"),
                coco.whole(reference["ann_id"], "ann_id"),
            )
            if image not in images:
                raise coco.Malformed(f"image_id {image}", "no_such_image")
            if annotation not in marked:
                raise coco.Malformed(f"ann_id {annotation}", "no_such_annotation")
            sentences = coco.listed(reference["sentences"], "sentences")
        except coco.Malformed as fault:
            notes.append(Note(fault.reason or "bad_entry", where, str(fault)))
            continue
        for sentence in sentences:
            try:
                phrase = phrase_of(sentence.get("sent") if isinstance(sentence, dict) else sentence, limits)
            except coco.Malformed as fault:
                notes.append(Note(fault.reason or "bad_entry", where, str(fault)))
                continue
            found = meant.setdefault((image, phrase), [])
            if annotation not in found:
                found.append(annotation)

    def build(asked: tuple[int, str]) -> ConceptPair | None:
        number, phrase = asked
        size = images[number]["height"], images[number]["width"]
        objects: list[ConceptObject] = []
        for annotation in meant[asked]:
            where = f"{path.name}, image {number}, annotation {annotation}"
            try:
                repaired = lambda *why, at=where: notes.append(Note(why[0], at, why[1]))  # noqa: E731
                objects.append(object_of(marked[annotation], size, repaired))
            except coco.Malformed as fault:
                notes.append(Note(fault.reason or "bad_entry", where, str(fault)))
                return None
        name = images[number]["file_name"]
        return ConceptPair(f"{name}:{phrase}", name, size, phrase, (tuple(objects),))

    return take(list(meant), lambda asked: images[asked[0]]["file_name"], build, limits)
