# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say: one frozen dataclass per section, one line per key with its unit or meaning.

`effsam3/recipe.py` reads YAML into these classes. A rule that concerns one key is part of its type; rules between keys
are `check` methods, which yield one sentence per mistake. A section named after a verb configures that verb.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from effsam3.errors import did_you_mean
from effsam3.models.registry import IMAGE_STUDENTS, TEXT_STUDENTS, TINY_TEXT_STUDENTS

WEIGHTS_FILES = (".safetensors", ".bin", ".pth", ".pt")  # what timm loads


# Rules: a function of the value that returns what is wrong with it, or an empty text.
def positive(value: float) -> str:
    return "" if value > 0 else f"must be above 0, got {value}"


def not_negative(value: float) -> str:
    return "" if value >= 0 else f"must be 0 or more, got {value}"


def below_one(value: float) -> str:
    return "" if 0 <= value < 1 else f"must be at least 0 and below 1, got {value}"


def context(value: int) -> str:
    return "" if value in (16, 32) else f"must be 16 or 32, got {value}: SAM 3's text encoder reads 32 tokens at most"


def share(value: float) -> str:
    return "" if 0 <= value <= 1 else f"must be between 0 and 1, got {value}"


def file_name(value: str) -> str:
    allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value)
    return "" if allowed else f"{value!r} must be letters, digits, '.', '_' and '-', beginning with a letter or digit"


def parquet(value: str) -> str:
    return "" if value.endswith(".parquet") else f"{value!r} must end in .parquet"


def each_once(values: tuple[str, ...]) -> str:
    repeated = sorted({value for value in values if values.count(value) > 1})
    return f"{', '.join(repeated)} is listed twice" if repeated else ""


def at_least_one(values: tuple[str, ...]) -> str:
    return "" if values else "is empty; list at least one"


def image_student_name(value: str) -> str:
    return "" if value in IMAGE_STUDENTS else f"{value!r} is not a student{did_you_mean(value, IMAGE_STUDENTS)}"


def text_student_name(value: str) -> str:
    rows = TEXT_STUDENTS | TINY_TEXT_STUDENTS
    return "" if value in rows else f"{value!r} is not a text student{did_you_mean(value, rows)}"


def text_initialisation(value: str) -> str:
    if value in ("mobileclip", "random") or value.endswith(WEIGHTS_FILES):
        return ""
    return f"{value!r} is not mobileclip, random or a weights file ({', '.join(WEIGHTS_FILES)})"


def initialisation(value: str) -> str:
    if value in ("imagenet", "random") or value.endswith(WEIGHTS_FILES):
        return ""
    return f"{value!r} is not imagenet, random or a weights file ({', '.join(WEIGHTS_FILES)})"


PositiveInt = Annotated[int, positive]
NonNegativeInt = Annotated[int, not_negative]
PositiveFloat = Annotated[float, positive]
NonNegativeFloat = Annotated[float, not_negative]
Decay = Annotated[float, below_one]
FileName = Annotated[str, file_name]


def exactly_one(section: object, *names: str) -> Iterator[str]:
    """Yield a mistake unless exactly one of the section's keys has a value."""
    given = [f"{name} ({getattr(section, name):g})" for name in names if getattr(section, name) is not None]
    if not given:
        yield f"{names[0]}: give it or {' or '.join(names[1:])}; neither is set"
    if len(given) > 1:
        yield f"{names[0]}: {' and '.join(given)} are both set; set one of them to null"


