# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: a student learns the features of SAM 3's text encoder, token by token.

Letters: B texts, L tokens, C channels of SAM 3's detector. Losses see token features as maps (B, C, 1, L).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from effsam3.data.captions.batches import CaptionBatches, Chosen, as_map, distinct, valid_tokens
from effsam3.data.captions.sources import Captions, open_captions
from effsam3.data.statistics import SAMPLE
from effsam3.data.store.format import INPUTS, StoreError
from effsam3.data.store.reader import StoreReader
from effsam3.data.synthetic.captions import make_synthetic_phrases, make_synthetic_recap
from effsam3.errors import UserError
from effsam3.files import stamp
from effsam3.hardware.accelerator import frozen_autocast, on_main, processes_here
from effsam3.models.chassis.claims import check_weights
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import read_config
from effsam3.models.merging.slots import model_folder
from effsam3.models.registry import text_student_row
from effsam3.models.text.padding import padding_of
from effsam3.models.text.student import StudentText, TextTeacher, text_student
from effsam3.models.text.tokens import Tokenizer, tokenizer_fingerprint
from effsam3.models.text.weights import WeightsReport, load_text_weights
from effsam3.recipe.rules import names_a_model
from effsam3.stages.base import FeatureStage, open_store
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.stages.text.facts import TextData, TextRecipe
from effsam3.training.report import Report

TOGETHER = 1 << 20  # texts that are looked up at a time: a hundred megabytes of keys


def ready_captions(recipe: TextRecipe, accelerator: Accelerator) -> Captions:
    """Open the recipe's captions, rank 0 first; for `data.source: synthetic` make them before, once.

    Raises:
        UserError: synthetic captions of another number are there already, or no text is usable.
    """
    data = recipe.data
    if data.source == "synthetic":
        on_main(accelerator, partial(_make_synthetic, data))
    with accelerator.main_process_first():
        return captions_of(data)


def captions_of(data: TextData, **other) -> Captions:
    """Open the captions and phrases of a recipe's data; `other` arguments of `open_captions` take their place."""
    asked = {"phrases": data.phrases, "phrase_column": data.phrase_column, "held_out": data.held_out} | other
    # One rank reads while the others wait, so it takes their share, too.
    workers = max(1, data.workers) * processes_here()
    return open_captions(
        data.captions, data.column, phrase_share=data.phrase_share, limit=data.limit, workers=workers, **asked
    )


def _make_synthetic(data: TextData) -> None:
    made = {"captions": data.synthetic_captions}
    for path in filter(None, (data.captions, *data.phrases)):
        make = make_synthetic_recap if path == data.captions else make_synthetic_phrases
        key = "data.captions" if path == data.captions else "data.phrases"
        stamp(Path(path).with_suffix(".synthetic.json"), made, "synthetic captions", key, real=Path(path))
        make(Path(path), data.synthetic_captions)


def make_teacher(recipe: TextRecipe, accelerator: Accelerator) -> TextTeacher:
    """Load the recipe's teacher onto the accelerator's device and let the guard look at its weights."""
    sam3 = recipe.sam3
    teacher = TextTeacher.from_folder(chassis_folder(sam3.checkpoint, sam3.revision))
    check_weights(teacher, sam3.checkpoint, sam3.fingerprint)
    if recipe.data.context_length > teacher.context_length:
        raise UserError(
            f"data.context_length is {recipe.data.context_length}, the teacher reads {teacher.context_length} tokens; "
            f"set it to {teacher.context_length} or less"
        )
    return teacher.to(accelerator.device)


