# SPDX-License-Identifier: Apache-2.0
"""The benchmark of `benchmark.py` that is about short texts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effsam3.models.text.student import text_student

Sides = dict[str, Callable[[], object]]
TOKENS = 5  # of a phrase, its two marks among them


def text_step(device: torch.device, tiny: bool) -> Sides:
    """Forward and backward of MobileCLIP-S0 on phrases: by kept statistics, and by those of padded micro-batches."""
    name, texts = ("tiny_text", 2) if tiny else ("mobileclip_s0", 64)
    ids_BL = torch.randint(1000, (texts, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    mask_BL = torch.ones_like(ids_BL)

    def step(norms: str) -> Callable[[], None]:
        student = text_student(name, 32, 256, norms=norms).to(device).train()

        def run() -> None:
            student(ids_BL, mask_BL).square().mean().backward()
            student.zero_grad()

        return run

    return {"five of 32 positions": step("kept"), "padded to 32": step("batch")}