class Section:
    """A group of keys of a recipe."""

    def check(self) -> Iterator[str]:
        """Yield a sentence, beginning with a key of this section, for every mistake that two or more keys make."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Sam3(Section):
    """The SAM 3 that teaches, and whose other parts the merged model keeps."""

    checkpoint: str = "facebook/sam3"  # Hub id, local transformers folder, `tiny` (few layers) or `random` (full size)
    revision: str | None = None  # Hub commit, branch or tag; null: the newest
    fingerprint: str | None = None  # of the trunk's weights, as a store's manifest has it; null: accept any


@dataclass(frozen=True, kw_only=True)
class ImageData(Section):
    """The photographs."""

    source: Literal["sa1b", "synthetic"]  # synthetic: drawn shapes, never used unless asked for here
    index: Annotated[str, parquet]  # what to read; scripts/index_sa1b.py makes it, or `synthetic` does
    resize: Literal["square", "longest_side"] = "square"  # square is SAM 3's own; longest_side pads to a square
    synthetic_images: NonNegativeInt = 0  # how many to draw, both splits together; source synthetic only
    synthetic_side_px: PositiveInt = 192  # longest side of a drawn image
    limit: PositiveInt | None = None  # use only the first so many images of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 100  # stop after more unreadable images than this in one run

    def check(self) -> Iterator[str]:
        if self.source == "synthetic" and self.synthetic_images == 0:
            yield "synthetic_images: source synthetic needs to know how many to draw; set it above 0"
        if self.source != "synthetic" and self.synthetic_images > 0:
            yield (
                f"synthetic_images: {self.synthetic_images} asked for, but source is {self.source}; "
                "set data.source=synthetic or leave it 0"
            )


@dataclass(frozen=True, kw_only=True)
class ImageExport(Section):
    """The teacher's features: where they are kept and which. `tap` and `grid` hold for an online teacher too."""

    to: str  # store folder; shared by all students of one teacher and data set
    tap: Literal["trunk", "neck"] = "trunk"  # trunk: the ViT's output, what a student replaces; neck: the FPN's
    grid: PositiveInt | None = None  # rows and columns kept; null: the teacher's own (72 for SAM 3)
    dtype: Literal["float16", "int8"] = "float16"  # int8: half the bytes, one scale per channel and record
    pixels: bool = False  # keep the resized uint8 image too: training then needs no photographs and no JPEG decoding
    batch_size: PositiveInt = 8  # images per rank per teacher forward


@dataclass(frozen=True, kw_only=True)
class ImageLoss(Section):
    """Weights of the terms of the loss; see effsam3/losses.py for the formulas."""

    mse: NonNegativeFloat = 1.0  # mean squared error per position
    cosine: NonNegativeFloat = 1.0  # 1 - cosine similarity per position
    neck: NonNegativeFloat = 0.0  # difference of what the frozen FPN neck makes of both; costs its forward
    channels: Literal["mean", "sum"] = "mean"  # mean: of standardised channels; sum: upstream's, which drowns cosine

    def check(self) -> Iterator[str]:
        if self.mse == self.cosine == self.neck == 0:
            yield "mse: all weights (mse, cosine, neck) are 0; nothing would be learned"


@dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """AdamW, linear warm-up, cosine decay. Rates hold for `train.global_batch_size` and are never rescaled."""

    lr: PositiveFloat  # highest learning rate, reached when warm-up ends
    min_lr: NonNegativeFloat  # learning rate of the last step
    warmup_lr: NonNegativeFloat  # learning rate of the first step
    weight_decay: NonNegativeFloat  # none on biases and normalisation weights
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # AdamW's
    eps: PositiveFloat = 1e-8  # AdamW's
    clip_grad_norm: PositiveFloat  # largest norm of the whole gradient
    warmup_epochs: NonNegativeFloat | None = None  # length of warm-up: this ...
    warmup_steps: NonNegativeInt | None = None  # ... or this, exactly one

    def check(self) -> Iterator[str]:
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                yield f"{name}: {getattr(self, name)} is above optim.lr ({self.lr})"
        yield from exactly_one(self, "warmup_epochs", "warmup_steps")


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """The loop."""

    epochs: PositiveFloat | None = None  # length of training in passes over the train split: this ...
    steps: PositiveInt | None = None  # ... or in optimizer steps, exactly one
    global_batch_size: PositiveInt  # samples per optimizer step over all ranks; accumulation is derived from it
    micro_batch_size: PositiveInt  # samples per rank per forward. BatchNorm students see this one: it changes learning
    precision: Literal["bf16", "fp32"] = "bf16"  # of the forward; weights and optimizer stay fp32
    seed: NonNegativeInt = 0  # of initialisation and sample order
    ema: Decay = 0.0  # decay per step of the averaged weights; 0: no averaging
    log_every: PositiveInt = 20  # steps
    eval_every: PositiveInt  # steps between validations
    save_every: PositiveInt  # steps between checkpoints
    keep_checkpoints: PositiveInt = 3  # newest ones; the best one is kept besides
    eval_samples: PositiveInt = 512  # held-out images per validation
    patience: NonNegativeInt = 0  # stop after so many validations without improvement; 0: never
    trackers: Annotated[tuple[Literal["wandb", "tensorboard"], ...], each_once] = ()  # besides metrics.jsonl
    wandb_project: str = "effsam3"  # used when trackers has wandb
    runs: str = "runs"  # folder of run folders

    def check(self) -> Iterator[str]:
        if self.global_batch_size % self.micro_batch_size:
            yield (
                f"global_batch_size: {self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size ({self.micro_batch_size})"
            )
        yield from exactly_one(self, "epochs", "steps")