def make_student(recipe: TextRecipe, channels: int) -> tuple[StudentText, WeightsReport | None]:
    """Build and initialise the recipe's student; return it and the report on its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # every rank builds the same student
        # Always SAM 3's own length: transformers' processors pad every prompt to it, however short the training texts.
        length = sam3_of(recipe.sam3.checkpoint).context_length
        student = text_student(recipe.student, length, channels, recipe.student_padding, recipe.student_norms)
    if recipe.student_init == "random" or names_a_model(recipe.student_init):
        return student, None
    own = text_student_row(recipe.student).weights
    return student, load_text_weights(
        student, str(own) if recipe.student_init == "mobileclip" else recipe.student_init
    )


def untrained(recipe: TextRecipe) -> StudentText:
    """Build the recipe's student by the published sizes of its SAM 3."""
    return make_student(recipe, sam3_of(recipe.sam3.checkpoint).sizes.fpn_hidden_size)[0]


NEEDS = ()  # nothing beyond what every training needs


def refuse_missing(captions: Captions, store: StoreReader) -> None:
    """Look every text up before the first step, because batches look up only their own.

    Raises:
        StoreError: the store has no features of some.
    """
    for texts in map(distinct, (captions.train, captions.val)):
        for start in range(0, len(texts), TOGETHER):
            store.positions(texts.keys(range(start, min(start + TOGETHER, len(texts)))))


def encoder(recipe: TextRecipe):
    """Texts to padded ids and mask, cut to the recipe's context length; goes into data worker processes."""
    return partial(Tokenizer().encode, context_length=recipe.data.context_length)


def inputs() -> str:
    """Return what ties a store's records to their texts: the key is the text's hash, the tokenizer makes ids of it."""
    return f"hash of the text, tokenizer {tokenizer_fingerprint()}"


