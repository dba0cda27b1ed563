# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image, teacher pass: SAM 3's vision features of every image, as a store keeps them.

Letters: B images, C channels, G grid rows and columns.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from effsam3.data.images.features import ImageFeatures, stored_features
from effsam3.data.images.sa1b import splits_in
from effsam3.data.store.format import INPUTS, Field, ties_inputs
from effsam3.data.store.reader import StoreReader, quantise_int8, to_float16
from effsam3.data.transforms import normalise, resized_size, valid_mask
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.models.image.teacher import check_features, parameter_count
from effsam3.stages.image.facts import ImageRecipe, record_fields
from effsam3.stages.image.training import image_dataset, make_teacher, ready_index


class TeacherPass:
    """What `embed` runs: the teacher over every image of the index, and what a record of the store is made of."""

    def __init__(self, recipe: ImageRecipe, accelerator: Accelerator):
        self.recipe, self.device = recipe, accelerator.device
        self.teacher = make_teacher(recipe, accelerator)
        self.channels = self.teacher.channels
        self.max_unreadable = recipe.data.max_unreadable
        self.less_room = "embed.dtype=int8 takes half, " if recipe.embed.dtype == "float16" else ""
        index = ready_index(recipe.data, accelerator)
        tied = ties_inputs(recipe.embed.to)
        self.datasets = [
            # Features may be wanted of photographs that are all in one split; training will ask for both.
            image_dataset(recipe.data, index, split, self.teacher.image_size, tied=tied)
            for split in splits_in(index)
        ]
        self.inputs = {INPUTS: "xxh3_64 of the image's bytes, at the end of its key"} if tied else {}
        self.accelerator = accelerator

    def fields(self) -> list[Field]:
        """Return the record's fields."""
        teacher = self.teacher
        return record_fields(self.recipe.embed, teacher.channels, teacher.grid, teacher.image_size)

    def description(self) -> dict:
        """Describe the features for the manifest: they belong to this teacher and this preprocessing only."""
        teacher = self.teacher
        return self.inputs | {
            "kind": "image",
            "tap": teacher.tap,
            "grid": teacher.grid,
            "channels": teacher.channels,
            "payload": self.recipe.embed.dtype,
            "image_size": teacher.image_size,
            "resize": self.recipe.data.resize,
            "normalisation": "x / 255, mean 0.5, std 0.5",
            "precision": self.recipe.train.precision,
            "teacher": {
                "checkpoint": self.recipe.sam3.checkpoint,
                "revision": self.recipe.sam3.revision,
                "fingerprint": teacher.fingerprint,
                "trunk_parameters": parameter_count(teacher.trunk),
            },
        }

    def describe(self) -> dict[str, str]:
        """Lines for the header of `embed`."""
        facts = self.description()
        images = sum(map(len, self.datasets))
        total = images * sum(field.nbytes for field in self.fields())
        return {
            "teacher": f"{facts['teacher']['checkpoint']} {facts['tap']}  {facts['teacher']['trunk_parameters']:,} "
            f"parameters, fingerprint {facts['teacher']['fingerprint'][:12]}",
            "features": f"{facts['channels']} x {facts['grid']} x {facts['grid']} {facts['payload']}, from "
            f"{facts['image_size']} px {facts['resize']}",
            "data": f"{self.recipe.data.index}  {images:,} images, about {total / 1e9:.2f} GB",
        }

    def features(self, batch: dict, check: bool = False) -> Tensor:
        """Run the teacher on a batch; `check` also asks the guard whether these can be SAM 3's features."""
        pixels = normalise(batch["pixels"].to(self.device))
        with frozen_autocast(self.accelerator.device, self.recipe.train.precision):
            feat_BCGG = self.teacher(pixels)
        readable = batch["sizes"][:, 0] > 0
        if check and readable.any():
            check_features(feat_BCGG[readable], pixels[readable])
        return feat_BCGG

    def record(self, batch: dict, place: int, feat_CGG: Tensor, key: str) -> dict:
        """Return what the store keeps of one image of a batch."""
        if self.recipe.embed.dtype == "float16":
            record = {"features": to_float16(feat_CGG, key)}
        else:
            record = dict(zip(("features", "scale"), quantise_int8(feat_CGG, key), strict=True))
        if self.recipe.embed.pixels:
            record |= {"pixels": batch["pixels"][place], "sizes": batch["sizes"][place].int()}
        return record

    def stored(self, reader: StoreReader, dataset: ImageFeatures, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Read features (B, C, G, G) and valid mask (B, 1, G, G) of some images back; their sizes are the index's."""
        rows = dataset.index.select(positions)
        sizes = [
            resized_size(height, width, dataset.image_size, dataset.resize)
            for height, width in zip(rows["height"], rows["width"], strict=True)
        ]
        features = stored_features(reader.read(reader.positions(dataset.record_keys(positions))))
        return features, valid_mask(torch.tensor(sizes), self.teacher.image_size, self.teacher.grid)
