# SPDX-License-Identifier: Apache-2.0
"""What the loop does with held-out data: the stage's numbers over all ranks, and pictures of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from effsam3.benchmarks.pictures.drawing import COLUMNS, contact_sheet, evenly, save_png
from effsam3.data.loader import loader
from effsam3.data.sampler import sequential_batches
from effsam3.data.synthetic.videos import VIDEO_FPS, mp4_bytes
from effsam3.files import write_bytes
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.recipe.common import StageRecipe
from effsam3.stages.protocol import Stage, TitledPicture
from effsam3.training.loggers import Loggers
from effsam3.training.meters import Unreadable

FRAMES_PER_S = 4  # of a clip in an mp4


def validate(
    recipe: StageRecipe,
    stage: Stage,
    accelerator: Accelerator,
    model: nn.Module,
    unreadable: Unreadable,
    loggers: Loggers,
    step: int,
) -> dict[str, float]:
    """Return the stage's numbers on the held-out samples, over all ranks; leaves the model in the mode it was in.

    Pictures of the first `train.pictures` of them go to the run's folder and to the loggers.
    """
    training, micro_batch, asked = model.training, recipe.train.micro_batch_size, recipe.train.pictures
    model.eval()
    sums: dict[str, Tensor] = {}
    drawn: list[list[TitledPicture]] = []
    batches = sequential_batches(
        len(stage.val_data), micro_batch, accelerator.process_index, accelerator.num_processes
    )
    # Around the averaged weights: what accelerate or DeepSpeed wraps has its own autocast.
    with frozen_autocast(accelerator.device, recipe.train.precision):
        for number, batch in enumerate(loader(stage.val_data, batches, recipe.data.workers, pin=False)):
            unreadable.note(batch, step)
            for name, value in stage.validate(model, batch).items():
                sums[name] = sums.get(name, 0) + value
            # On every rank, though rank 0's are kept: under ZeRO-3 a forward takes all of them.
            if number * micro_batch < asked:
                drawn += stage.pictures(model, batch)
    model.train(training)
    if drawn and accelerator.is_main_process:
        save_pictures(
            drawn[:asked], recipe.folder / "pictures" / "validation", step, recipe.train.pictures_as, loggers
        )
    return stage.summarise({name: accelerator.reduce(value) for name, value in sums.items()})


def save_pictures(
    drawn: Sequence[Sequence[TitledPicture]], folder: Path, step: int, form: str, loggers: Loggers
) -> None:
    """Write the pictures of a validation, a row or a place for each sample, and send the sheet to the loggers.

    Not next to the benchmark's pictures, which `push` uploads: these show data that may be nobody else's business.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheet = stacked([contact_sheet(evenly(list(clip), COLUMNS)) for clip in drawn])
    if form == "mp4":
        longest = max(len(clip) for clip in drawn)
        # A shorter clip waits at its end.
        moments = [contact_sheet([clip[min(time, len(clip) - 1)] for clip in drawn]) for time in range(longest)]
        frames = np.stack(
            [np.asarray(moment)[: moment.height // 2 * 2, : moment.width // 2 * 2] for moment in moments]
        )
        write_bytes(folder / f"step-{step:06d}.mp4", mp4_bytes(frames.repeat(VIDEO_FPS // FRAMES_PER_S, axis=0)))
    else:
        save_png(sheet, folder / f"step-{step:06d}.png")
    loggers.picture("val/pictures", np.asarray(sheet), step)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below one another."""
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), (255, 255, 255))
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole
