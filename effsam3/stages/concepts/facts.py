# SPDX-License-Identifier: Apache-2.0
"""Recipes of the stage concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from effsam3.recipe.common import AdaptingRecipe, Chassis, Data, Merge, Optim, Saving, Train
from effsam3.recipe.concepts import ConceptEvaluate
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    at_least_one,
    below_one,
    each_once,
    share,
)
from effsam3.stages.adapt.facts import AdapterModel

TRAIN, HELD_OUT = "train.json", "held_out.json"  # what the source synthetic draws into `data.path`
DetectorPart = Literal["trunk", "text", "detr", "detector_mask_decoder"]
SOURCES = ("annotations", "teacher", "features")  # of truth, in `loss`


@dataclass(frozen=True, kw_only=True)
class ConceptTeacher(Chassis):
    """The SAM 3 whose answers are learned, and whose row stands next to the student's in the benchmark."""

    fingerprint: str | None = None  # of its trunk's weights, as `inspect` and a store's manifest have it; null: any
    # Its trunk's features of the same images, made by a stage 1 recipe (`embed.to` there), so that only its heads run;
    # data.source images only; null: its trunk runs next to the student
    store: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConceptData(Data):
    """Images, the phrases that are asked of them, and which images are held out."""

    # images: those of an index, without annotations; synthetic: drawn shapes, never used unless asked for here
    source: Literal["concepts", "images", "synthetic"]
    # concepts: JSON of SA-Co, COCO, LVIS or RefCOCO, or a folder of them; images: an index, as `effsam3 index` makes
    # it; `synthetic` draws its own in this folder
    path: str
    listed: str | None = None  # images only: a text file of the phrases to ask of them, one a line
    images: Annotated[tuple[str, ...], each_once] = ()  # folders of their images; []: where the JSON is
    val_path: str | None = None  # other pairs to hold out, as `path`; null: `held_out` of these
    held_out: Annotated[float, below_one] = 0.05  # share of the images held out, by a hash of their names
    phrases: PositiveInt = 4  # asked of an image at once; they share its features
    negatives: Annotated[float, share] = 0.5  # share of the phrases that are not there
    hard: Annotated[float, share] = 0.5  # share of these that are like one that is there; the others are any image's
    objects: PositiveInt = 40  # instances of a phrase, at most; phrases with more are left out
    synthetic_images: NonNegativeInt = 0  # how many to draw to learn from; source synthetic only
    synthetic_held_out: NonNegativeInt = 60  # ... and held out
    synthetic_side_px: PositiveInt = 160  # side of a drawn image
    limit: PositiveInt | None = None  # use only the first N images of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 100  # stop after more unreadable images than this in one run

    def check(self) -> Iterator[str]:
        yield from self.made_up("synthetic_images")
        if self.source != "concepts" and (self.images or self.val_path):
            own = "draws its own" if self.source == "synthetic" else "has an index with both"
            yield f"source: {self.source} {own} images and held-out ones; leave images and val_path out"
        if self.source == "images" and self.listed is None:
            yield "listed: images have no phrases of their own; name a text file of phrases, one a line"
        if self.source != "images" and self.listed is not None:
            yield f"listed: {self.source} have phrases of their own; leave it out, or set source=images"
        if self.source == "concepts" and self.val_path is None and self.held_out == 0:
            yield "held_out: 0 leaves nothing to validate on; set it above 0, or name other pairs with data.val_path"

    resize: ClassVar[str] = "square"  # how images become square, as a store must have been made with

    @property
    def learned(self) -> str:
        """The file or folder of the pairs to learn from."""
        return str(Path(self.path) / TRAIN) if self.source == "synthetic" else self.path

    @property
    def validated(self) -> str | None:
        """The same of those that are held out; None where they are a share of the former, or not annotated."""
        return str(Path(self.path) / HELD_OUT) if self.source == "synthetic" else self.val_path


@dataclass(frozen=True, kw_only=True)
class ConceptModel(Section):
    """What of the detector learns."""

    # Names of its submodules and parameters, such as vision_encoder.backbone, vision_encoder.neck, text_encoder or
    # detr_decoder: where nothing is called so from the detector on, all that ends in it; `all`: all of it; []: the
    # adapters alone
    trainable: Annotated[tuple[str, ...], each_once] = ("vision_encoder.backbone", "vision_encoder.neck")
    # Layers of the fusion encoder (`detr_encoder`), which is most of what a phrase costs: evenly spaced ones of those
    # of sam3.checkpoint, such as every second one of its six with 3; they must learn. null: all of them
    encoder_layers: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorAdapters(AdapterModel):
    """Adapters of parts that are not trained whole: an update of low rank, alpha / rank x B A, next to each layer."""

    # trunk: read by the tracker, too; detr: DETR and the geometry encoder; []: no adapters
    parts: Annotated[tuple[DetectorPart, ...], each_once] = ()


