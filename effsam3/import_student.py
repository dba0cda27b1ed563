# SPDX-License-Identifier: Apache-2.0
"""The verb `import`: a checkpoint of EfficientSAM3 or of SAM 3.1 becomes a model like any other.

effsam3 import efficient_sam3_repvit_m.pt --sam3 CHECKPOINT
effsam3 import sam3.1_multiplex.pt --sam3 CHECKPOINT
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from effsam3.errors import UserError
from effsam3.files import refuse_unwritable
from effsam3.models.chassis.classes import empty_tensors, key_map
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.pickled import open_pickled
from effsam3.models.chassis.tensors import fingerprint, read_config, read_tensors, to_float32
from effsam3.models.chassis.torch_file import content_key
from effsam3.models.image.backbones import student_name
from effsam3.models.keymaps.mobileclip import POSITIONS
from effsam3.models.keymaps.upstream import image_from_upstream, text_from_upstream
from effsam3.models.merging.combine import Merged, combine, slot_table
from effsam3.models.merging.efficientsam3 import UpstreamFile, divide
from effsam3.models.merging.formats import extras, write_model
from effsam3.models.merging.slots import SLOTS, Part, image_part, owners_card, text_part
from effsam3.models.registry import IMAGE_STUDENTS, SAM3
from effsam3.training.report import provenance, table


class ImportedError(UserError):
    """A file without a student of EfficientSAM3 that is not SAM 3.1's, or that lacks what a whole model needs."""