@dataclass(frozen=True, kw_only=True)
class Merge(Section):
    """Which weights become the released model."""

    checkpoint: FileName = "best"  # `best`, `last`, or a folder of checkpoints/ such as step-000100


Benchmark = Literal["fidelity", "masks", "speed"]
Prompt = Literal["box", "point"]


@dataclass(frozen=True, kw_only=True)
class ImageEvaluate(Section):
    """What the merged model is measured on."""

    benchmarks: Annotated[tuple[Benchmark, ...], at_least_one, each_once] = ("fidelity", "masks", "speed")
    max_images: PositiveInt = 200  # held-out images per benchmark
    masks_per_image: PositiveInt = 8  # annotated masks prompted per image, at most
    prompts: Annotated[tuple[Prompt, ...], at_least_one, each_once] = ("box", "point")  # taken from the annotations
    pictures: NonNegativeInt = 8  # images to draw


def warmup_fits(recipe: object) -> Iterator[str]:
    """Yield a sentence when the warm-up is as long as the training or longer."""
    for name in ("epochs", "steps"):
        warmup, length = getattr(recipe.optim, f"warmup_{name}"), getattr(recipe.train, name)
        if warmup is not None and length is not None and warmup >= length:
            yield f"optim.warmup_{name}: {warmup:g} is not below train.{name} ({length:g})"


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Section):
    """Stage 1, image: a student learns the output of SAM 3's ViT trunk, then takes its place."""

    stage: Literal["image"]  # the module of effsam3/stages that reads this recipe
    name: FileName  # of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    student: Annotated[str, image_student_name]  # a row of effsam3/models/registry.py; see `effsam3 compare`
    student_init: Annotated[str, initialisation] = "imagenet"  # imagenet, random, or a local timm weights file
    head: Literal["fused", "stride32"] = "fused"  # fused: strides 8, 16, 32; stride32: upstream's
    teacher: Literal["stored", "online"] = "stored"  # stored: reads export.to; online: runs the teacher beside it
    sam3: Sam3 = Sam3()
    data: ImageData
    export: ImageExport
    loss: ImageLoss = ImageLoss()
    optim: Optim
    train: Train
    evaluate: ImageEvaluate = ImageEvaluate()
    merge: Merge = Merge()

    def check(self) -> Iterator[str]:
        yield from warmup_fits(self)
        if self.loss.neck > 0 and self.export.tap == "neck":
            yield f"loss.neck: {self.loss.neck} needs the trunk's output, but export.tap is neck; set one of them back"


