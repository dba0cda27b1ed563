# SPDX-License-Identifier: Apache-2.0
"""What happens when a loss is NaN or infinite: the run stops and names the samples, or all ranks skip them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from effsam3.errors import UserError
from effsam3.files import write_text
from effsam3.stages.protocol import Batch, Stage

FILE = "not_finite.json"  # of a run that stopped: the samples of the step
MOST_IN_A_ROW = 10  # consecutive micro-batches that may be skipped
SKIPPED = "skipped.jsonl"  # a line for every skipped micro-batch


class NotFinite:
    """Computes every micro-batch's loss, and remembers a step's samples until their losses are known to be finite.

    Args:
        skip: skip, on all ranks, a micro-batch whose loss is not finite on any of them; it counts as zero. That
            takes a look at each loss before its backward pass, which a GPU otherwise need not wait for.
        folder: the run's, for `FILE` and `SKIPPED`.
    """

    def __init__(self, stage: Stage, accelerator: Accelerator, folder: Path, skip: bool):
        self.stage, self.accelerator, self.folder, self.skip = stage, accelerator, folder, skip
        self.usable: Batch | None = None  # the last good micro-batch, replayed for a skipped one
        self.in_a_row = 0  # consecutive skips so far
        self.begin(0)

    def begin(self, step: int) -> None:
        """Begin a step (1 is the first)."""
        self.step = step
        self.samples: list[list[str]] = []
        self.losses: list[Tensor] = []

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the stage's loss and terms of a micro-batch; zeros with gradients for a skipped one."""
        # BatchNorm has already averaged the NaN in when the loss is known, so its buffers must be put back.
        buffers = [buffer.clone() for buffer in student.buffers()] if self.skip else []
        terms = self.stage.loss(student, batch)
        # Names now, because the batch is gone when the step's losses are looked at.
        self.samples.append(self.stage.samples(batch))
        self.losses.append(terms["loss"].detach())
        if not self.skip or not self.bad():
            self.usable, self.in_a_row = batch if self.skip else None, 0
            return terms
        named = self.name()
        self.in_a_row += 1
        if self.in_a_row > MOST_IN_A_ROW:
            self.stop(named, f"so were those of {MOST_IN_A_ROW} micro-batches before it: the weights may be to blame")
        usable = self.usable
        if usable is None:
            self.stop(named, "it is the first micro-batch since the start, and none before it can take its place")
        if self.accelerator.is_main_process:
            with open(self.folder / SKIPPED, "a") as file:
                file.write(json.dumps({"step": self.step, "micro_batch": len(self.losses) - 1, "ranks": named}) + "\n")
        self.losses[-1] = torch.zeros_like(self.losses[-1])
        del terms  # and its activations: there is no room for those of two
        # DDP and DeepSpeed want a backward pass for every forward: a batch that is known to be harmless, times zero.
        terms = {name: 0 * value for name, value in self.stage.loss(student, usable).items()}
        _restore(student, buffers)
        return terms

    def bad(self) -> bool:
        """Return whether the newest loss is not finite on any rank."""
        flag = (~torch.isfinite(self.losses[-1])).long()
        return self.accelerator.reduce(flag).item() > 0

    def count(self, grad_norm) -> Tensor:
        """Return how many of this step's losses and gradient norms are not finite on this rank, on its device.

        `grad_norm` is None where it does not count.
        """
        # On the device, to be summed with the other things that ranks agree on: no extra sync.
        flags = ~torch.isfinite(torch.stack(self.losses))
        if grad_norm is not None:  # DeepSpeed keeps it to itself at stage 0, and gives -1 where it is not finite
            norm = torch.as_tensor(grad_norm, device=flags.device, dtype=torch.float32).reshape(1)
            flags = torch.cat([flags, ~torch.isfinite(norm) | (norm < 0)])
        return flags.sum()

    def name(self) -> list[dict]:
        """Return the newest micro-batch of every rank, its loss and samples; collective."""
        return gather_object([self._named(self.losses[-1], self.samples[-1])])

    def _named(self, loss: Tensor, samples: list[str]) -> dict:
        return {"rank": self.accelerator.process_index, "loss": _number(loss), "samples": samples}

    def refuse(self, count: int) -> None:
        """Stop if `count`, over all ranks, is not 0; collective.

        Raises:
            UserError: it is not; `FILE` names the samples of the step.
        """
        if count:
            mine = [self._named(loss, samples) for loss, samples in zip(self.losses, self.samples, strict=True)]
            self.stop(gather_object(mine), "the weights on disk are those of the last checkpoint")

    def stop(self, named: list[dict], note: str) -> NoReturn:
        """Write down the micro-batches and end the run."""
        if self.accelerator.is_main_process:
            # Written before the run ends, because the samples are what the user needs next.
            text = json.dumps({"step": self.step, "micro_batches": named}, indent=1)
            write_text(self.folder / FILE, text)
        worst = next((one for one in named if not isinstance(one["loss"], float)), None)
        what = f"the loss is {worst['loss']} on rank {worst['rank']}" if worst else "the gradient is not finite"
        remedy = "take these samples out of the data" if self.skip else "skip them with train.not_finite=skip"
        raise UserError(
            f"{what} at step {self.step}; {note}. {self.folder / FILE} names the samples. Lower optim.lr, lengthen "
            f"the warm-up, set train.precision=fp32, or {remedy}"
        )


def _restore(student: nn.Module, buffers: list[Tensor]) -> None:
    """Undo what a forward pass has done to BatchNorm's averages.

    Through `.data`, because autograd guards them for a backward pass, which does not read them in training.
    """
    for buffer, before in zip(student.buffers(), buffers, strict=True):
        buffer.data.copy_(before)


def _number(loss: Tensor) -> float | str:
    """A loss for JSON, which knows no NaN."""
    value = float(loss)
    return value if math.isfinite(value) else str(value)