@dataclass(frozen=True, kw_only=True)
class AnnotatedTerms(Section):
    """Weights of the terms of `annotations`; effsam3/losses/detection.py has the formulas."""

    box: NonNegativeFloat = 5.0  # L1 of the boxes, of every layer of the decoder
    giou: NonNegativeFloat = 2.0  # 1 - GIoU of the boxes, likewise
    score: NonNegativeFloat = 1.0  # of the queries, likewise: whether each has an instance, where there are some
    presence: NonNegativeFloat = 4.0  # whether the phrase is there at all
    focal: NonNegativeFloat = 20.0  # focal loss of the masks
    dice: NonNegativeFloat = 3.0  # dice loss of the masks
    semantic: NonNegativeFloat = 1.0  # of the mask of all instances together


@dataclass(frozen=True, kw_only=True)
class TaughtTerms(Section):
    """Weights of the terms of `teacher`; effsam3/losses/answers.py has the formulas."""

    presence: NonNegativeFloat = 2.0  # the teacher's probability of the phrase being there
    score: NonNegativeFloat = 1.0  # ... of each query having an instance
    box: NonNegativeFloat = 5.0  # L1 of the boxes of queries that found something
    giou: NonNegativeFloat = 2.0  # 1 - GIoU of these
    bce: NonNegativeFloat = 5.0  # binary cross entropy of their masks
    dice: NonNegativeFloat = 2.0  # dice loss of their masks
    semantic: NonNegativeFloat = 1.0  # of the mask of all instances together


@dataclass(frozen=True, kw_only=True)
class ConceptLoss(Section):
    """Weights of the sources of truth, and of each one's terms. All are logged."""

    annotations: NonNegativeFloat = 0.0  # what annotators have marked
    teacher: NonNegativeFloat = 1.0  # what the teacher answers to the same phrases; needs no annotations
    features: NonNegativeFloat = 0.0  # the teacher's trunk features: keeps the trunk usable for the tracker
    annotated: AnnotatedTerms = AnnotatedTerms()
    taught: TaughtTerms = TaughtTerms()

    def check(self) -> Iterator[str]:
        if not any(getattr(self, name) for name in SOURCES):
            yield f"annotations: {', '.join(SOURCES)} are all 0; nothing would be learned"


@dataclass(frozen=True, kw_only=True)
class ConceptOptim(Optim):
    """AdamW; trunk, neck and text encoder may move more slowly than the heads."""

    vision_scale: PositiveFloat = 1.0  # learning rate of `vision_encoder`, as a multiple of `lr`
    text_scale: PositiveFloat = 1.0  # ... of `text_encoder` and `text_projection`


@dataclass(frozen=True, kw_only=True)
class ConceptTrain(Train):
    """The loop; samples are images, each with `data.phrases` phrases."""

    recompute: bool = False  # recompute activations in backward: less device memory, about a third slower


@dataclass(frozen=True, kw_only=True)
class ConceptsEvaluate(ConceptEvaluate):
    """What the merged model is measured on: the benchmark concepts, next to the teacher, or to what it started from.

    Where `concepts` is null, on the pairs that the data hold out by name (`data.val_path`, or the drawn ones). Images
    without annotations take pairs of others.
    """

    benchmarks: Annotated[tuple[Literal["concepts"], ...], at_least_one, each_once] = ("concepts",)  # the one there is

    def check(self) -> Iterator[str]:
        yield from ()

    def on(self, data: Data) -> ConceptsEvaluate:
        assert isinstance(data, ConceptData)
        return self if self.concepts else replace(self, concepts=data.validated, concept_images=data.images)


