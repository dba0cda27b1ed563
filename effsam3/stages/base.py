# SPDX-License-Identifier: Apache-2.0
"""What the stages have in common: standardised features, how they are summed up, and the order of samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from effsam3 import stages
from effsam3.checked_files import mismatch, read_json
from effsam3.data.loader import Samples, loader
from effsam3.data.sampler import StepSampler
from effsam3.data.statistics import FeatureStatistics
from effsam3.data.store.format import RESTORE, StoreError, untied
from effsam3.data.store.reader import StoreReader
from effsam3.errors import UserError
from effsam3.hardware.accelerator import on_main
from effsam3.losses.features import agreement_sums, feature_loss
from effsam3.models.image.student import StudentTrunk
from effsam3.models.image.teacher import parameter_count
from effsam3.models.merging.slots import start_from
from effsam3.models.text.student import StudentText
from effsam3.models.vision.slot import start_vision_from
from effsam3.models.vision.training import VisionStudent
from effsam3.recipe.common import Data, FeatureRecipe, Sam3, StageRecipe
from effsam3.recipe.rules import names_a_model
from effsam3.stages.protocol import Batch, Place, TitledPicture
from effsam3.training.report import Report, table

TEACHER_FORM = {"fingerprint?": str}  # what a run must record of its teacher, to be merged
Student = StudentTrunk | StudentText | VisionStudent
STATISTICS_FORM = {"mean": [float], "deviation": [float]}


class StageBase:
    """What every stage shares: where it computes, the order of its samples. The rest is in `stages.protocol.Stage`."""

    files = "images"
    max_unreadable = 0
    lr_scales: Mapping[str, float] = {}
    train_data: Samples
    val_data: Samples

    def __init__(self, recipe: StageRecipe, place: Place):
        self.recipe, self.place, self.device = recipe, place, place.device

    @property
    def train_size(self) -> int:
        return len(self.train_data)

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        return self.divide(start, steps, micro_batch)

    def divide(
        self, start: int, steps: int, micro_batch: int, arrange: Callable | None = None, numbered: bool = False
    ) -> Iterable[Batch]:
        """Divide every step's samples among the ranks; `arrange` and `numbered` as `StepSampler` has them."""
        train, place = self.recipe.train, self.place
        sampler = StepSampler(
            self.train_size,
            train.seed,
            train.global_batch_size,
            micro_batch,
            place.process_index,
            place.num_processes,
            arrange,
            numbered,
        )
        pin = self.device.type == "cuda"
        return loader(self.train_data, sampler.micro_batches(start, steps), self.recipe.data.workers, pin)

    def pictures(self, student: nn.Module, batch: Batch) -> list[list[TitledPicture]]:
        """Draw nothing; a stage whose recipe `draws` has its own."""
        return []

    def saved(self, run: Path) -> None:
        """Nothing goes next to the checkpoints."""

    def compile(self, student: nn.Module) -> None:
        """Let torch.compile the student where it is: its tensors keep their names."""
        # The whole forward or an error: parts that torch leaves out would be slow without a word.
        student.compile(fullgraph=True)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn the sums of `validate` into means."""
        positions = max(float(sums.pop("positions")), 1.0)
        return {f"val/{name}": float(value) / positions for name, value in sums.items()}


def keep_whole(student: nn.Module, accelerator: Accelerator) -> None:
    """Under ZeRO-3, keep the student's weights whole on every rank: gathered together, never module by module.

    Each rank runs the modules that its own prompts and objects need, in an order of its own, so that gathering one by
    one would make ranks wait for each other for ever. Gradients and optimizer states stay divided, and are three
    quarters of it.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        from deepspeed.runtime.zero import register_external_parameter

        # Weights below this size stay where they have been gathered.
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = sys.maxsize
        for parameter in student.parameters():
            register_external_parameter(student, parameter)  # so that the first forward gathers all of them


