# SPDX-License-Identifier: Apache-2.0
"""How near a text student comes to SAM 3's text encoder: token and pooled similarity, retrieval, speed, a plot.

Letters: B texts at once, L tokens, C channels of SAM 3's detector, T texts in all, N valid tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3LiteTextModel

from effsam3.benchmarks.speed import alternate, device_name, with_ratio
from effsam3.errors import UserError
from effsam3.files import atomic_file
from effsam3.losses.features import agreement_sums, standardise
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.image.teacher import parameter_count
from effsam3.models.text.padding import RULES, padding_of
from effsam3.models.text.student import TextTeacher
from effsam3.models.text.tokens import END_ID, PAD_ID, START_ID

SHORT = 8  # tokens of a noun phrase
SPEED_BATCH = {"cuda": 256, "cpu": 16}  # texts at once for the throughput
ROWS = 1024  # of the texts' similarity matrix at once

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]
TextFeatures = Callable[[Tensor, Tensor], Tensor]


class MergedText(nn.Module):
    """A merged model's text side as transformers runs it: ids and mask (B, L) to features (B, L, C) float32.

    L is at most the model's `context_length`, to which every batch is padded as transformers' processors do.
    """

    def __init__(self, model: Sam3LiteTextModel):
        super().__init__()
        self.text_encoder = model.text_encoder
        self.text_projection = model.text_projection
        sizes: Any = model.config.text_config
        self.context_length = sizes.max_position_embeddings
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return features (B, L, C); features at padding are meaningless."""
        length, missing = ids_BL.shape[1], self.context_length - ids_BL.shape[1]
        assert missing >= 0, f"{length} tokens, transformers' processors pad to {self.context_length}"
        ids_BL, mask_BL = F.pad(ids_BL, (0, missing), value=PAD_ID), F.pad(mask_BL, (0, missing))
        hidden_BLD = self.text_encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return self.text_projection(hidden_BLD)[:, :length]


def load_text_features(folder: Path) -> MergedText:
    """Load the text side of a merged folder through the class that its padding rule needs, frozen, in eval mode.

    Raises:
        ChassisError: the folder lacks tensors or holds others; one whose text encoder is still SAM 3's does.
    """
    return MergedText(load_whole(RULES[padding_of(read_config(folder).detector_config)].detector, folder))


def text_similarity(
    teacher: TextTeacher, student: TextFeatures, encode: Encode, texts: list[str], batch: int = 64
) -> dict:
    """Compare both models' features of the texts; of those that become the same tokens only one counts.

    Args:
        student: ids and mask (B, L), on the teacher's device, to features (B, L, C).
        encode: texts to ids and mask, as `partial(Tokenizer().encode, context_length=32)`.
        batch: texts at once.

    Returns:
        `cosine`, `cosine_centred`, `mse` and `cosine_of_mean`, means over all valid tokens (start and end included) as
        in `losses.agreement_sums`, by the teacher's mean and deviation over these tokens; `pooled_cosine`, the mean
        over texts of the cosine between their mean valid tokens; `neighbour_agreement`, the share of texts whose
        nearest other text is the same for both models, and `retrieval`, the share whose student vector is nearest to
        their own teacher vector, both by the cosine of centred pooled vectors; `by_length`, {number of tokens:
        {"cosine", "texts"}}; `texts` counts.

    Raises:
        UserError: fewer than two different texts.
    """
    ids_TL, mask_TL = _distinct(*encode(texts))
    if len(ids_TL) < 2:
        raise UserError(f"{len(texts)} held-out texts give {len(ids_TL)} different ones; retrieval needs two or more")
    target_NC, pred_NC = _valid_features((teacher, student), ids_TL, mask_TL, batch, next(teacher.parameters()).device)
    mean_C, deviation_C = target_NC.mean(0), target_NC.std(0, correction=0)
    target_1C1N, pred_1C1N = (feat_NC.T[None, :, None] for feat_NC in (target_NC, pred_NC))
    every = torch.ones(1, 1, 1, len(target_NC), dtype=torch.bool)
    sums = agreement_sums(pred_1C1N, target_1C1N, every, mean_C, deviation_C)
    tokens = float(sums.pop("positions"))

    lengths_T = mask_TL.sum(1)
    target_TC, pred_TC = (_pool(feat_NC, lengths_T) for feat_NC in (target_NC, pred_NC))
    # Centred first: raw text features share one large direction, which makes all texts look alike.
    target, pred = (
        F.normalize(standardise(feat_TC.T[None, :, None], mean_C, deviation_C)[0, :, 0].T)
        for feat_TC in (target_TC, pred_TC)
    )
    same = _nearest(target, target, others=True) == _nearest(pred, pred, others=True)
    found = _nearest(pred, target, others=False) == torch.arange(len(target))

    # A text's tokens all count under its own length.
    lengths_N = lengths_T.repeat_interleave(lengths_T)
    cosine_N = F.cosine_similarity(pred_NC, target_NC)
    return {name: float(value) / tokens for name, value in sums.items()} | {
        "pooled_cosine": float(F.cosine_similarity(pred_TC, target_TC).mean()),
        "neighbour_agreement": float(same.double().mean()),
        "retrieval": float(found.double().mean()),
        "by_length": {
            length: {"cosine": float(cosine_N[lengths_N == length].mean()), "texts": int((lengths_T == length).sum())}
            for length in lengths_T.unique().tolist()
        },
        "texts": len(ids_TL),
    }


