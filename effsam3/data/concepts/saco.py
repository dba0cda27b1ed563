# SPDX-License-Identifier: Apache-2.0
"""SA-Co Gold and Silver: JSON files whose `images` are pairs of an image and a noun phrase, one file per annotator.

The pairs of all annotators have the same ids. A pair without annotations is a negative. Boxes are in shares of the
image's width and height, masks compressed RLE of the image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effsam3.data import coco
from effsam3.data.concepts.pairs import ConceptObject, ConceptPair, Limits, file_of, object_of, phrase_of, take
from effsam3.data.problems import Note


@dataclass
class Annotator:
    """One file: its pairs, and their annotations by the pair's id."""

    path: Path
    entries: dict[int, dict]
    annotations: dict[int, list[dict]]


def is_saco(content: dict) -> bool:
    """Return whether a JSON's `images` are pairs with phrases."""
    images = content.get("images")
    return isinstance(images, list) and any(isinstance(one, dict) and "text_input" in one for one in images)


def read_saco(contents: Sequence[tuple[Path, dict]], limits: Limits, notes: list[Note]) -> list[ConceptPair]:
    """Return the pairs of one subset; `contents` are the files of its annotators, whose order matters.

    What cannot be used is left out, or repaired, and named in `notes`.
    """
    annotators = [_by_pair(path, content, notes) for path, content in contents]
    first = annotators[0]

    def build(number: int) -> ConceptPair | None:
        try:
            return _pair(number, annotators, limits, notes)
        except coco.Malformed as fault:
            notes.append(Note(fault.reason or "bad_entry", f"{first.path.name}, pair {number}", str(fault)))
            return None

    return take(list(first.entries), lambda number: str(first.entries[number].get("file_name")), build, limits)


def _by_pair(path: Path, content: dict, notes: list[Note]) -> Annotator:
    """Sort a file's annotations by the pair that they belong to."""
    entries: dict[int, dict] = {}
    annotations: dict[int, list[dict]] = {}
    for place, entry in enumerate(coco.listed(content["images"], "images")):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or number in entries:
            reason, detail = ("id_twice", "the first one counts") if number in entries else ("bad_entry", "no id")
            notes.append(Note(reason, f"{path.name}, images[{place}]", detail))
            continue
        entries[number] = entry
    for place, annotation in enumerate(coco.listed(content.get("annotations", []), "annotations")):
        number = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(number, int) or number not in entries:
            notes.append(Note("no_such_pair", f"{path.name}, annotations[{place}]", f"image_id {number!r}"))
            continue
        annotations.setdefault(number, []).append(annotation)
    return Annotator(path, entries, annotations)


def _pair(number: int, annotators: list[Annotator], limits: Limits, notes: list[Note]) -> ConceptPair:
    """Build a pair; raises Malformed where it cannot be used."""
    entry = coco.mapping(annotators[0].entries[number], "it", ("file_name", "width", "height"))
    phrase, image = phrase_of(entry.get("text_input"), limits), file_of(entry["file_name"])
    size = coco.whole(entry["height"], "height", 1), coco.whole(entry["width"], "width", 1)
    exhaustive, annotated = True, []
    for one in annotators:
        if number not in one.entries:
            notes.append(Note("annotator_missing", f"{one.path.name}, pair {number}", "the others' count"))
            continue
        own = one.entries[number]
        if own.get("text_input") != entry["text_input"]:
            raise coco.Malformed(f"{one.path.name} has another phrase, {own.get('text_input')!r}", "other_phrase")
        exhaustive = exhaustive and bool(own.get("is_instance_exhaustive", True))
        annotated.append(_objects(one, number, size, notes))
    if limits.objects is not None and (most := max(map(len, annotated))) > limits.objects:
        detail = f"{most} instances; the model finds {limits.objects} at most"
        notes.append(Note("many_objects", f"{annotators[0].path.name}, pair {number}", detail))
    return ConceptPair(str(number), image, size, phrase, tuple(annotated), exhaustive)


def _objects(annotator: Annotator, number: int, size: tuple[int, int], notes: list[Note]) -> tuple[ConceptObject, ...]:
    found = []
    for place, annotation in enumerate(annotator.annotations.get(number, ())):
        where = f"{annotator.path.name}, pair {number}, annotation {annotation.get('id', place)}"
        try:
            found.append(
                object_of(annotation, size, lambda *why, at=where: notes.append(Note(why[0], at, why[1])), size[::-1])
            )
        except coco.Malformed as fault:  # of a pair half of whose truth is lost, no score means anything
            raise coco.Malformed(f"{where}: {fault}", fault.reason) from fault
    return tuple(found)
