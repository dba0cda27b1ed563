# SPDX-License-Identifier: Apache-2.0
"""Recipes of stage 1, text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from effsam3.data.store.format import Field, stride
from effsam3.errors import UserError, did_you_mean
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.flops import flops_line, text_gflop
from effsam3.models.registry import text_student_row
from effsam3.recipe.common import Data, Embed, FeatureRecipe, Merge, Optim, Sam3, Train
from effsam3.recipe.concepts import ConceptEvaluate
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    at_least_one,
    context,
    each_once,
    share,
    text_initialisation,
    text_student_name,
)

RECAP_COLUMNS = ("re_caption", "org_caption", "mix")


@dataclass(frozen=True, kw_only=True)
class TextData(Data):
    """The captions: a caption set, lists of noun phrases, or a mix of both."""

    # files: captions of your own; synthetic: made from a grammar, never used unless asked for here
    source: Literal["recap", "files", "synthetic"]
    # recap: folder of its parquet; files: txt, json, jsonl, csv, tsv or parquet; null: only phrases
    captions: str | None = None
    # Of the captions. recap: re_caption, org_caption or mix, one of the two by the row's key; files: any name.
    column: str | None = None  # null: re_caption where there is one, else the one known name, such as caption or text
    phrases: tuple[str, ...] = ()  # files of noun phrases: txt, json, jsonl, csv, tsv or parquet
    phrase_column: str | None = None  # column of the phrases; null: the one known name, such as phrase or text
    phrase_share: Annotated[float, share] = 0.0  # share of the samples that are phrases
    context_length: Annotated[int, context] = 32  # tokens of a text at most, start and end included; SAM 3 reads 32
    held_out: Annotated[float, share] = 0.01  # share of captions and phrases held out, by their text
    synthetic_captions: NonNegativeInt = 0  # how many to make; source synthetic only
    limit: PositiveInt | None = None  # use only the first N captions; null: all
    workers: NonNegativeInt = 4  # data loader processes per rank; all of them first read the files; 0: the main one

    def check(self) -> Iterator[str]:
        yield from self.made_up("synthetic_captions")
        if self.source != "files" and self.column not in (None, *RECAP_COLUMNS):
            yield (
                f"column: {self.column!r} is not one of {', '.join(RECAP_COLUMNS)}, which source {self.source} has"
                f"{did_you_mean(self.column, RECAP_COLUMNS)}; for captions of your own set data.source=files"
            )
        if self.captions is None and not self.phrases:
            yield "captions: neither data.captions nor data.phrases is given; there is nothing to read"
        if self.phrases and self.phrase_share == 0:
            yield "phrase_share: data.phrases are given but their share is 0; set it above 0, 1 for phrases only"
        if not self.phrases and self.phrase_share > 0:
            yield f"phrase_share: {self.phrase_share:g}, but there are no data.phrases"


@dataclass(frozen=True, kw_only=True)
class TextEmbed(Embed):
    """The teacher's features, for `teacher: stored`."""

    to: str = "data/teacher/sam3-text"  # store folder
    batch_size: PositiveInt = 256  # captions per rank per teacher forward


@dataclass(frozen=True, kw_only=True)
class TextLoss(Section):
    """Weights of the terms of the loss, per token."""

    mse: NonNegativeFloat = 1.0  # mean squared error of standardised channels
    cosine: NonNegativeFloat = 1.0  # 1 - cosine similarity
    padding_mask: bool = True  # count only valid tokens; false: padding too, as upstream's first runs did


@dataclass(frozen=True, kw_only=True)
class TextEvaluate(ConceptEvaluate):
    """What the merged model's text features are measured on."""

    # similarity: features next to the teacher's; speed: of the encoders; concepts: cgF1 of the whole model
    benchmarks: Annotated[tuple[Literal["similarity", "speed", "concepts"], ...], at_least_one, each_once] = (
        "similarity",
        "speed",
    )
    max_captions: PositiveInt = 2000  # held-out captions, and as many phrases
    phrases: str | None = None  # file of noun phrases to measure on; null: the held-out ones of data.phrases
    phrase_column: str | None = None  # column of that file; null: the one known name


@dataclass(frozen=True, kw_only=True)
class TextRecipe(FeatureRecipe):
    """Stage 1, text: a student learns the features of SAM 3's text encoder, then takes its place."""

    starter = "stage1/text/es_mc_s"
    replaces = "text encoder"
    knobs = ("train.micro_batch_size", "hardware", "train.ema", "data.context_length", "teacher")

    stage: Literal["text"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    student: Annotated[str, text_student_name]  # a row of effsam3/models/registry.py; see `effsam3 compare`
    student_init: Annotated[str, text_initialisation] = "mobileclip"  # mobileclip, random, file or model folder
    # What tokens see after a short text: nothing, or padding of id 0, as in EfficientSAM3 and its checkpoints.
    student_padding: Literal["masked", "attended"] = "masked"
    # BatchNorms of a RepMixer tower in training. batch: statistics of each micro-batch, of all 32 positions, as in
    # use; kept: those that its weights came with, so that short texts are computed short, at half the operations
    student_norms: Literal["batch", "kept"] = "batch"
    teacher: Literal["stored", "online"] = "online"  # online: costs less than reading stored targets
    sam3: Sam3 = Sam3()
    data: TextData
    embed: TextEmbed = TextEmbed()
    loss: TextLoss = TextLoss()
    optim: Optim
    train: Train
    evaluate: TextEvaluate = TextEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.student_norms == "kept" and self.student_init == "random":
            yield (
                "student_norms: kept keeps the statistics of trained weights, student_init=random has none; name "
                "weights, or set student_norms=batch"
            )

    def limits(self) -> list[str]:
        return [*super().limits(), f"Prompts were learned up to {self.data.context_length} tokens."]

    def derived(self) -> dict[str, Callable[[], str]]:
        return {
            "length": self._length_line,
            "student": self.student_line,
            "flops": self._flops_line,
            "store": self._store_line,
        }

    def _length_line(self) -> str:
        if self.train.steps is None:
            raise UserError("the captions are counted when they are opened; `embed` or `train` prints the steps")
        return f"{self.train.steps:,} steps of {self.train.global_batch_size} texts"

    def student_line(self) -> str:
        row = text_student_row(self.student)
        sam3 = sam3_of(self.sam3.checkpoint)
        total = row.params(sam3.context_length, sam3.sizes.fpn_hidden_size)
        text = f"{total:,} parameters with {sam3.context_length} positions and the projector"
        if sam3.counts is None:
            return text
        saved = 100 * (1 - total / sam3.counts.text)
        verdict = f"{abs(saved):.2f} % {'fewer' if saved > 0 else 'more'} than the {sam3.counts.text:,} they replace"
        return f"{text}, {verdict}"

    def _flops_line(self) -> str:
        sam3, row = sam3_of(self.sam3.checkpoint), text_student_row(self.student)
        return flops_line(sam3, {"text_encoder": text_gflop(row, sam3.context_length, sam3.sizes.fpn_hidden_size)})

    def _store_line(self) -> str:
        if self.teacher == "online":
            return "none: the teacher runs next to the student"
        channels, length = sam3_of(self.sam3.checkpoint).sizes.fpn_hidden_size, self.data.context_length
        return f"{stride(record_fields(length, channels)):,} bytes per text ({length} x {channels} float16)"


def record_fields(length: int, channels: int) -> list[Field]:
    """Return the fields of a text's record: features of `length` tokens, zeros after the last; how many are valid."""
    return [Field("features", "float16", (length, channels)), Field("length", "int32", (1,))]


RECIPE = TextRecipe
