# SPDX-License-Identifier: Apache-2.0
"""What is known of the SAM 3 that a recipe names, without its weights and without torch: its row, its own sizes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from effsam3.checked_files import mismatch, parse_json, read_json, read_text
from effsam3.errors import UserError
from effsam3.models.chassis.card import CARD, CARD_FORM
from effsam3.models.chassis.foreign import refuse_foreign, refuse_foreign_id
from effsam3.models.registry import SAM3, SAM3S, Sam3, Sizes, of_type

GIVE = "give a folder that transformers' `save_pretrained` wrote of the whole model, or a sam3.pt"
FORM = {
    "model_type": str,
    "detector_config": {
        "vision_config": {
            "fpn_hidden_size": int,
            "backbone_config": {field.name: int for field in fields(Sizes) if field.name != "fpn_hidden_size"},
        }
    },
}
STUDENTS = ('"effsam3_', '"sam3_lite_text')  # how the types of students in a config.json begin
# What listing a file that is no sam3.pt may raise.
NOT_LISTED = (BadZipFile, EOFError, LookupError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)


def first_of(checkpoint: str) -> str:
    """Return the checkpoint that a merged model began with, through all merges before it; of any other itself.

    Raises:
        UserError: an effsam3.json on the way is damaged.
    """
    seen: set[Path] = set()
    while True:
        places = (Path(checkpoint) / CARD, Path(checkpoint) / "merged" / CARD)
        card = next((place for place in places if place.is_file()), None)
        if card is None or card in seen:  # cards are files that anybody may edit: a circle ends at a merged model
            return checkpoint
        seen.add(card)
        checkpoint = read_json(card, CARD_FORM, "merge or import the model again").get("chassis", checkpoint)


def sam3_of(checkpoint: str) -> Sam3:
    """Return the row of the SAM 3 that a recipe's `sam3.checkpoint` names; the sizes of a local one are its config's.

    Raises:
        UserError: a Hub id whose sizes are not known without a download, or a folder or file that holds no SAM 3.
    """
    if checkpoint in SAM3S:
        return SAM3S[checkpoint]
    path = Path(checkpoint)
    if not path.exists():
        refuse_foreign_id(checkpoint)
    sources = (path / "config.json", path / "merged" / "config.json", path)
    source = next((file for file in sources if file.is_file()), None)
    if source is None:
        raise UserError(
            f"sam3.checkpoint: the sizes of {checkpoint!r} are not known, there is no {sources[0]}; "
            f"give a local transformers folder, a sam3.pt, {', '.join(map(str, SAM3S))}"
        )
    try:
        # Only texts are read: names of tensors tell what the file is, the description next to them its sizes.
        texts = _texts_in(source) if source == path else ["effsam3", read_text(source, GIVE)]
    except NOT_LISTED as error:
        raise UserError(
            f"sam3.checkpoint: {source} is not of a SAM 3 with its own ViT ({type(error).__name__}: {error}); {GIVE}"
        ) from error
    refuse_foreign(texts, f"sam3.checkpoint: {source}")
    if "effsam3" not in texts[:-1]:  # where a sam3.pt of this project has its config; others have the published sizes
        return SAM3
    said = texts[texts.index("effsam3") + 1]
    config = parse_json(said, dict, f"sam3.checkpoint: {source}", GIVE)
    config = config if source != path else config.get("config")
    if wrong := mismatch(config, FORM):
        raise UserError(f"sam3.checkpoint: {source} is not of a SAM 3 with its own ViT: {wrong}; {GIVE}")
    try:
        row = of_type(config["model_type"])
    except LookupError as error:
        raise UserError(f"sam3.checkpoint: {source} is of {error.args[0]}; {GIVE}") from error
    sizes = Sizes.of(config["detector_config"]["vision_config"])
    if wrong := next((f"{name} is {size}" for name, size in vars(sizes).items() if not 0 < size < 2**17), ""):
        raise UserError(f"sam3.checkpoint: {wrong}, which is the size of no SAM 3; {GIVE}")
    # Sizes are those of its trunk: a student may be in its text encoder or its tracker.
    is_whole = sizes == row.sizes and not any(kind in said for kind in STUDENTS)
    return replace(
        row,
        sizes=sizes,
        counts=row.counts if sizes == row.sizes else None,
        gflop=row.gflop if is_whole else {},
    )


def refused_side(side: int | None, sizes: Sizes) -> Iterator[str]:
    """Yield why the heads of a SAM 3 with these sizes cannot work on images of `side` pixels; None: its own."""
    if side is None:
        return
    patch, most = sizes.patch_size, sizes.image_size
    if side > most:
        yield f"image_size: {side} px is more than SAM 3's own {most}, of which the student learns; set at most {most}"
    elif side % patch:
        below = side // patch * patch
        yield (
            f"image_size: {side} px is no multiple of {patch} px, a position of SAM 3's grid; set {below} (a grid of "
            f"{below // patch}) or {below + patch} ({below // patch + 1}). What only the student's trunk sees is "
            "student_image_size, which may be any"
        )


def at_image_size(config: Any, side: int) -> Any:
    """Return the config of a whole SAM 3 for square images of `side` pixels: grid, maps and masks follow.

    No tensor has another shape for it: heads and memory compute all that depends on the grid.
    """
    config = deepcopy(config)
    detector, tracker = config.detector_config.vision_config, config.tracker_config
    detector.image_size = tracker.image_size = side  # the tracker's setter sets its prompts, maps and positions too
    detector.backbone_feature_sizes = deepcopy(tracker.vision_config.backbone_feature_sizes)
    config.low_res_mask_size = detector.backbone_feature_sizes[0][0]
    return config


def _texts_in(file: Path) -> list[str]:
    """All texts in a sam3.pt: names of tensors and entries, and the description in a file of this project.

    Its pickle is only listed, so this takes neither torch nor trust.
    """
    import pickletools  # a moment, for this kind of file only

    with ZipFile(file) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        listing = pickletools.genops(archive.read(f"{folder}/data.pkl"))
        return [argument for _, argument, _ in listing if isinstance(argument, str)]
