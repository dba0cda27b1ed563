# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text, teacher pass: SAM 3's token features of every text, as a store keeps them.

Letters: B texts, L tokens, C channels of SAM 3's detector.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from effsam3.data.captions.batches import CaptionBatches, as_map, distinct
from effsam3.data.store.format import INPUTS, Field, ties_inputs
from effsam3.data.store.reader import StoreReader, to_float16
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.models.image.teacher import parameter_count
from effsam3.models.text.student import check_tokens
from effsam3.models.text.tokens import PAD_ID
from effsam3.stages.text.facts import TextRecipe, record_fields
from effsam3.stages.text.training import encoder, inputs, make_teacher, ready_captions


class TeacherPass:
    """What `embed` runs: the teacher over every distinct text, and what a record of the store is made of."""

    def __init__(self, recipe: TextRecipe, accelerator: Accelerator):
        self.recipe, self.accelerator = recipe, accelerator
        self.teacher = make_teacher(recipe, accelerator)
        self.channels = self.teacher.channels
        self.max_unreadable = 0  # captions are checked when they are opened
        self.less_room = ""
        captions = ready_captions(recipe, accelerator)
        self.datasets = [
            CaptionBatches(distinct(part), encoder(recipe)) for part in (captions.train, captions.val) if len(part)
        ]

    def fields(self) -> list[Field]:
        """Return the record's fields."""
        return record_fields(self.recipe.data.context_length, self.channels)

    def description(self) -> dict:
        """Describe the features for the manifest: they belong to this teacher and this tokenizer only."""
        tied = {INPUTS: inputs()} if ties_inputs(self.recipe.embed.to) else {}
        return tied | {
            "kind": "text",
            "tap": "text",
            "channels": self.channels,
            "context_length": self.recipe.data.context_length,
            "payload": "float16",
            "padding": f"id {PAD_ID}, masked",
            "precision": self.recipe.train.precision,
            "teacher": {
                "checkpoint": self.recipe.sam3.checkpoint,
                "revision": self.recipe.sam3.revision,
                "fingerprint": self.teacher.fingerprint,
                "parameters": parameter_count(self.teacher),
            },
        }

    def describe(self) -> dict[str, str]:
        """Lines for the header of `embed`."""
        facts = self.description()
        return {
            "teacher": f"{facts['teacher']['checkpoint']} text encoder  {facts['teacher']['parameters']:,} "
            f"parameters, fingerprint {facts['teacher']['fingerprint'][:12]}",
            "features": f"{facts['context_length']} tokens x {facts['channels']} float16",
            "data": f"{sum(map(len, self.datasets)):,} different texts",
        }

    def features(self, batch: dict, check: bool = False) -> Tensor:
        """Run the teacher on a batch: (B, C, 1, L). `check` asks the guard whether these can be SAM 3's features."""
        ids, mask = (batch[name].to(self.accelerator.device) for name in ("ids", "mask"))
        with frozen_autocast(self.accelerator.device, self.recipe.train.precision):
            tokens_BLC = self.teacher(ids, mask)
        if check:
            check_tokens(tokens_BLC, mask)
        return as_map(tokens_BLC)

    def record(self, batch: dict, place: int, feat_C1L: Tensor, key: str) -> dict:
        """Return what the store keeps of one text."""
        length = int(batch["mask"][place].sum())
        features_LC = torch.zeros(self.recipe.data.context_length, self.channels)
        features_LC[:length] = feat_C1L[:, 0, :length].T
        return {"features": to_float16(features_LC, key), "length": torch.tensor([length], dtype=torch.int32)}

    def stored(self, reader: StoreReader, dataset: CaptionBatches, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Read features (B, C, 1, L) and valid mask (B, 1, 1, L) of some texts back."""
        record = reader.read(reader.positions(dataset.record_keys(positions)))
        features_BLC = record["features"].float()
        valid_BL = torch.arange(features_BLC.shape[1]) < record["length"]
        return as_map(features_BLC), valid_BL.float()[:, None, None]
