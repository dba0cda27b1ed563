# SPDX-License-Identifier: Apache-2.0
"""Sections of every stage: where SAM 3 is found, how the student is trained, what is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from effsam3.errors import did_you_mean
from effsam3.models.registry import SAM3
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    Decay,
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    at_least_one,
    each_once,
    exactly_one,
)

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")
Format = Literal["transformers", "sam3", "efficientsam3"]


@dataclass(frozen=True, kw_only=True)
class Chassis(Section):
    """The SAM 3 whose parts the merged model keeps where there is no student."""

    # Hub id, transformers folder, run folder, sam3.pt, or made up: `tiny`, `tiny_concepts`, `random` (full size)
    checkpoint: str = str(SAM3.hub_id)
    revision: str | None = None  # Hub commit, branch or tag; null: the newest


@dataclass(frozen=True, kw_only=True)
class Sam3(Chassis):
    """The SAM 3 that teaches, and whose other parts the merged model keeps."""

    fingerprint: str | None = None  # of the trunk's weights, as a store's manifest has it; null: accept any


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
    micro_batch_size: PositiveInt  # samples per rank per forward; changes what BatchNorm students learn
    find_micro_batch: bool = False  # on GPUs: start with the largest micro_batch_size that fits, found by trying
    # of the forward; weights and optimizer stay fp32. fp16 scales the loss and skips steps whose gradient overflows
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    compile: bool = False  # torch.compile student and teacher (image, vision; `embed` too): a slow start, then faster
    seed: NonNegativeInt = 0  # seed of initialisation and sample order
    ema: Decay = 0.0  # decay per step of the averaged weights; 0: no averaging
    log_every: PositiveInt = 20  # steps between lines of numbers
    eval_every: PositiveInt  # steps between validations
    save_every: PositiveInt  # steps between checkpoints
    keep_checkpoints: PositiveInt = 3  # newest ones; the best ones are kept as well
    keep_best: PositiveInt = 1  # best ones by `monitor`, weights only
    monitor: str | None = None  # validation number that decides what is best, such as val/mse; null: the stage's own
    not_finite: Literal["stop", "skip"] = "stop"  # if a loss is NaN: stop and name the samples, or skip them
    sync_batchnorm: bool = False  # GPUs only: BatchNorm sees the micro-batches of all ranks as one
    eval_samples: PositiveInt = 512  # held-out images per validation
    pictures: NonNegativeInt = 0  # held-out samples to draw at each validation, the truth next to the prediction
    pictures_as: Literal["sheet", "mp4"] = "sheet"  # of clips: a PNG of some frames, or a film
    patience: NonNegativeInt = 0  # stop after N validations without improvement of `monitor`; 0: never
    per_rank: bool = False  # also report what each rank waits for and uses: metrics `rank<n>/...`
    loggers: Annotated[tuple[Literal["wandb", "tensorboard"], ...], each_once] = ()  # in addition to metrics.jsonl
    wandb_project: str = "effsam3"  # used when loggers has wandb
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
    """Which weights become the released model, and in which formats it is written."""

    checkpoint: FileName = "best"  # `best`, `last`, or a folder of checkpoints/ such as step-000100
    # The transformers folder is written in any case; sam3: merged/sam3.pt; efficientsam3: merged/efficientsam3.pt.
    formats: Annotated[tuple[Format, ...], at_least_one, each_once] = ("transformers",)
    # Write efficientsam3.pt of a text student whose padding is masked, too: there its short texts get other features.
    allow_padding_mismatch: bool = False


class Saving(NamedTuple):
    """Another value of a key that decides the device memory."""

    value: int | bool
    proportional: bool = False  # a micro-batch's memory is nearly proportional to the key; else it must be measured


class Embed(Section):
    """The teacher's features, for `teacher: stored`."""

    to: str  # store folder
    batch_size: int  # samples per rank per teacher forward


class Data(Section):
    """Where samples come from: what every stage's section `data` has."""

    source: str  # a kind of data; synthetic: made up
    workers: int
    limit: int | None

    def made_up(self, key: str) -> Iterator[str]:
        """Yield what is wrong with the number of synthetic samples."""
        count = getattr(self, key)
        if self.source == "synthetic" and count == 0:
            yield f"{key}: source synthetic needs to know how many to make; set it above 0"
        if self.source != "synthetic" and count > 0:
            yield f"{key}: {count} asked for, but source is {self.source}; set data.source=synthetic or leave it 0"


