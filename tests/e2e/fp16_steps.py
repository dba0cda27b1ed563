# SPDX-License-Identifier: Apache-2.0
"""Six steps in fp16 on the hardware that is named; the gradient of the second one overflows. Prints JSON on rank 0."""

import json
import sys

import torch
from torch import nn

from effsam3.hardware.accelerator import make_accelerator
from effsam3.training.loss_scale import LossScale
from effsam3.training.optim import adamw
from effsam3.training.optimizer_state import gather, whole

CLIP, MICROS, SAMPLES = 0.5, 2, 8


def main(hardware: str) -> None:
    accelerator = make_accelerator(hardware, "fp16", MICROS, 4, CLIP)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)).train()
    # One group decays and one does not: DeepSpeed takes a step for each.
    student, optimizer = accelerator.prepare(student, adamw(student, 1e-2, 0.01, (0.9, 0.999), 1e-8))
    scale = LossScale(accelerator, student, optimizer, "fp16")
    generator, found = torch.Generator().manual_seed(1), []
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for step in range(6):
        for micro in range(MICROS):
            own = torch.randn(SAMPLES, 8, generator=generator).chunk(ranks)[rank]
            with accelerator.accumulate(student):
                with accelerator.autocast():
                    pred = student(own)
                # Of the last rank only, whose part of the gradient is what the others must hear of.
                rotten = step == 1 and micro == 1 and rank == ranks - 1
                accelerator.backward(pred.float().square().mean() * (1000.0 if rotten else 1.0))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(student.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        skipped = scale.skipped_step()
        with whole(accelerator, student) as weights:
            size = sum(parameter.detach().double().abs().sum().item() for parameter in weights.parameters())
        found.append({"skipped": skipped, "norm": None if skipped else float(norm), "size": size})
    moments = gather(accelerator, student, optimizer)
    if accelerator.is_main_process:
        total = sum(moment.double().abs().sum().item() for moment in moments.values())
        print(json.dumps({"steps": found, "moments": total, **scale.state()}))
    accelerator.end_training()  # a process that ends with its group open may be aborted


if __name__ == "__main__":
    main(sys.argv[1])
