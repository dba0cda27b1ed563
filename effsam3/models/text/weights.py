# SPDX-License-Identifier: Apache-2.0
"""MobileCLIP's weights for the text students: every tensor of either side loaded, initialised or dropped by name.

Two formats are read: Apple's own (`text_encoder.*`, the only one with MobileCLIP-S0's convolutions) and open_clip's
(`text.*`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from effsam3.hub import hub_errors
from effsam3.models.image.student import StudentError, read_weights_file
from effsam3.models.keymaps import KeyMap, section
from effsam3.models.keymaps.mobileclip import APPLE, HOLES, OPEN_CLIP, POSITIONS
from effsam3.models.text.student import StudentText

_KEYMAPS = {
    "text_encoder.embedding_layer.weight": KeyMap(
        section("text_encoder.", "text_encoder.", APPLE), HOLES, first="Apple's", second="Sam3LiteText's"
    ),
    "text.token_embedding.weight": KeyMap(
        section("text.", "text_encoder.", OPEN_CLIP), HOLES, first="open_clip's", second="Sam3LiteText's"
    ),
}

_DROPPED = [
    (r"(image_encoder|visual)\..*", "image tower"),
    (r"logit_(scale|bias)", "temperature of CLIP's own loss"),
]
_INITIALISED = [
    (r"text_projection\.(weight|bias)", "projection to SAM 3's channels, which MobileCLIP does not have"),
    (r"feature_(mean|scale)", "the teacher's statistics"),
]


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What became of every tensor: of the student's, loaded or initialised; of the source's, loaded or dropped."""

    source: str
    loaded: dict[str, str]  # the student's tensor: what of the source it is
    initialised: dict[str, str]  # the student's tensor: why
    dropped: dict[str, str]  # the source's tensor: why

    def __str__(self) -> str:
        """Three lines with counts and reasons."""
        table = next(name for name in self.loaded.values() if "rows" in name)
        return "\n".join(
            [
                f"{self.source}: {len(self.loaded)} tensors loaded; positions: {table}",
                f"initialised: {_count_reasons(self.initialised)}",
                f"dropped: {_count_reasons(self.dropped)}",
            ]
        )


def _count_reasons(reasons: dict[str, str]) -> str:
    return "; ".join(f"{count} ({reason})" for reason, count in Counter(reasons.values()).items()) or "none"


def load_text_weights(student: StudentText, weights: str) -> WeightsReport:
    """Initialise a text student from a MobileCLIP checkpoint, its projection to SAM 3's channels left as it is.

    `weights` is a local file (.pt, .bin, .safetensors), an open_clip model such as `MobileCLIP-S1`, or a file on the
    Hub as ORG/REPO/FILE. A student's own are its row's `weights` in the registry.

    The first `context_length` of the 77 positions are taken: MobileCLIP was trained with real tokens there.
    (Interpolating would tell the student that its texts are 77 long.)

    Raises:
        StudentError: no such weights; or a tensor without a use, without a source, or of another shape.
        KeyMapError: a tensor of several parts that cannot be divided into them.
    """
    source = read_weights_file(_find(weights), "fetch it again, or name other weights (student_init)")
    keymap = next((keymap for name, keymap in _KEYMAPS.items() if name in source), None)
    if keymap is None:
        raise StudentError(
            f"student_init: {weights} is not a MobileCLIP checkpoint: neither {' nor '.join(_KEYMAPS)} is among its "
            f"{len(source)} tensors (first: {', '.join(list(source)[:3])})"
        )
    state = student.state_dict()
    tensors, loaded, dropped, problems = {}, {}, {}, []
    for name, tensor in source.items():
        reason = _first_match(_DROPPED, name)
        if reason is not None:
            dropped[name] = reason
            continue
        offers = _convert(keymap, name, tensor, student.context_length)
        if not offers:
            # Collected, so that a wrong checkpoint is told from one with a single new tensor.
            problems.append(f"{name} is unknown")
        for target, (value, origin) in offers.items():
            if target not in state:
                problems.append(f"{name} has no place in the student ({target})")
            elif value.shape != state[target].shape:
                problems.append(f"{name} is {tuple(value.shape)} for {target}, which is {tuple(state[target].shape)}")
            tensors[target], loaded[target] = value, origin
    reasons = {name: _first_match(_INITIALISED, name) for name in state if name not in tensors}
    problems += [f"{name} is missing" for name, reason in reasons.items() if reason is None]
    if problems:
        raise StudentError(
            f"student_init: {weights} does not fit this student, {len(problems)} problems: {'; '.join(problems[:6])}"
        )
    student.load_state_dict(state | tensors)
    return WeightsReport(
        source=weights,
        loaded=loaded,
        initialised={name: reason for name, reason in reasons.items() if reason},
        dropped=dropped,
    )


def _first_match(table: list[tuple[str, str]], name: str) -> str | None:
    return next((reason for pattern, reason in table if re.fullmatch(pattern, name)), None)


def _convert(keymap: KeyMap, name: str, tensor: Tensor, positions: int) -> dict[str, tuple[Tensor, str]]:
    """Return the student's tensors made of one of the source's, each with a description; none if unknown."""
    targets = keymap.forward.targets(name)
    if not targets:
        return {}
    values = list(keymap.forward({name: tensor}).values())
    if targets == ["text_encoder." + POSITIONS]:
        table = tensor.reshape(1, 1, -1, tensor.shape[-1])
        # The first rows, not all of them resized: MobileCLIP learned each position by itself.
        values, origins = [table[:, :, :positions]], [f"{name}, first {positions} of {table.shape[2]} rows"]
    elif len(targets) == 3:
        origins = [f"{name}, {letter}" for letter in "qkv"]
    else:
        origins = [name]
    return dict(zip(targets, zip(values, origins, strict=True), strict=True))


def _find(weights: str) -> Path:
    """Return the checkpoint's file, downloaded if need be."""
    if Path(weights).is_file():
        return Path(weights)
    import open_clip
    from huggingface_hub import hf_hub_download

    remedy = "reach the Hub once so that it is cached, give a local file, or set student_init=random"
    with hub_errors(f"student_init: {weights} cannot be downloaded from the Hub", remedy, StudentError):
        if tags := open_clip.list_pretrained_tags_by_model(weights):
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(weights, tags[0])))
        if weights.count("/") >= 2:
            organisation, repository, file = weights.split("/", 2)
            return Path(hf_hub_download(f"{organisation}/{repository}", file))
    raise StudentError(
        f"student_init: there is no file {weights}, and it is neither an open_clip model with weights (MobileCLIP-S1) "
        "nor a file on the Hub (apple/MobileCLIP-S0/mobileclip_s0.pt)"
    )