class Recipe(Section):
    """A recipe, and what its stage can answer without torch. RECIPE of every stage's facts.py is a subclass."""

    verbs: ClassVar[tuple[str, ...]]  # that `effsam3 launch` knows for this stage, in order
    why_no_more: ClassVar[str] = ""  # why the stage lacks a verb, and what to do instead
    runs_key: ClassVar[str]  # names the folder of run folders
    starter: ClassVar[str]  # the shipped recipe that `effsam3 new --stage` begins with
    replaces: ClassVar[str] = ""  # part of SAM 3 whose place the student takes; the slot has the stage's name
    metric: ClassVar[str | None] = None  # the validation number that chooses the best checkpoint if none is named
    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {}  # all that may choose it: which values are better
    draws: ClassVar[bool] = False  # whether the stage can draw held-out samples while it trains (`train.pictures`)
    knobs: ClassVar[tuple[str, ...]] = ()  # keys that decide the device memory, the cheapest to change first
    samples_are_separate: ClassVar[bool] = False  # a micro-batch takes the memory of one sample, times their number

    stage: str
    name: str
    hardware: str
    sam3: Chassis
    merge: Merge
    push: Push

    @property
    def folder(self) -> Path:
        """The run folder."""
        raise NotImplementedError

    @property
    def launched(self) -> tuple[str, ...]:
        """The verbs that `effsam3 launch` runs when none is named, in order."""
        return self.verbs

    @classmethod
    def student_of(cls, values: Mapping[str, Any]) -> str | None:
        """Return the student that a recipe's plain YAML names, whichever version wrote it."""
        return values.get("student")

    def sources(self) -> dict[str, Path]:
        """Return what `merge` puts together: {slot: folder of a run or of a model}."""
        raise NotImplementedError

    def adapted(self) -> tuple[Path, ...]:
        """Return the folders of tensors that `merge` changes in place."""
        return ()

    def learned(self) -> dict[str, StageRecipe]:
        """Return {who owns what was learned: recipe by which it learned}, as far as they are known.

        A student's owner is its slot; changed tensors are called by their run.
        """
        raise NotImplementedError

    def changed(self: AnyRecipe, key: str, value: object) -> AnyRecipe:
        """Return the recipe with another value of a section's key, such as `train.seed`; it is not checked."""
        section, name = key.split(".")
        return replace(self, **{section: replace(getattr(self, section), **{name: value})})

    def savings(self) -> dict[str, Saving]:
        """Return values of the stage's own knobs by which a micro-batch takes less memory than now."""
        return {}

    def derived(self) -> dict[str, Callable[[], str]]:
        """Return the lines that `show` adds: {title: what makes the line, or raises UserError if it is not known yet}.

        A line is at hand at once: it takes neither torch nor a look at the data themselves.
        """
        return {}


class StageRecipe(Recipe):
    """A recipe of something that learns."""

    verbs: ClassVar[tuple[str, ...]] = ("train", "merge", "evaluate")
    runs_key = "train.runs"
    metric: ClassVar[str]
    compiles: ClassVar[bool] = False  # whether torch.compile takes the stage's students whole
    packages: ClassVar[dict[str, str]] = {}  # that `train` needs: package -> extra of setup.py
    encoder_layers: ClassVar[int | None] = None  # that the detector's fusion encoder keeps; None: all
    # The model card: how the student learned, title -> key; what it calls a data.source that has another name there
    card_keys: ClassVar[dict[str, str]] = {
        "teacher": "sam3.checkpoint",
        "initial weights": "student_init",
        "data": "data.source",
        "epochs": "train.epochs",
        "steps": "train.steps",
        "batch": "train.global_batch_size",
        "learning rate": "optim.lr",
        "precision": "train.precision",
    }
    data_names: ClassVar[dict[str, str]] = {}

    student: str
    student_init: str
    data: Data
    loss: Section
    optim: Optim
    train: Train
    evaluate: Section

    @property
    def folder(self) -> Path:
        return Path(self.train.runs) / self.name

    def sources(self) -> dict[str, Path]:
        return {self.stage: self.folder}

    def learned(self) -> dict[str, StageRecipe]:
        return {self.stage: self}

    def check(self) -> Iterator[str]:
        for name in ("epochs", "steps"):
            warmup, length = getattr(self.optim, f"warmup_{name}"), getattr(self.train, name)
            if warmup is not None and length is not None and warmup >= length:
                yield f"optim.warmup_{name}: {warmup:g} is not below train.{name} ({length:g})"
        if self.train.compile and not self.compiles:
            yield f"train.compile: torch.compile does not take students of stage {self.stage} whole; set it to false"
        if self.train.pictures and not self.draws:
            yield f"train.pictures: stage {self.stage} draws none while it trains; set it to 0, `evaluate` draws some"
        if (asked := self.train.monitor) is not None and asked not in self.metrics:
            yield f"train.monitor: stage {self.stage} is not judged by {asked}{did_you_mean(asked, self.metrics)}"

    @property
    def teacher_of_concepts(self) -> Chassis | None:
        """The SAM 3 next to whose answers the benchmark concepts has the student's; None: what it is merged into."""
        return None

    def student_line(self) -> str:
        """Say how big the student is, for `show`."""
        raise NotImplementedError

    def limits(self) -> list[str]:
        """Return sentences of the model card: what the student cannot do, by how it learned."""
        if self.data.source != "synthetic":
            return []
        return [f"The student in the slot `{self.stage}` only learned from made-up data."]


class AdaptingRecipe(StageRecipe):
    """A recipe of something that changes tensors of its SAM 3 in place, and fills no slot."""

    card_keys = {title: key for title, key in StageRecipe.card_keys.items() if key != "student_init"}

    def sources(self) -> dict[str, Path]:
        return {}

    def adapted(self) -> tuple[Path, ...]:
        return (self.folder,)

    def learned(self) -> dict[str, StageRecipe]:
        return {self.folder.name: self}

    def limits(self) -> list[str]:
        made_up = self.data.source == "synthetic"
        return [f"What `{self.name}` changed only learned from made-up data."] if made_up else []


class FeatureRecipe(StageRecipe):
    """A recipe of a student that learns a teacher's features: stored by `embed`, or computed while it trains."""

    verbs = ("embed", "train", "merge", "evaluate")
    metric = "val/cosine"
    metrics = {"val/cosine": "higher", "val/cosine_centred": "higher", "val/mse": "lower"}

    teacher: str  # stored or online
    sam3: Sam3
    embed: Embed

    @property
    def launched(self) -> tuple[str, ...]:
        return self.verbs if self.teacher == "stored" else self.verbs[1:]
