# SPDX-License-Identifier: Apache-2.0
"""BatchNorm over several ranks: one batch for all of them, or each its own, and rank 0's averages in the end."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from effsam3.errors import UserError


def share_batchnorm(student: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let BatchNorm see the micro-batches of all ranks as one.

    Raises:
        UserError: the run is on CPUs, where torch has no such layer.
    """
    if accelerator.device.type == "cpu":
        raise UserError("train.sync_batchnorm: torch has it on GPUs only; set train.sync_batchnorm=false")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)


def share_buffers(accelerator: Accelerator, student: nn.Module, average: nn.Module | None) -> None:
    """Give every rank rank 0's buffers: BatchNorm's statistics are its own on each rank, and rank 0's are saved."""
    if accelerator.num_processes > 1:
        models = [accelerator.unwrap_model(student)] + ([average] if average is not None else [])
        for model in models:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