def _distinct(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the texts of different tokens, shortest first, so that batches need little padding."""
    lengths = mask_BL.sum(1).tolist()
    first: dict[tuple[int, ...], int] = {}
    for row, (ids, length) in enumerate(zip(ids_BL.tolist(), lengths, strict=True)):
        first.setdefault(tuple(ids[:length]), row)
    rows = sorted(first.values(), key=lengths.__getitem__)
    return ids_BL[rows], mask_BL[rows]


@torch.no_grad()
def _valid_features(
    models: tuple[TextFeatures, ...], ids_TL: Tensor, mask_TL: Tensor, batch: int, device: torch.device
) -> list[Tensor]:
    """Each model's features (N, C) of the valid tokens, text after text, on the CPU."""
    parts: list[list[Tensor]] = [[] for _ in models]
    for ids_BL, mask_BL in zip(ids_TL.split(batch), mask_TL.split(batch), strict=True):
        longest = int(mask_BL.sum(1).max())
        ids_BL, mask_BL = ids_BL[:, :longest].to(device), mask_BL[:, :longest].to(device)
        for model, kept in zip(models, parts, strict=True):
            kept.append(model(ids_BL, mask_BL)[mask_BL].float().cpu())
    return [torch.cat(kept) for kept in parts]


def _pool(feat_NC: Tensor, lengths_T: Tensor) -> Tensor:
    """Return the mean token (T, C) of each text."""
    texts_N = torch.arange(len(lengths_T)).repeat_interleave(lengths_T)
    return feat_NC.new_zeros(len(lengths_T), feat_NC.shape[1]).index_add_(0, texts_N, feat_NC) / lengths_T[:, None]


def _nearest(query_TC: Tensor, key_TC: Tensor, others: bool) -> Tensor:
    """For each unit vector of the queries, the place of the nearest key; with `others`, never its own place."""
    found = []
    for start in range(0, len(query_TC), ROWS):
        similarity = query_TC[start : start + ROWS] @ key_TC.T
        if others:
            # A text's nearest neighbour would be itself.
            rows = torch.arange(len(similarity))
            similarity[rows, start + rows] = -torch.inf
        found.append(similarity.argmax(1))
    return torch.cat(found)


def text_speed(teacher: TextTeacher, student: nn.Module) -> dict:
    """Time both text sides alternately, so that a busy machine slows both.

    The student is what `load_text_features` returns, or that with its RepMixer blocks folded: it computes
    `context_length` tokens always, as transformers has it, where the teacher computes as many as there are.

    Returns for `teacher` and `student`: `parameters` (encoder and projection) and, for a noun phrase and the longest
    text, `{tokens}_tokens_ms` (one text) and `{tokens}_tokens_captions_per_s` (a batch of `batch`); their ratios as
    `ratio`, above 1 where the student is better; `device` and `batch`.
    """
    models = {"teacher": teacher, "student": student}
    device = next(teacher.parameters()).device
    batch = SPEED_BATCH[device.type]
    result: dict[str, dict[str, float]] = {
        name: {"parameters": parameter_count(model)} for name, model in models.items()
    }
    for length in (SHORT, teacher.context_length):
        ids_BL = torch.randint(START_ID, (batch, length), device=device)
        ids_BL[:, 0], ids_BL[:, -1] = START_ID, END_ID
        mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
        one_ms, batch_ms = (
            alternate({name: partial(model, ids_BL[:n], mask_BL[:n]) for name, model in models.items()}, device)
            for n in (1, batch)
        )
        for name in models:
            result[name][f"{length}_tokens_ms"] = one_ms[name]
            result[name][f"{length}_tokens_captions_per_s"] = batch * 1000 / batch_ms[name]
    return with_ratio(result) | {"device": device_name(device), "batch": batch}


def plot_similarity(results: dict[str, dict], path: Path) -> None:
    """Draw token cosine against the number of tokens, one line per set of texts, their counts as faint bars.

    Args:
        results: {name of the set: what `text_similarity` returns, or its JSON}.
        path: the picture, PNG by its suffix.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=100)
    cosine = figure.subplots()
    counts = cosine.twinx()
    width = 0.8 / len(results)
    for number, (name, result) in enumerate(results.items()):
        groups = sorted((int(length), group) for length, group in result["by_length"].items())
        lengths = [length for length, _ in groups]
        colour = f"C{number}"
        cosine.plot(
            lengths, [group["cosine"] for _, group in groups], "o-", markersize=4, color=colour,
            label=f"{name}, {result['texts']} texts, mean {result['cosine']:.3f}",
        )  # fmt: skip
        left = [length - 0.4 + width * number for length in lengths]
        counts.bar(left, [group["texts"] for _, group in groups], width, align="edge", color=colour, alpha=0.2)
    # The lines in front of the bars, which are on the second axis.
    cosine.set_zorder(counts.get_zorder() + 1)
    cosine.patch.set_visible(False)
    cosine.set_xlabel("tokens of a text, start and end included")
    cosine.set_ylabel("token cosine, student with teacher")
    counts.set_ylabel("texts (bars)")
    for axis in (cosine.xaxis, counts.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    cosine.grid(alpha=0.3)
    cosine.legend(loc="best")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
