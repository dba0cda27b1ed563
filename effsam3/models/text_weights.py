# SPDX-License-Identifier: Apache-2.0
"""MobileCLIP's weights for the text students: every tensor of either side loaded, initialised or dropped by name.

Two layouts are read: Apple's own (`text_encoder.*`, the only one with MobileCLIP-S0's convolutions) and open_clip's
(`text.*`).
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effsam3.models.text import StudentText
from effsam3.models.vision import StudentError

# Names of either layout as patterns, transformers' names, and how the tensor changes:
#   copy      not at all
#   swap      transposed: a matrix that multiplies from the right becomes a Linear's
#   qkv       three matrices in one, for the three names that `@` stands for
#   rows      the table of positions: its first rows, see `_rows`
_BLOCK = r"text_encoder\.transformer\.(\d+)\."
_APPLE = [
    (r"text_encoder\.embedding_layer\.weight", "embeddings.token_embedding.weight", "copy"),
    (
        r"text_encoder\.positional_embedding\.pos_embed\.pos_embed",
        "embeddings.position_embedding.position_embedding",
        "rows",
    ),
    (r"text_encoder\.projection_layer", "projection.weight", "swap"),
    (r"text_encoder\.final_layer_norm\.(weight|bias)", r"final_layer_norm.\1", "copy"),
    (_BLOCK + r"pre_norm_mha\.0\.(weight|bias)", r"layers.\1.layer_norm1.\2", "copy"),
    (_BLOCK + r"pre_norm_mha\.1\.qkv_proj\.(weight|bias)", r"layers.\1.self_attn.@_proj.\2", "qkv"),
    (_BLOCK + r"pre_norm_mha\.1\.out_proj\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2", "copy"),
    (_BLOCK + r"pre_norm_ffn\.0\.(weight|bias)", r"layers.\1.layer_norm2.\2", "copy"),
    (_BLOCK + r"pre_norm_ffn\.1\.(weight|bias)", r"layers.\1.mlp.fc1.\2", "copy"),
    (_BLOCK + r"pre_norm_ffn\.4\.(weight|bias)", r"layers.\1.mlp.fc2.\2", "copy"),
    (_BLOCK + r"((?:token_mixer\.)?layer_scale)", r"layers.\1.\2", "copy"),
    (_BLOCK + r"token_mixer\.norm\.rbr_skip\.(\w+)", r"layers.\1.token_mixer.reference_batchnorm.\2", "copy"),
    (_BLOCK + r"token_mixer\.mixer\.rbr_skip\.(\w+)", r"layers.\1.token_mixer.mixer.batchnorm_skip.\2", "copy"),
    (_BLOCK + r"token_mixer\.mixer\.rbr_conv\.0\.conv\.weight", r"layers.\1.token_mixer.mixer.conv.weight", "copy"),
    (
        _BLOCK + r"token_mixer\.mixer\.rbr_conv\.0\.bn\.(\w+)",
        r"layers.\1.token_mixer.mixer.batchnorm_conv.\2",
        "copy",
    ),
    (_BLOCK + r"convffn\.conv\.conv\.weight", r"layers.\1.conv_feed_forward.depthwise_conv.weight", "copy"),
    (_BLOCK + r"convffn\.conv\.bn\.(\w+)", r"layers.\1.conv_feed_forward.depthwise_batchnorm.\2", "copy"),
    (_BLOCK + r"convffn\.(fc[12])\.(weight|bias)", r"layers.\1.conv_feed_forward.mlp.\2.\3", "copy"),
]
_RESBLOCK = r"text\.transformer\.resblocks\.(\d+)\."
_OPEN_CLIP = [
    (r"text\.token_embedding\.weight", "embeddings.token_embedding.weight", "copy"),
    (r"text\.positional_embedding", "embeddings.position_embedding.position_embedding", "rows"),
    (r"text\.text_projection", "projection.weight", "swap"),
    (r"text\.ln_final\.(weight|bias)", r"final_layer_norm.\1", "copy"),
    (_RESBLOCK + r"ln_([12])\.(weight|bias)", r"layers.\1.layer_norm\2.\3", "copy"),
    (_RESBLOCK + r"attn\.in_proj_(weight|bias)", r"layers.\1.self_attn.@_proj.\2", "qkv"),
    (_RESBLOCK + r"attn\.out_proj\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2", "copy"),
    (_RESBLOCK + r"mlp\.c_fc\.(weight|bias)", r"layers.\1.mlp.fc1.\2", "copy"),
    (_RESBLOCK + r"mlp\.c_proj\.(weight|bias)", r"layers.\1.mlp.fc2.\2", "copy"),
]
_LAYOUTS = {"text_encoder.embedding_layer.weight": _APPLE, "text.token_embedding.weight": _OPEN_CLIP}

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

    Of the 77 positions the first `context_length` are taken: in them MobileCLIP saw the tokens that stand there. (To
    interpolate would tell the student that its texts are 77 long.)

    Raises:
        StudentError: no such weights; or a tensor without a use, without a source, or of another shape.
    """
    source = _read(_find(weights))
    rules = next((rules for name, rules in _LAYOUTS.items() if name in source), None)
    if rules is None:
        raise StudentError(
            f"student_init: {weights} is not a MobileCLIP checkpoint: neither {' nor '.join(_LAYOUTS)} is among its "
            f"{len(source)} tensors (first: {', '.join(list(source)[:3])})"
        )
    state = student.state_dict()
    tensors, loaded, dropped, problems = {}, {}, {}, []
    for name, tensor in source.items():
        reason = _first_match(_DROPPED, name)
        if reason is not None:
            dropped[name] = reason
            continue
        offers = _convert(rules, name, tensor, student.context_length)
        if not offers:
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
    return WeightsReport(source=weights, loaded=loaded, initialised=reasons, dropped=dropped)


