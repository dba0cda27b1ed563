# SPDX-License-Identifier: Apache-2.0
"""Files of annotated concepts, whichever of the known formats they have, as subsets of pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from effsam3.data import coco
from effsam3.data.concepts.categories import is_federated, phrases, read_categories
from effsam3.data.concepts.expressions import is_expressions, read_expressions
from effsam3.data.concepts.pairs import Limits, Subset
from effsam3.data.concepts.saco import is_saco, read_saco
from effsam3.data.problems import Note
from effsam3.errors import UserError

# SA-Co Gold: gold_crowded_merged_a_release_test.json, and the same with b and c
ANNOTATOR = re.compile(r"(?P<subset>.+)_merged_(?P<who>[abc])_(?P<rest>.+)\.json")
EXPECTED = (
    "expected is JSON of SA-Co Gold or Silver (images with text_input, annotations), of COCO or LVIS (images, "
    "annotations, categories), or of RefCOCO (images, annotations, refs)"
)


def open_concepts(path: Path, folders: Sequence[Path], limits: Limits, key: str) -> list[Subset]:
    """Read a file, or all JSON files of a folder: a subset each, and one of all annotators of SA-Co Gold.

    Args:
        folders: of the images, searched in this order; none: the file's own.
        key: of the recipe, or option, that named the path.

    Raises:
        UserError: there is no such file, a file is none of the known formats, or no pair of it can be used.
    """
    if not path.exists():
        raise UserError(f"{key}: there is no {path}; {EXPECTED}")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{key}: {path} has no JSON files; {EXPECTED}")
    groups: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        matched = ANNOTATOR.fullmatch(file.name)
        name = matched["subset"] if matched else file.stem
        groups.setdefault((file.parent, name), []).append(file)
    return [_subset(name, group, list(folders) or [parent], limits, key) for (parent, name), group in groups.items()]


def looks_like_concepts(path: Path) -> bool:
    """Return whether a file, or the first of a folder, is JSON with phrases: SA-Co's or RefCOCO's."""
    file = min(path.glob("*.json"), default=path) if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        return False
    try:
        content = coco.load_json(file.read_bytes())
    except coco.Malformed:
        return False
    return isinstance(content, dict) and (is_saco(content) or is_expressions(content))


def _subset(name: str, files: list[Path], folders: list[Path], limits: Limits, key: str) -> Subset:
    notes: list[Note] = []
    files = _annotators(files, notes)
    contents = [(file, _content(file, key)) for file in files]
    subset = Subset(name, [], folders, notes)
    path, content = contents[0]
    try:
        if is_saco(content):
            if others := [file.name for file, other in contents if not is_saco(other)]:
                raise coco.Malformed(f"{', '.join(others)} is of another format")
            subset.pairs = read_saco(contents, limits, notes)
        elif is_expressions(content):
            subset.pairs = read_expressions(path, content, limits, notes)
        else:
            subset.federated = is_federated(content)
            subset.categories, same = phrases(content, path.name, limits, notes)
            subset.pairs, subset.looked = read_categories(path, content, subset.categories, same, limits, notes)
    except coco.Malformed as fault:
        raise UserError(f"{key}: {path}: {fault}; {EXPECTED}") from fault
    if not subset.pairs:
        first = "; ".join(f"{note.where}: {note.reason} ({note.detail})" for note in notes[:1])
        raise UserError(f"{key}: {path} has no pair of an image and a phrase that can be used. {first or EXPECTED}")
    return subset


def _annotators(files: list[Path], notes: list[Note]) -> list[Path]:
    """Return the files of all annotators of a subset, a first: the order decides between equally good ones."""
    matched = ANNOTATOR.fullmatch(files[0].name)
    if matched is None:
        return files
    found = []
    for who in "abc":
        file = files[0].with_name(f"{matched['subset']}_merged_{who}_{matched['rest']}.json")
        if file.is_file():
            found.append(file)
        else:
            notes.append(Note("annotator_missing", file.name, "scores are lower with fewer annotators to choose from"))
    return found


def _content(path: Path, key: str) -> dict:
    """Return a file's content, as far as both formats have it.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        content = coco.mapping(coco.load_json(path.read_bytes()), "the file")
        if "video_np_pairs" in content:
            raise coco.Malformed("it annotates videos (SA-Co VEval), and this benchmark looks at images")
        if is_saco(content):
            wanted: tuple[str, ...] = ("images",)
        else:
            wanted = ("images", "annotations", "refs" if is_expressions(content) else "categories")
        for name in wanted:
            coco.listed(coco.mapping(content, "the file", wanted)[name], name)
    except OSError as fault:
        raise UserError(f"{key}: {path} cannot be read ({fault.strerror})") from fault
    except coco.Malformed as fault:
        raise UserError(f"{key}: {path}: {fault}; {EXPECTED}") from fault
    return content