def run(path: str, to: str | None = None, sam3: str | None = None, dry_run: bool = False) -> Path | None:
    """Write `to` (runs/<name of the file>/merged) in transformers' format; return it, or None after a dry run.

    `sam3` gives what the file lacks, as a recipe's `sam3.checkpoint` names it.

    Raises:
        UserError: the file cannot be used, or something is in the way; the message names it and what to do.
    """
    source = Path(path)
    folder = Path(to) if to is not None else Path("runs") / source.stem / "merged"
    if folder.exists() and not dry_run:
        raise ImportedError(f"{folder} is there already; delete it, or name another folder (--to)")
    if not dry_run:
        refuse_unwritable(folder.parent, "--to")
    pickled = open_pickled(source)
    found = find(pickled.tensors, source)
    print(f"{source}{', averaged weights' if pickled.is_average else ''}\n{contents(found)}")
    if dry_run and sam3 is None and not found.rest:
        print("\nThe file only holds students: --sam3 names the SAM 3 that gives the rest.")
        return None
    # Only asked for where it is named: a whole file needs no other SAM 3.
    chassis = None if sam3 is None else chassis_folder(sam3)
    config = SAM3.config() if chassis is None else read_config(chassis)
    parts = students(found, config, {"origin": source.name, "facts": {"content": content_key(source)}})
    # By the student's own tensors, as for one that was trained here.
    parts = [replace(part, facts=part.facts | {"fingerprint": fingerprint(part.tensors)}) for part in parts]
    merged, extra = completed(found, parts, config, chassis, source)
    origins = {part.slot: f"{part.student}, {source.name}" for part in parts} | {
        "file": source.name,
        "chassis": sam3 or "",
    }
    givers = set(merged.owners.values())
    print(f"\n{slot_table(merged, {owner: origin for owner, origin in origins.items() if owner in givers})}")
    if dry_run:
        return None
    card = owners_card(chassis, parts, brought(found, merged, chassis, source)) | {
        "chassis": str(source) if sam3 is None else sam3,
        "revision": None,
        "imported": str(source),
        "provenance": provenance(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_model(merged, folder, card, chassis, extra)
    if found.foreign is not None:
        print(f"\nIts video memory is {SAM3.label}'s, not {found.chassis}'s: use it on images, or train it on videos")
    print(f"\n{folder} holds the whole model\n{next_steps(folder, parts)}")
    return folder


# ---- what a file holds


def find(tensors: Mapping[str, Tensor], source: Path) -> UpstreamFile:
    """Tell the students' tensors from the rest.

    Raises:
        ImportedError: no tensor belongs to a student, and they are SAM 3's own.
    """
    found = divide(tensors)
    if found.foreign is None and not found.has_student:
        raise ImportedError(
            f"{source} holds no student of EfficientSAM3 among its {len(tensors)} tensors (first: "
            f"{', '.join(list(tensors)[:3])}); a sam3.pt of SAM 3 itself is used as it is, as sam3.checkpoint"
        )
    return found


def contents(found: UpstreamFile) -> str:
    """Return the table of what a file holds."""
    rows = []
    for title, tensors in (
        ("image student", found.image),
        ("text student", found.text),
        (f"{'the rest of ' if found.has_student else ''}{found.chassis}", found.rest),
        ("left out: SAM 3's own ViT, next to the student", found.left_over),
        (f"left out: the {found.foreign.lacks}" if found.foreign else "", found.without),
    ):
        if tensors:
            types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
            elements = sum(tensor.numel() for tensor in tensors.values())
            rows.append([title, ", ".join(types), f"{len(tensors):,}", f"{elements / 1e6:.2f} M"])
    return table(rows, ["found", "type", "tensors", "elements"], text_columns=2)


def students(found: UpstreamFile, config: PreTrainedConfig, about: dict) -> list[Part]:
    """Make parts of the students; `about` are attributes of both.

    Raises:
        KeyMapError: their tensors are not those of a student that EfficientSAM3 has.
        MergeError: they do not fit the SAM 3 of `config`.
    """
    parts = []
    if found.image:
        timm_name, tensors = image_from_upstream(found.image)
        name = student_name(timm_name)
        parts.append(image_part(name, "stride32", None, tensors, config, **about))
        print(f"image: {IMAGE_STUDENTS[name].label} ({name})")
    if found.text:
        name, rows, tensors = text_from_upstream(found.text)
        table = "text_encoder." + POSITIONS
        length = SLOTS["text"].config_of(config).max_position_embeddings
        tensors[table] = stretched(tensors[table], length)
        channels = len(tensors["text_projection.bias"])
        tensors |= {"feature_mean": torch.zeros(channels), "feature_scale": torch.ones(channels)}
        parts.append(text_part(name, "attended", tensors, config, **about))
        print(f"text: {name}, {rows} positions{text_remark(rows, length)}")
    return parts


def stretched(table_11LD: Tensor, length: int) -> Tensor:
    """Resize a table of positions to `length` rows.

    As EfficientSAM3's text encoder does with a text that is not as long as its table (bilinear, which along one axis
    is linear), so a student that learned on such texts keeps its positions.
    """
    if table_11LD.shape[2] == length:
        return table_11LD
    size = (length, table_11LD.shape[3])
    return F.interpolate(table_11LD.float(), size, mode="bilinear", align_corners=False)


def text_remark(rows: int, length: int) -> str:
    """Return what to know about a text student whose table of positions had `rows` rows and is brought to `length`."""
    remark = "" if rows == length else f", interpolated to {length}"
    if rows < length:
        remark += (
            f". It learned on {rows} tokens, which its authors report to work poorly on longer texts: train it further"
        )
    return remark + "; it attends to padding, as in EfficientSAM3 (student_padding: attended)"


# ---- a whole model


def completed(
    found: UpstreamFile, parts: list[Part], config: PreTrainedConfig, chassis: Path | None, source: Path
) -> tuple[Merged, dict[str, Tensor]]:
    """Return the students with the rest of SAM 3, and what transformers cannot hold of it.

    What the file has is the file's; what it lacks is the chassis', if there is one.

    Raises:
        ImportedError: tensors are missing.
        KeyMapError: a tensor of the file is not SAM 3's.
    """
    renamed, extra = key_map(config).to_transformers(found.rest)
    # The file goes first: a stage 3 checkpoint has trained more of SAM 3 than its students.
    rest = {"file": on_its_own(renamed)}
    if chassis is not None:
        rest["chassis"] = {name: tensor for name, tensor in read_tensors(chassis).items() if name not in renamed}
        extra = extras(chassis) | extra
    refuse_incomplete(found, config, rest, parts, source)
    return combine(config, rest, parts), extra


def on_its_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float32 tensors, a tensor with two names in transformers' format copied for the second."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = to_float32(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return own


def brought(found: UpstreamFile, merged: Merged, chassis: Path | None, source: Path) -> list[dict]:
    """Return what effsam3.json says of the tensors of another SAM 3 that have taken the place of the chassis'."""
    if found.foreign is None or chassis is None:
        return []
    names = sorted(name for name, owner in merged.owners.items() if owner == "file")
    whole = read_tensors(chassis)
    before = fingerprint({name: whole[name] for name in names})
    return [{"name": found.chassis, "from": source.name, "made_on": before, "tensors": names}]


def refuse_incomplete(
    found: UpstreamFile, config: PreTrainedConfig, rest: dict[str, dict], parts: list[Part], source: Path
) -> None:
    """Refuse a file that does not bring all of SAM 3 that its students leave in place, when no chassis does.

    Raises:
        ImportedError: tensors are missing; the message names the parts and how to get them.
    """
    replaced = tuple(prefix for part in parts for prefix in SLOTS[part.slot].owns)
    needed = {name for name in empty_tensors(config) if not name.startswith(replaced)}
    missing = needed.difference(*rest.values())
    if not missing:
        return
    if missing == needed:
        raise ImportedError(
            f"{source} only holds students; name the SAM 3 that they belong to, such as --sam3 {SAM3.hub_id}"
        )
    places = Counter(".".join(name.split(".")[:2]) for name in missing)
    known = "EfficientSAM3's stage 3 files are known to lack the geometry encoder"
    if found.foreign is not None:
        known = f"{found.chassis} has a {found.foreign.lacks} in their place, which transformers does not have"
    raise ImportedError(
        f"{source} lacks {len(missing)} tensors of SAM 3 ("
        + ", ".join(f"{place} {count}" for place, count in places.most_common(4))
        + f"; {known}); take them from the SAM 3 that it was made from, such as --sam3 {SAM3.hub_id}"
    )


def next_steps(folder: Path, parts: list[Part]) -> str:
    """Return commands that use the imported folder."""
    lines = []
    if folder.name == "merged":
        run = folder.parent
        lines.append(f"measure it:   effsam3 evaluate RECIPE name={run.name} train.runs={run.parent}")
    lines.append(f"teach by it:  effsam3 launch RECIPE sam3.checkpoint={folder}")
    slots = [part.slot for part in parts]
    if not slots:
        return "\n".join(lines)
    lines.append(f"train it on:  effsam3 launch RECIPE student_init={folder}  (stage {' or '.join(slots)})")
    lines.append(f"release it:   effsam3 merge RECIPE {' '.join(f'parts.{slot}={folder}' for slot in slots)}")
    return "\n".join(lines)
