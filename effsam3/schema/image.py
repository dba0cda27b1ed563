# SPDX-License-Identifier: Apache-2.0
"""Recipes of stage 1, image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from effsam3.schema.common import Merge, Optim, Sam3, StageRecipe, Train, warmup_fits
from effsam3.schema.push import Push
from effsam3.schema.rules import (
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    at_least_one,
    below_one,
    each_once,
    image_student_name,
    initialisation,
    parquet,
)


@dataclass(frozen=True, kw_only=True)
class ImageData(Section):
    """The photographs."""

    # folder: photographs of your own; synthetic: drawn shapes, never used unless asked for here
    source: Literal["sa1b", "folder", "synthetic"]
    index: Annotated[
        str, parquet
    ]  # what to read; scripts/index_sa1b.py makes it, `folder` and `synthetic` by themselves
    folder: str | None = None  # source folder only: the photographs, in subfolders too; indexed on first use
    held_out: Annotated[float, below_one] = 0.1  # source folder only: share held out, by the images' content
    resize: Literal["square", "longest_side"] = "square"  # square is SAM 3's own; longest_side pads to a square
    synthetic_images: NonNegativeInt = 0  # how many to draw, both splits together; source synthetic only
    synthetic_side_px: PositiveInt = 192  # longest side of a drawn image
    limit: PositiveInt | None = None  # use only the first so many images of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 100  # stop after more unreadable images than this in one run

    def check(self) -> Iterator[str]:
        if self.source == "folder" and self.folder is None:
            yield "folder: source folder needs to know where the photographs are, such as data.folder=/photos"
        if self.source != "folder" and self.folder is not None:
            yield f"folder: {self.folder} is given, but source is {self.source}; set data.source=folder"
        if self.source == "folder" and self.held_out == 0:
            yield "held_out: 0 leaves nothing to validate on; set it above 0"
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


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(StageRecipe):
    """Stage 1, image: a student learns the output of SAM 3's ViT trunk, then takes its place."""

    stage: Literal["image"]  # the module of effsam3/stages that reads this recipe
    name: FileName  # of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    student: Annotated[str, image_student_name]  # a row of effsam3/models/registry.py; see `effsam3 compare`
    student_init: Annotated[str, initialisation] = "imagenet"  # imagenet, random, weights file or model folder
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
    push: Push = Push()

    def check(self) -> Iterator[str]:
        yield from warmup_fits(self)
        if self.loss.neck > 0 and self.export.tap == "neck":
            yield f"loss.neck: {self.loss.neck} needs the trunk's output, but export.tap is neck; set one of them back"