def _first_match(table: list[tuple[str, str]], name: str) -> str | None:
    return next((reason for pattern, reason in table if re.fullmatch(pattern, name)), None)


def _convert(rules: list, name: str, tensor: Tensor, positions: int) -> dict[str, tuple[Tensor, str]]:
    """Return the student's tensors made of one of the source's, each with the words that say so."""
    for pattern, target, change in rules:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        target = "text_encoder." + match.expand(target)
        if change == "qkv":
            letters = zip("qkv", tensor.chunk(3), strict=True)
            return {target.replace("@", letter): (part, f"{name}, {letter}") for letter, part in letters}
        if change == "rows":
            table = tensor.reshape(1, 1, -1, tensor.shape[-1])
            return {target: (table[:, :, :positions], f"{name}, first {positions} of {table.shape[2]} rows")}
        return {target: (tensor.T if change == "swap" else tensor, name)}
    return {}


def _find(weights: str) -> Path:
    """Return the checkpoint's file, downloaded if need be."""
    if Path(weights).is_file():
        return Path(weights)
    import open_clip
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if tags := open_clip.list_pretrained_tags_by_model(weights):
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(weights, tags[0])))
        if weights.count("/") >= 2:
            organisation, repository, file = weights.split("/", 2)
            return Path(hf_hub_download(f"{organisation}/{repository}", file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StudentError(
            f"student_init: {weights} cannot be had from the Hub ({type(error).__name__}: {error}); reach the Hub "
            "once so that it is cached, give a local file, or set student_init=random"
        ) from error
    raise StudentError(
        f"student_init: there is no file {weights}, and it is neither an open_clip model with weights (MobileCLIP-S1) "
        "nor a file on the Hub (apple/MobileCLIP-S0/mobileclip_s0.pt)"
    )


def _read(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors; of pickles, nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise StudentError(f"student_init: {path} is not a checkpoint of tensors alone ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise StudentError(f"student_init: {path} does not hold a plain mapping of names to tensors")
    return tensors