@dataclass(frozen=True, kw_only=True)
class TextData(Section):
    """The captions: a caption set, lists of noun phrases, or a mix of both."""

    source: Literal["recap", "synthetic"]  # synthetic: made from a grammar, never used unless asked for here
    captions: str | None = None  # folder of Recap-DataComp parquet, or its Hub id; null: phrases alone
    column: Literal["re_caption", "org_caption", "mix"] = "re_caption"  # mix: one of the two, by the row's key
    phrases: tuple[str, ...] = ()  # files of noun phrases: txt, json, csv or parquet
    phrase_share: Annotated[float, share] = 0.0  # of the samples that come from the phrases
    context_length: Annotated[int, context] = 32  # most tokens of a text, start and end included; SAM 3 reads 32
    streaming: bool = False  # read captions as they come, without an index; needs train.steps
    held_out: Annotated[float, share] = 0.01  # of captions and phrases, chosen by their text
    synthetic_captions: NonNegativeInt = 0  # how many to make; source synthetic only
    limit: PositiveInt | None = None  # use only the first so many captions; null: all
    workers: NonNegativeInt = 4  # data loader processes per rank; 0: load in the main process

    def check(self) -> Iterator[str]:
        if self.source == "synthetic" and self.synthetic_captions == 0:
            yield "synthetic_captions: source synthetic needs to know how many to make; set it above 0"
        if self.source != "synthetic" and self.synthetic_captions > 0:
            yield (
                f"synthetic_captions: {self.synthetic_captions} asked for, but source is {self.source}; "
                "set data.source=synthetic or leave it 0"
            )
        if self.streaming and (self.captions is None or self.phrases):
            yield "streaming: reads data.captions alone; set it false, or leave data.phrases out"
        if self.captions is None and not self.phrases:
            yield "captions: neither data.captions nor data.phrases is given; there is nothing to read"
        if self.phrases and self.phrase_share == 0:
            yield "phrase_share: data.phrases are given but their share is 0; set it above 0, 1 for phrases alone"
        if not self.phrases and self.phrase_share > 0:
            yield f"phrase_share: {self.phrase_share:g}, but there are no data.phrases"


@dataclass(frozen=True, kw_only=True)
class TextExport(Section):
    """The teacher's features, for `teacher: stored`."""

    to: str = "data/teacher/sam3-text"  # store folder
    batch_size: PositiveInt = 256  # captions per rank per teacher forward


@dataclass(frozen=True, kw_only=True)
class TextLoss(Section):
    """Weights of the terms of the loss, per token."""

    mse: NonNegativeFloat = 1.0  # mean squared error of standardised channels
    cosine: NonNegativeFloat = 1.0  # 1 - cosine similarity
    padding_mask: bool = True  # count valid tokens alone; false: padding too, as upstream's first runs did


@dataclass(frozen=True, kw_only=True)
class TextEvaluate(Section):
    """What the merged model's text features are measured on."""

    benchmarks: Annotated[tuple[Literal["similarity", "speed"], ...], at_least_one, each_once] = (
        "similarity",
        "speed",
    )
    max_captions: PositiveInt = 2000  # held-out captions, and as many phrases
    phrases: str | None = None  # file of noun phrases to measure on; null: the held-out ones of data.phrases


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Section):
    """Stage 1, text: a student learns the features of SAM 3's text encoder, then takes its place."""

    stage: Literal["text"]
    name: FileName  # of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    student: Annotated[str, text_student_name]  # a row of effsam3/models/registry.py; see `effsam3 compare`
    student_init: Annotated[str, text_initialisation] = "mobileclip"  # mobileclip, random, or a local weights file
    teacher: Literal["stored", "online"] = "online"  # online: costs less than reading stored targets
    sam3: Sam3 = Sam3()
    data: TextData
    export: TextExport = TextExport()
    loss: TextLoss = TextLoss()
    optim: Optim
    train: Train
    evaluate: TextEvaluate = TextEvaluate()
    merge: Merge = Merge()

    def check(self) -> Iterator[str]:
        yield from warmup_fits(self)
        if self.data.streaming and self.train.steps is None:
            yield "train.steps: a stream has no length; give steps instead of epochs"
        if self.data.streaming and self.teacher == "stored":
            yield "teacher: a stream cannot be stored; set teacher=online or data.streaming=false"


STAGES = {"image": ImageRecipe, "text": TextRecipe}  # stage -> class of its recipes
