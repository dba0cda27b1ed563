# SPDX-License-Identifier: Apache-2.0
"""Recipes of stage 1, image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from effsam3.data.store.format import Field, stride
from effsam3.errors import UserError
from effsam3.models.chassis.sizes import refused_side, sam3_of
from effsam3.models.flops import flops_line, image_gflop
from effsam3.models.image.backbones import PREFIX, image_student, pretrained_cfg
from effsam3.models.registry import SAM3, ImageStudent, Sizes, head_params
from effsam3.models.registry import Sam3 as Sam3Row
from effsam3.recipe.common import Data, Embed, FeatureRecipe, Merge, Optim, Sam3, Train
from effsam3.recipe.concepts import ConceptEvaluate
from effsam3.recipe.derived import index_counts, total_steps, warmup_steps
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
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
    student_side,
)


class ImageSource(NamedTuple):
    """What is known of a value of `data.source`."""

    label: str  # its name on the model card
    made_by: str  # how an index that is not there yet comes to be, with keys of the section `data`
    divided_by: str  # what decides which images are held out


SOURCES = {
    "sa1b": ImageSource(
        "SA-1B", "make it with: effsam3 index sa1b FOLDER --out {index}", "effsam3 index sa1b --val-fraction"
    ),
    "folder": ImageSource(
        "own photographs", "the photographs in {folder} will be indexed by `embed` or `train`", "data.held_out"
    ),
    "synthetic": ImageSource(
        "synthetic",
        "{synthetic_images} images will be drawn by `embed` or `train`",
        "their number, data.synthetic_images,",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """The photographs."""

    # folder: photographs of your own; synthetic: drawn shapes, never used unless asked for here; rows of SOURCES
    source: Literal["sa1b", "folder", "synthetic"]
    index: Annotated[str, parquet]  # made by `effsam3 index sa1b`; `folder` and `synthetic` make their own
    folder: str | None = None  # source folder only: the photographs, in subfolders too; indexed on first use
    held_out: Annotated[float, below_one] = 0.1  # source folder only: share held out, by the images' content
    resize: Literal["square", "longest_side"] = "square"  # square is SAM 3's own; longest_side pads to a square
    synthetic_images: NonNegativeInt = 0  # how many to draw, both splits together; source synthetic only
    synthetic_side_px: PositiveInt = 192  # longest side of a drawn image
    limit: PositiveInt | None = None  # use only the first N images of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 100  # stop after more unreadable images than this in one run

    def check(self) -> Iterator[str]:
        if self.source == "folder" and self.folder is None:
            yield "folder: source folder needs to know where the photographs are, such as data.folder=/photos"
        if self.source != "folder" and self.folder is not None:
            yield f"folder: {self.folder} is given, but source is {self.source}; set data.source=folder"
        if self.source == "folder" and self.held_out == 0:
            yield "held_out: 0 leaves nothing to validate on; set it above 0"
        yield from self.made_up("synthetic_images")


@dataclass(frozen=True, kw_only=True)
class ImageEmbed(Embed):
    """The teacher's features: where they are kept and which. `tap` and `grid` hold for an online teacher too."""

    to: str  # store folder; shared by all students of one teacher and data set
    tap: Literal["trunk", "neck"] = "trunk"  # trunk: the ViT's output, what a student replaces; neck: the FPN's
    grid: PositiveInt | None = None  # rows and columns kept; null: the teacher's own (72 for SAM 3)
    dtype: Literal["float16", "int8"] = "float16"  # int8: half the bytes, one scale per channel and record
    pixels: bool = False  # keep the resized uint8 image too: training then needs no photographs and no JPEG decoding
    batch_size: PositiveInt = 8  # images per rank per teacher forward


@dataclass(frozen=True, kw_only=True)
class ImageLoss(Section):
    """Weights of the terms of the loss; see effsam3/losses/features.py for the formulas."""

    mse: NonNegativeFloat = 1.0  # mean squared error per position
    cosine: NonNegativeFloat = 1.0  # 1 - cosine similarity per position
    neck: NonNegativeFloat = 0.0  # difference of both after the frozen FPN neck; costs the neck's forward
    channels: Literal["mean", "sum"] = "mean"  # mean: of standardised channels; sum: upstream's, which drowns cosine

    def check(self) -> Iterator[str]:
        if self.mse == self.cosine == self.neck == 0:
            yield "mse: all weights (mse, cosine, neck) are 0; nothing would be learned"


# Asked of held-out images: things that many photographs show, and some that few do.
COMMON_NOUNS = (
    "person", "face", "hand", "car", "wheel", "window", "door", "building", "tree", "plant", "flower", "sky", "grass",
    "water", "animal", "dog", "bird", "chair", "table", "bottle", "bag", "shoe", "sign", "light",
)  # fmt: skip
HEADS = "val/heads"  # what SAM 3's heads make of the student, next to the teacher


@dataclass(frozen=True, kw_only=True)
class Validate(Section):
    """What SAM 3's heads are asked on held-out images, where `train.monitor` is val/heads or a part of it."""

    phrases: Annotated[tuple[str, ...], at_least_one, each_once] = COMMON_NOUNS  # in turn, an image is asked for some
    phrases_per_image: PositiveInt = 2  # that many
    boxes_per_image: PositiveInt = 8  # of its largest annotated masks; of a grid, where there are none

    def check(self) -> Iterator[str]:
        if not all(phrase.strip() for phrase in self.phrases):
            yield "phrases: one of them is empty; leave it out"


Benchmark = Literal["fidelity", "masks", "speed", "concepts"]
Prompt = Literal["box", "point"]


@dataclass(frozen=True, kw_only=True)
class ImageEvaluate(ConceptEvaluate):
    """What the merged model is measured on."""

    # fidelity: features next to the teacher's; masks: mIoU of prompted masks; speed: of the trunks; concepts: cgF1
    benchmarks: Annotated[tuple[Benchmark, ...], at_least_one, each_once] = ("fidelity", "masks", "speed")
    max_images: PositiveInt = 200  # held-out images per benchmark
    masks_per_image: PositiveInt = 8  # annotated masks prompted per image, at most
    prompts: Annotated[tuple[Prompt, ...], at_least_one, each_once] = ("box", "point")  # taken from the annotations
    pictures: NonNegativeInt = 8  # images to draw

    def shown(self) -> tuple[tuple[str, ...], int]:
        return self.prompts, self.masks_per_image