class FeatureStage(StageBase):
    """A student that learns a frozen teacher's features."""

    unit: str  # what samples are called
    recipe: FeatureRecipe
    student: Student

    def __init__(
        self, recipe: FeatureRecipe, place: Place, facts: dict[str, Any], student: Student, teacher: nn.Module | None
    ):
        """`facts` describe the features, `channels` among them; `teacher` is None where a store has them."""
        super().__init__(recipe, place)
        self.facts, self.student, self.teacher = facts, student, teacher
        self.student_parameters = parameter_count(student)
        self.feature_loss = feature_loss
        self.mean_C = torch.zeros(self.channels, device=self.device)
        self.deviation_C = torch.ones(self.channels, device=self.device)
        self.notes: dict[str, str] = {}  # lines for the header

    def begin(self, store: StoreReader | None, report: Report, accelerator: Accelerator) -> None:
        """Take the statistics of the teacher's features, and the weights that the student starts from. Collective."""
        known = self.online_statistics(report, accelerator) if store is None else store.manifest.statistics
        self.set_statistics(known)
        self.notes = self.initialise_from_model() | untied_note(store)

    def compile(self, student: nn.Module) -> None:
        super().compile(student)
        self.feature_loss = torch.compile(feature_loss, fullgraph=True)

    @property
    def channels(self) -> int:
        """Channels that have statistics: those of the features."""
        return self.facts["channels"]

    def target(self, batch: Batch) -> Tensor:
        """Return the teacher's features as a map (B, C, H, W), float32."""
        raise NotImplementedError

    def predict(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the student's, of the same shape."""
        raise NotImplementedError

    def valid(self, batch: Batch) -> Tensor:
        """Return which positions count: (B, 1, H, W), 1 or 0."""
        raise NotImplementedError

    def statistics_batches(self) -> Iterable[Batch]:
        """Yield the sample of the training data that statistics are made of."""
        raise NotImplementedError

    @property
    def frozen(self) -> list[nn.Module]:
        return [] if self.teacher is None else [self.teacher]

    def set_statistics(self, statistics: dict[str, list[float]] | None) -> None:
        """Keep the teacher's per-channel mean and deviation on the device; the student outputs features of that size.

        Raises:
            UserError: they are not those of a teacher with that number of channels.
        """
        wrong = mismatch(statistics, STATISTICS_FORM)
        if wrong or statistics is None or {len(statistics[name]) for name in STATISTICS_FORM} != {self.channels}:
            raise UserError(
                f"the statistics of the teacher's features are damaged: {wrong or 'not one of each channel'}; embed "
                "again, or restore the store's manifest.json"
            )
        self.mean_C, self.deviation_C = (
            torch.tensor(statistics[name], dtype=torch.float32, device=self.device) for name in ("mean", "deviation")
        )
        self.student.set_feature_statistics(self.mean_C, self.deviation_C)

    def initialise_from_model(self) -> dict[str, str]:
        """Start from the model that `student_init` names, if it names one; return a line for the header.

        Its last layer is rescaled to this teacher's statistics, which must be set.
        """
        model = self.recipe.student_init
        if not start_from_model(self.student, self.recipe):
            return {}
        return {"weights": f"those of {model}, its last layer rescaled to this teacher's statistics"}

    def online_statistics(self, report: Report, accelerator: Accelerator) -> dict:
        """The teacher's statistics when there is no store: made once per run by rank 0, kept in the run folder."""
        path = report.folder / "feature_statistics.json"
        made_from = {"features": self.facts, "data": asdict(self.recipe.data)}
        made_from["data"].pop("workers")
        form = {"made_from": dict} | STATISTICS_FORM
        kept = read_json(path, form, "delete it, and it is made again") if path.is_file() else {}

        def make() -> None:
            if kept.get("made_from") == json.loads(json.dumps(made_from)):
                return
            report.write_json(path.name, self.measured_statistics() | {"made_from": made_from})

        on_main(accelerator, make)
        return read_json(path, form, "delete it, and it is made again")

    def measured_statistics(self) -> dict[str, list[float]]:
        """Return mean and deviation per channel over the sample of the training data."""
        statistics = FeatureStatistics(self.channels)
        for batch in self.statistics_batches():
            statistics.update(self.target(batch), self.valid(batch))
        return statistics.result()

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.compare(batch, self.predict(student, batch), self.target(batch))

    def compare(self, batch: Batch, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the sums of `validate` for features of a held-out batch, the student's and the teacher's."""
        return agreement_sums(pred, target, self.valid(batch), self.mean_C, self.deviation_C)

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        titles = {"val/cosine": "cosine", "val/cosine_centred": "centred cosine", "val/mse": "mse"}
        judged = [name for name in best if name.startswith("val/heads") and name in start]
        titles |= {name: name.removeprefix("val/").replace("_", ", ") for name in judged}
        of_mean = {
            "val/cosine": f"{best['val/cosine_of_mean']:.4f}",
            "val/cosine_centred": "0.0000",
            "val/mse": "1.0000",
        }
        rows = [
            ["student at the start", *(f"{start[name]:.4f}" for name in titles)],
            ["mean of the features", *(of_mean.get(name, "-") for name in titles)],
            [f"student, step {best['step']}", *(f"{best[name]:.4f}" for name in titles)],
        ]
        return table(rows, [f"held-out {self.unit}", *titles.values()])


@dataclass(frozen=True, kw_only=True)
class CardEntry:
    """A student in its slot, as the model card describes it."""

    called: str  # its published label and source, where it has them, next to its name
    origin: str = ""  # whose weights it started from; empty for random ones
    limits: tuple[str, ...] = ()


def began_with(slot: str, filled: dict) -> str:
    """Say whose weights a student began with, of those that are no one's in particular.

    `filled` is the slot's entry in the model's effsam3.json.
    """
    start, student = filled.get("student_init"), f"The student in the slot `{slot}`"
    if start == "random":
        return ""
    if start is None:
        return f"{student} comes from `{filled['from']}`, and the weights that it started from are not known."
    return f"{student} started from weights of `{Path(start).name}`, whose licence applies to it too."


def start_from_model(student: nn.Module, recipe: FeatureRecipe) -> bool:
    """Give a new student the weights of the model that `student_init` names; returns whether it names one.

    Raises:
        MergeError: there is no such model, or another student in it.
    """
    if not names_a_model(recipe.student_init):
        return False
    if isinstance(student, VisionStudent):
        start_vision_from(student, Path(recipe.student_init))
    else:
        start_from(student, recipe.stage, Path(recipe.student_init))
    return True


def untied_note(store: StoreReader | None) -> dict[str, str]:
    """A line for the header where a store cannot tell what its features were made of."""
    return {} if store is None or store.manifest.ties_inputs else {"note": untied(store.root)}


def open_store(recipe: FeatureRecipe, form: dict[str, Any], *keys: str) -> StoreReader:
    """Open the store of the features that the recipe asks for, see `open_features`."""
    return open_features(recipe.embed.to, recipe.stage, recipe.sam3, recipe.data, form, *keys)


def open_features(
    root: str,
    stage: str,
    teacher: Sam3,
    data: Data,
    form: dict[str, Any],
    *keys: str,
    key: str = "embed.to",
    section: str = "sam3",
) -> StoreReader:
    """Open a store of a teacher's features as a recipe of `stage` has embedded them.

    Its description must have the form `form`, and the values of these `keys` in `data`. `key` and `section` are those
    that name the store and the teacher.

    Raises:
        StoreError: it holds features of another stage or teacher, or made otherwise, or its manifest is damaged.
    """
    store = StoreReader(root)
    facts = store.manifest.description
    if (kind := facts.get("kind")) in stages.STAGES and kind != stage:
        raise StoreError(
            f"{key}: the store at {root} holds {kind} features, the recipe's stage is {stage}; name a store that "
            f"a recipe of stage {stage} has embedded"
        )
    if wrong := mismatch(facts, form | {"teacher": dict}):
        raise StoreError(f"{store.root}/manifest.json is damaged: its description, {wrong}; {RESTORE}")
    for name in keys:
        if (asked := getattr(data, name)) != facts[name]:
            raise StoreError(
                f"the store at {root} was made with {name}={facts[name]}, the recipe has data.{name}={asked}; change "
                f"data.{name}, or embed again to another {key}"
            )
    made_by, checkpoint, fingerprint = facts["teacher"], teacher.checkpoint, teacher.fingerprint
    known = made_by.get("fingerprint")  # upstream's stores have none
    if known is not None and (made_by["checkpoint"] != checkpoint or fingerprint not in (None, known)):
        raise StoreError(
            f"the store at {root} was made by {made_by['checkpoint']} (fingerprint {known}), the recipe has "
            f"{section}.checkpoint={checkpoint}{f' with fingerprint {fingerprint}' if fingerprint else ''}; change "
            f"{section}, or embed to another {key}"
        )
    return store