class TextStage(FeatureStage):
    """A student text encoder, texts and their features."""

    unit = "texts"
    recipe: TextRecipe
    train_data: CaptionBatches
    val_data: CaptionBatches
    captions: Captions

    @classmethod
    def from_recipe(cls, recipe: TextRecipe, report: Report, accelerator: Accelerator) -> TextStage:
        teacher, store = None, None
        if recipe.teacher == "online":
            teacher = make_teacher(recipe, accelerator)
            made_by = {"checkpoint": recipe.sam3.checkpoint, "fingerprint": teacher.fingerprint}
            facts = {"kind": "text", "tap": "text", "channels": teacher.channels, "teacher": made_by}
        else:
            store = open_store(recipe, {"channels": int, "context_length": int}, "context_length")
            facts = store.manifest.description
            if facts.get(INPUTS, inputs()) != inputs():
                raise StoreError(
                    f"the store at {recipe.embed.to} was made with another tokenizer ({facts[INPUTS]}, here "
                    f"{inputs()}); embed again to another embed.to"
                )
        captions = ready_captions(recipe, accelerator)
        val = Chosen(captions.val, np.arange(min(len(captions.val), recipe.train.eval_samples)))
        train_data, val_data = (CaptionBatches(part, encoder(recipe), store) for part in (captions.train, val))
        if not len(train_data) or not len(val_data):
            raise UserError(
                f"{len(train_data)} training and {len(val_data)} held-out texts; both are needed (data.held_out)"
            )
        if store is not None:  # now: a text that is missing would end the training when its turn comes
            on_main(accelerator, partial(refuse_missing, captions, store))
        student, loaded = make_student(recipe, facts["channels"])
        stage = cls(recipe, accelerator, facts, student, teacher)
        stage.captions, stage.train_data, stage.val_data = captions, train_data, val_data
        stage.begin(store, report, accelerator)
        if loaded is not None:  # every tensor by name: loaded, initialised or dropped, and why
            report.write_json("student_init.json", asdict(loaded))
            stage.notes = {"weights": str(loaded).replace("\n", "; ")} | stage.notes
        return stage

    @classmethod
    def from_shapes(cls, recipe: TextRecipe, place: Place) -> TextStage:
        checkpoint = recipe.sam3.checkpoint
        facts = {"channels": sam3_of(checkpoint).sizes.fpn_hidden_size}
        teacher = TextTeacher(config_at_hand(checkpoint).detector_config) if recipe.teacher == "online" else None
        return cls(recipe, place, facts, untrained(replace(recipe, student_init="random")), teacher)

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of `samples` texts of full length. An online teacher runs on distinct texts only: here
        all are distinct."""
        length = self.recipe.data.context_length
        shape = (samples, length, self.facts["channels"])
        return {
            "ids": torch.arange(samples * length).reshape(samples, length) % 49_000,
            "mask": torch.ones(samples, length, dtype=torch.bool),
            "features": torch.empty(shape, dtype=torch.float16, device="meta"),
            "counts": torch.ones(samples, dtype=torch.bool),
        }

    def initialise_from_model(self) -> dict[str, str]:
        """As for every stage; also report when the model had another padding rule than the recipe."""
        found = super().initialise_from_model()
        if found:
            folder = model_folder(Path(self.recipe.student_init))
            assert folder is not None  # its weights were read from there
            config = read_config(folder)
            if (theirs := padding_of(config.detector_config)) != self.recipe.student_padding:
                found["weights"] += (
                    f"; it learned with padding {theirs}, this run's is {self.recipe.student_padding}, so short texts "
                    "begin with other features (student_padding)"
                )
        return found

    def statistics_batches(self) -> Iterator[Batch]:
        """Yield the sample that a store's statistics are made of, in batches."""
        size = self.recipe.embed.batch_size
        texts = CaptionBatches(distinct(self.captions.train), encoder(self.recipe))
        sample = texts.sample(SAMPLE)
        for start in range(0, len(sample), size):
            yield texts.__getitems__(sample[start : start + size])

    def valid(self, batch: Batch) -> Tensor:
        """1 where a token counts, (B, 1, 1, L) on the device."""
        return valid_tokens(batch).to(self.device)

    def describe(self) -> dict[str, str]:
        row = text_student_row(self.recipe.student)
        source = "next to the student" if self.teacher is not None else f"from {self.recipe.embed.to}"
        lines = {
            "student": f"{row.label} ({self.recipe.student})  {self.student_parameters / 1e6:.2f} M parameters, "
            f"padding {self.recipe.student_padding}",
            "teacher": f"{self.recipe.sam3.checkpoint} text encoder, {self.facts['channels']} channels a token, "
            f"{source}",
            "data": f"{self.captions.summary()}, up to {self.recipe.data.context_length} tokens",
        }
        return lines | self.notes

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches of steps `start` to `steps` - 1, texts of like length together."""
        return self.divide(start, steps, micro_batch, arrange=self.train_data.by_length)

    def samples(self, batch: Batch) -> list[str]:
        """Keys of a batch's texts."""
        # Only of these, every step: the dataset's own list has the keys of all texts, gigabytes of them.
        return self.train_data.part.keys(batch["positions"].tolist())

    def target(self, batch: Batch) -> Tensor:
        """The teacher's features (B, C, 1, L), float32: read from the store or made here, each different text once."""
        if self.teacher is None:
            return as_map(batch["features"].to(self.device).float())[..., : batch["ids"].shape[1]]
        rows = torch.cat([batch["ids"], batch["mask"].long()], 1).to(self.device)
        different, place_B = rows.unique(dim=0, return_inverse=True)
        ids, mask = different.chunk(2, dim=1)
        with frozen_autocast(self.device, self.recipe.train.precision):
            return as_map(self.teacher(ids, mask.bool())[place_B])

    def predict(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the student's features (B, C, 1, L)."""
        ids, mask = (batch[name].to(self.device, non_blocking=True) for name in ("ids", "mask"))
        with self.place.autocast():
            return as_map(student(ids, mask))

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        weights = self.recipe.loss
        target, pred = self.target(batch), self.predict(student, batch)
        valid = valid_tokens(batch, padding_too=not weights.padding_mask).to(self.device)
        terms = self.feature_loss(pred, target, valid, "mean", (self.mean_C, self.deviation_C))
        total = sum(getattr(weights, name) * value for name, value in terms.items())
        return {"loss": total, **terms}


STAGE: type[Stage] = TextStage  # what `train` builds