class ImagesRecipe(FeatureRecipe):
    """A recipe of a timm trunk that learns from images: what the stages image and vision share."""

    card_keys = FeatureRecipe.card_keys | {"images, px": "image_size", "student sees, px": "student_image_size"}
    data_names = {source: row.label for source, row in SOURCES.items()}
    compiles = True

    image_size: int | None
    student_image_size: int | None
    data: ImageData
    embed: ImageEmbed
    evaluate: ImageEvaluate

    def check(self) -> Iterator[str]:
        yield from super().check()
        yield from self._student_fits()

    def _student_fits(self) -> Iterator[str]:
        """Yield why the student cannot be built, as far as that is known without weights."""
        try:
            sizes = self.sizes
        except UserError:  # not on this machine yet: its sizes are told when it is
            seen = self.student_image_size or self.image_size or SAM3.sizes.image_size
        else:
            yield from refused_side(self.image_size, sizes)
            seen = self.seen
            if seen > self.side:
                takes = f"the SAM 3 {self.sam3.checkpoint} sees" if self.image_size is None else "image_size names"
                yield (
                    f"student_image_size: {seen} px is more than the {self.side} px that {takes}, and nothing would "
                    f"be gained; set at most {self.side}, or null"
                )
        try:
            row = image_student(self.student, seen)
        except UserError as error:
            yield str(error)
            return
        yield from self.refused_maps(row)
        if not self.student.startswith(PREFIX):  # timm is not imported for the others
            return
        if self.student_init == "imagenet" and not pretrained_cfg(row.timm_name).has_weights:
            yield f"student_init: timm has no weights of {row.timm_name}; set student_init=random, or name a file"

    def refused_maps(self, row: ImageStudent) -> Iterator[str]:
        """Yield why the stage's head cannot read a student's maps."""
        yield from ()

    @property
    def sizes(self) -> Sizes:
        """The sizes of the recipe's SAM 3.

        Raises:
            UserError: they are not known.
        """
        return sam3_of(self.sam3.checkpoint).sizes

    @property
    def side(self) -> int:
        """Side in pixels of the images that the student's model takes.

        Raises:
            UserError: the sizes of the recipe's SAM 3 are not known.
        """
        return self.image_size or self.sizes.image_size

    @property
    def seen(self) -> int:
        """Side in pixels of what the student's trunk is given.

        Raises:
            UserError: the sizes of the recipe's SAM 3 are not known.
        """
        return self.student_image_size or self.side

    @property
    def channels(self) -> int:
        """Width of the features to learn.

        Raises:
            UserError: the sizes of the recipe's SAM 3 are not known.
        """
        return self.sizes.hidden_size if self.embed.tap == "trunk" else self.sizes.fpn_hidden_size

    def derived(self) -> dict[str, Callable[[], str]]:
        return {
            "images": self._images_line,
            "length": self._length_line,
            "student": self.student_line,
            "flops": self._flops_line,
            "store": self._store_line,
        }

    def _counts(self) -> dict[str, int]:
        """Return how many images of each split are used, from the report next to the index.

        Raises:
            UserError: there is no report.
        """
        data = self.data
        counts = index_counts(data.index, "images", SOURCES[data.source].made_by.format_map(vars(data)))
        return {split: min(count, data.limit or count) for split, count in counts.items()}

    def _images_line(self) -> str:
        counts = self._counts()
        return f"{counts['train']:,} to learn from, {counts['val']:,} held out"

    def _length_line(self) -> str:
        images = self._counts()["train"]
        steps, warmup = total_steps(self, images), warmup_steps(self, images)
        epochs = steps * self.train.global_batch_size / images
        return f"{steps:,} steps = {epochs:.1f} epochs, {warmup:,} steps of them warm-up"

    def counted(self, row: ImageStudent) -> tuple[dict[str, int], int]:
        """Return the parameters of the student's parts, and of what they replace."""
        raise NotImplementedError

    def student_line(self) -> str:
        facts, seen = self.sizes, self.seen
        parts, replaced = self.counted(image_student(self.student, seen))
        total = sum(parts.values())
        saved = 100 * (1 - total / replaced)
        verdict = f"{abs(saved):.2f} % {'fewer' if saved > 0 else 'more'} than the {replaced:,} they replace"
        added = " + ".join(f"{count:,} {part}" for part, count in parts.items())
        counts = f"{added} = {total:,} parameters, {verdict}"
        return counts if seen == facts.image_size else f"{counts}; sees {seen} px instead of {facts.image_size}"

    def replaced_gflop(self, row: ImageStudent, seen: int, sam3: Sam3Row) -> dict[str, float]:
        """Return the GFLOP of the student's parts by their names in `models.flops`; it sees `seen` pixels a side.

        Raises:
            UserError: its trunk has not been counted at this size.
        """
        raise NotImplementedError

    def _flops_line(self) -> str:
        sam3 = sam3_of(self.sam3.checkpoint)
        return flops_line(sam3, self.replaced_gflop(image_student(self.student, self.seen), self.seen, sam3))

    def _store_line(self) -> str:
        if self.teacher == "online":
            return "none: the teacher runs next to the student"
        facts = self.sizes
        grid = self.embed.grid or facts.grid
        size = stride(record_fields(self.embed, self.channels, grid, facts.image_size))
        text = f"{size:,} bytes per image ({self.channels} x {grid} x {grid} {self.embed.dtype}"
        text += " and pixels)" if self.embed.pixels else ")"
        try:
            total = size * sum(self._counts().values())
        except UserError:
            return text
        return f"{text}, {total / 1e9:,.2f} GB in all"


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(ImagesRecipe):
    """Stage 1, image: a student learns the output of SAM 3's ViT trunk, then takes its place."""

    starter = "stage1/image/es_rv_m"
    replaces = "vision trunk"
    knobs = (
        "train.micro_batch_size", "hardware", "train.ema", "image_size", "student_image_size", "teacher", "loss.neck"
    )  # fmt: skip

    metrics = FeatureRecipe.metrics | {
        HEADS: "higher",
        **{f"{HEADS}_{part}": "higher" for part in ("masks", "presence", "queries")},
    }

    stage: Literal["image"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    # A row of effsam3/models/registry.py (see `effsam3 compare`), or timm/NAME, any backbone with feature maps
    student: Annotated[str, image_student_name]
    # px of the images that its model takes: SAM 3's heads work on the grid that follows; null: SAM 3's own 1008
    image_size: Annotated[int, student_side] | None = None
    student_image_size: Annotated[int, student_side] | None = None  # px that it sees of these; null: all
    student_init: Annotated[str, initialisation] = "imagenet"  # imagenet, random, weights file or model folder
    # fused: strides 8, 16, 32; stride32: upstream's; linear: 1x1 on the coarsest map, a demonstration's
    head: Literal["fused", "stride32", "linear"] = "fused"
    teacher: Literal["stored", "online"] = "stored"  # stored: reads embed.to; online: runs the teacher next to it
    sam3: Sam3 = Sam3()
    data: ImageData
    embed: ImageEmbed
    loss: ImageLoss = ImageLoss()
    optim: Optim
    train: Train
    validate: Validate = Validate()
    evaluate: ImageEvaluate = ImageEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.loss.neck > 0 and self.embed.tap == "neck":
            yield f"loss.neck: {self.loss.neck} needs the trunk's output, but embed.tap is neck; set one of them back"
        if self.asks_heads and self.embed.tap == "neck":
            yield (
                f"train.monitor: {self.train.monitor} needs the trunk's output, but embed.tap is neck; set embed.tap="
                f"trunk, or train.monitor={self.metric}"
            )

    def refused_maps(self, row: ImageStudent) -> Iterator[str]:
        if self.head == "stride32" and row.strides[-1] != 32:
            coarsest = f"the coarsest of {self.student} has {row.strides[-1]}"
            yield f"head: stride32 reads a map of stride 32, {coarsest}; set head=fused"

    @property
    def asks_heads(self) -> bool:
        """Whether validation looks through SAM 3's heads."""
        return (self.train.monitor or "").startswith(HEADS)

    def counted(self, row: ImageStudent) -> tuple[dict[str, int], int]:
        head = head_params(self.head, row.channels, self.channels)
        return {"trunk": row.trunk_params, f"{self.head} head": head}, self.sizes.trunk_params

    def replaced_gflop(self, row: ImageStudent, seen: int, sam3: Sam3Row) -> dict[str, float]:
        return {"trunk": image_gflop(row, self.head, seen, sam3)}


def record_fields(embed: ImageEmbed, channels: int, grid: int, side: int) -> list[Field]:
    """Return the fields of an image's record: features, for int8 their scales, on request the pixels they are of.

    Args:
        channels: of the features.
        grid: their rows and columns.
        side: of the resized image, in pixels.
    """
    fields = [Field("features", embed.dtype, (channels, grid, grid))]
    if embed.dtype == "int8":
        fields.append(Field("scale", "float32", (channels,)))
    if embed.pixels:
        fields += [Field("pixels", "uint8", (3, side, side)), Field("sizes", "int32", (2,))]
    return fields


RECIPE = ImageRecipe
