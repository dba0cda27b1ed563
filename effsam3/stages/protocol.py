# SPDX-License-Identifier: Apache-2.0
"""What the training loop needs of a stage, what the budget needs to run one dry, and what `embed` needs of a teacher.

STAGE of every effsam3/stages/<stage>/training.py and TeacherPass of every embedding.py fit these; base.py has what
stages share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from effsam3.data.loader import Samples
from effsam3.data.store.format import Field
from effsam3.data.store.reader import StoreReader
from effsam3.recipe.common import FeatureRecipe
from effsam3.training.report import Report

Batch = dict[str, Any]  # a micro-batch by field: tensors and lists with one entry a sample
TitledPicture = tuple[str, Image.Image]


class Place(Protocol):
    """Where a stage computes: one rank of an accelerator, or a dry run."""

    device: torch.device
    process_index: int
    num_processes: int

    def autocast(self) -> AbstractContextManager:
        """Return the context of the student's forward."""


class Stage(Protocol):
    """A student, what it learns from, and its loss."""

    student_parameters: int  # numbers that learn, counted before ZeRO-3 divides them
    lr_scales: Mapping[str, float]  # beginning of a parameter's name -> multiple of the learning rate
    facts: dict[str, Any]  # what is learned, for provenance.json
    files: str  # what samples are read from, such as "images"
    max_unreadable: int  # files that may be unreadable before the run stops

    @property
    def student(self) -> nn.Module:
        """What learns: the loop optimises, averages and saves it."""

    @property
    def val_data(self) -> Samples:
        """The held-out samples."""

    @property
    def train_size(self) -> int:
        """Samples of the train split."""

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """What runs next to the student and does not learn."""

    # ---- two ways to build it, each by a recipe of the stage's own class

    @classmethod
    def from_recipe(cls, recipe: Any, report: Report, accelerator: Accelerator) -> Stage:
        """Build it with weights and data, on the accelerator's device. Collective.

        Raises:
            UserError: something that the recipe names is missing, damaged, or does not fit the rest.
        """

    @classmethod
    def from_shapes(cls, recipe: Any, place: Place) -> Stage:
        """Build the same modules without reading weights or data; under `torch.device("meta")` they take no memory.

        Raises:
            UserError: the sizes of the recipe's SAM 3 are not known.
        """

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of N samples at their largest, as `train_batches` would.

        Tensors without contents are on `meta`; the others decide what is run.
        """

    # ---- what the loop calls

    def compile(self, student: nn.Module) -> None:
        """Compile the student, which is not wrapped yet, and what else `train.compile` is about."""

    def describe(self) -> dict[str, str]:
        """Return lines for the run's header by title: what is learned, from what."""

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches of steps `start` (0 is the first) to `steps` - 1, in order."""

    def samples(self, batch: Batch) -> list[str]:
        """Name a micro-batch's samples, to report which ones caused trouble."""

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return a micro-batch's weighted `loss` and its named terms, scalars; `student` may be wrapped, as by DDP."""

    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums over a held-out batch, scalars, to be added over batches and ranks."""

    def pictures(self, student: nn.Module, batch: Batch) -> list[list[TitledPicture]]:
        """Draw a held-out batch: for each sample its frames in order, the truth next to the prediction.

        Called where the recipe `draws` and `train.pictures` asks for it; collective.
        """

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn the sums of `validate` into metrics `val/...`, the recipe's `metric` among them."""

    def saved(self, run: Path) -> None:
        """Write into the run's folder what goes next to its checkpoints; on rank 0, after each of them."""

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        """Return a table: the student's metrics at the start and at the best step (`best["step"]`)."""


class StoredSamples(Samples, Protocol):
    """A data set whose samples have a record each in a store."""

    def __len__(self) -> int: ...

    def names(self, positions: Sequence[int]) -> list[str]:
        """Return the names of samples, as `unreadable` of a batch has them."""

    def record_keys(self, positions: Sequence[int]) -> list[str]:
        """Return the keys of their records."""

    def sample(self, size: int) -> list[int]:
        """Return the positions of up to `size` samples, by a hash of their names: the same in any order."""


class TeacherPass(Protocol):
    """What `embed` runs: a teacher over all samples, and what a record of the store is made of."""

    datasets: Sequence[StoredSamples]  # the train split first
    channels: int  # of the features
    max_unreadable: int  # samples that may be left out
    less_room: str  # what would make the store smaller, for the error when a disk is too small

    def __init__(self, recipe: FeatureRecipe, accelerator: Accelerator):
        """Load the teacher and open the data. Collective."""

    def fields(self) -> list[Field]:
        """Return the fields of a record."""

    def description(self) -> dict[str, Any]:
        """Return the manifest's description of the features: another description is another store."""

    def describe(self) -> dict[str, str]:
        """Return lines for the header by title."""

    def features(self, batch: Batch, check: bool = False) -> Tensor:
        """Return the teacher's features of a batch; `check` refuses those that cannot be SAM 3's."""

    def record(self, batch: Batch, place: int, feat: Tensor, key: str) -> dict[str, Tensor]:
        """Return the record of one sample of a batch by field."""

    def stored(self, reader: StoreReader, dataset: StoredSamples, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Read some samples' features back, and where they are valid."""