@dataclass(frozen=True, kw_only=True)
class ConceptsRecipe(AdaptingRecipe):
    """Concepts: parts of a detector learn through its heads, from annotated phrases, a teacher's answers, or both."""

    starter = "concepts/concepts_es_rv_m"
    why_no_more = "the teacher answers next to the student, because phrases differ in every step; continue with train"
    replaces = "detector's weights, in place"
    metric = "val/cgF1"
    metrics = {
        "val/cgF1": "higher",
        "val/IL_MCC": "higher",
        "val/pmF1": "higher",
        "val/presence": "higher",
        "val/loss": "lower",
        **{f"val/loss_{name}": "lower" for name in SOURCES},
    }
    card_keys = AdaptingRecipe.card_keys | {
        "teacher": "teacher.checkpoint",
        "trained modules": "model.trainable",
        "layers of the fusion encoder": "model.encoder_layers",
        "adapters of": "adapters.parts",
        "phrases of an image": "data.phrases",
    }
    data_names = {"concepts": "annotated concepts", "images": "images and listed phrases"}
    knobs = ("train.micro_batch_size", "train.recompute", "data.phrases", "hardware", "train.ema")

    stage: Literal["concepts"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    sam3: Chassis = Chassis()  # whose detector learns: the merged model of a student, a release, or SAM 3 itself
    teacher: ConceptTeacher = ConceptTeacher()
    data: ConceptData
    model: ConceptModel = ConceptModel()
    adapters: DetectorAdapters = DetectorAdapters()
    loss: ConceptLoss = ConceptLoss()
    optim: ConceptOptim
    train: ConceptTrain
    evaluate: ConceptsEvaluate = ConceptsEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    @property
    def student(self) -> str:  # type: ignore[override]  # a key of other stages, here it follows from others
        """What status calls it."""
        return f"detector ({self._learns})"

    @property
    def _learns(self) -> str:
        asked = self.adapters
        low_rank = (f"LoRA r {asked.rank} of {', '.join(asked.parts)}",) if asked.parts else ()
        return ", ".join((*self.model.trainable, *low_rank))

    @property
    def packages(self) -> dict[str, str]:  # type: ignore[override]  # a fact of other stages' classes
        """What `train` needs for the adapters."""
        return {"peft": "lora"} if self.adapters.parts else {}

    @property
    def encoder_layers(self) -> int | None:  # type: ignore[override]  # likewise
        """How many layers of the fusion encoder stay; None: all."""
        return self.model.encoder_layers

    @property
    def student_init(self) -> str:  # type: ignore[override]  # likewise
        """What it starts from."""
        return "the chassis' detector"

    @property
    def teacher_of_concepts(self) -> Chassis | None:
        return self.teacher if self.is_taught else None

    @property
    def is_taught(self) -> bool:
        """Whether the teacher is needed."""
        return self.loss.teacher > 0 or self.loss.features > 0

    @classmethod
    def student_of(cls, values: Mapping[str, Any]) -> str:
        return f"detector ({', '.join(values.get('model', {}).get('trainable', ()))})"

    def check(self) -> Iterator[str]:
        yield from super().check()
        if not self.model.trainable and not self.adapters.parts:
            yield "model.trainable: nothing would learn; name modules, or parts with adapters.parts"
        if self.encoder_layers is not None and (other := set(self.merge.formats) - {"transformers"}):
            yield (
                f"merge.formats: {min(other)} has all layers of SAM 3's fusion encoder, model.encoder_layers keeps "
                f"{self.encoder_layers}; write the transformers folder alone (merge.formats=[transformers])"
            )
        unannotated = self.data.source == "images"
        if unannotated and self.loss.annotations:
            yield f"loss.annotations: {self.loss.annotations:g}, but images have none; set it to 0"
        if unannotated and not self.loss.teacher:
            yield "loss.teacher: only its answers tell what is on images without annotations; set it above 0"
        if self.teacher.store is not None and not unannotated:
            yield "teacher.store: stage 1 stores features of an index; set data.source=images, or teacher.store=null"

    def derived(self) -> dict[str, Callable[[], str]]:
        return {"phrases": self._phrases_line, "length": self._length_line, "learns": self.student_line}

    def _phrases_line(self) -> str:
        data = self.data
        where = f"{data.synthetic_images} drawn images in {data.path}" if data.source == "synthetic" else data.path
        if data.source == "images":
            return f"{data.phrases} of an image, of those in {data.listed}; {where}"
        absent = f"{data.negatives:.0%} of them absent ({data.hard:.0%} of these hard)"
        return f"{data.phrases} of an image, {absent}; {where}"

    def _length_line(self) -> str:
        train = self.train
        pairs = train.global_batch_size * self.data.phrases
        return f"{train.steps:,} steps of {train.global_batch_size} images, {pairs} pairs" if train.steps else ""

    def student_line(self) -> str:
        sources = [f"{name} x {weight:g}" for name in SOURCES if (weight := getattr(self.loss, name))]
        return f"{self._learns}; from {', '.join(sources)}"

    def savings(self) -> dict[str, Saving]:
        found = {} if self.train.recompute else {"train.recompute": Saving(True)}
        if self.data.phrases > 1:
            found["data.phrases"] = Saving(self.data.phrases // 2)
        return found


RECIPE = ConceptsRecipe
