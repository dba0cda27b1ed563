#!/usr/bin/env bash
# DeepSpeed's ZeRO with "torch_autocast" in float16 clips gradients while they still carry the loss scale of 65536, and
# divides by the scale afterwards: with "gradient_clipping" the weights all but stand still. Nor does it lower the scale
# when a gradient overflows: while they do, each step is skipped.
#
# Versions:  deepspeed 0.19.8, torch 2.14.1
# Behaviour: a model of two Linears, six steps of SGD on one CPU process, the same batches for torch and DeepSpeed.
#            Without clipping ZeRO-2 goes as far as torch.autocast with GradScaler. With a limit of 1.0, which no
#            gradient reaches, torch goes as far as before; ZeRO-2 reports a norm 65536 times the right one, and goes
#            less than a thousandth as far. With a loss large enough to overflow at first, torch halves the scale three
#            times and goes on; ZeRO-2 leaves it at 65536 and skips all six. Stage 0, same config, does all as torch.
# A guess:   the same as torch's recipe, whatever the stage: unscale_, clip_grad_norm_, step, update.
# Seen:      no clipping torch   first norm 0.286781  moved 0.021350 scale 65536
#            no clipping ZeRO-0  first norm -         moved 0.021350 scale 65536
#            no clipping ZeRO-2  first norm 18794.5   moved 0.021350 scale 65536
#            limit 1.0   torch   first norm 0.286781  moved 0.021350 scale 65536
#            limit 1.0   ZeRO-0  first norm -         moved 0.021350 scale 65536
#            limit 1.0   ZeRO-2  first norm 18794.5   moved 0.000001 scale 65536
#            overflow    torch   first norm inf       moved 0.025632 scale 8192
#            overflow    ZeRO-0  first norm -         moved 0.025632 scale 8192
#            overflow    ZeRO-2  first norm inf       moved 0.000000 scale 65536
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6 setuptools==84.2.1
# It is built from source, and its setup.py imports torch.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 LOCAL_RANK=0
"$folder/venv/bin/python" - "$folder/store" 2> "$folder/log" <<'PYTHON' || { tail -n 20 "$folder/log"; exit 1; }
import copy
import sys

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import logger
from torch import nn

logger.setLevel("ERROR")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles a kernel for minutes
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
base, batches = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), torch.randn(6, 16, 8)


def loss_of(model, batch, factor):
    with torch.autocast("cpu", torch.float16):
        return model(batch).float().square().mean() * factor


def by_torch(limit, factor):
    model, norms = copy.deepcopy(base), []
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler("cpu")
    for batch in batches:
        scaler.scale(loss_of(model, batch, factor)).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, norms[0], scaler.get_scale()


def by_deepspeed(stage, limit, factor):
    config = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "gradient_clipping": limit,
    }
    model, norms = copy.deepcopy(base), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for batch in batches:
        engine.backward(loss_of(engine, batch, factor))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    scaler = engine.optimizer.torch_autocast_gradscaler if stage else engine.torch_autocast_z0_gradscaler
    return model, norms[0], scaler.get_scale()


def look(title, who, model, norm, scale):
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    moved = float(sum((new - old).detach().square().sum() for new, old in pairs)) ** 0.5
    shown = "-" if norm is None else f"{norm:.6g}"
    print(f"{title:12}{who:8}first norm {shown:10}moved {moved:.6f} scale {scale:.0f}")
    return moved, norm, scale


found = {}
for title, limit, factor in (("no clipping", 0.0, 1.0), ("limit 1.0", 1.0, 1.0), ("overflow", 1.0, 30.0)):
    found[title, "torch"] = look(title, "torch", *by_torch(limit, factor))
    for stage in (0, 2):
        found[title, stage] = look(title, f"ZeRO-{stage}", *by_deepspeed(stage, limit, factor))
torch.distributed.destroy_process_group()


def alike(title, stage):
    (moved, _, scale), (right, _, right_scale) = found[title, stage], found[title, "torch"]
    return abs(moved - right) < 1e-3 * right and scale == right_scale


(_, norm, _), (clipped, scaled_norm, _) = found["limit 1.0", "torch"], found["limit 1.0", 2]
sys.exit(
    not all(alike(title, 0) for title in ("no clipping", "limit 1.0", "overflow"))
    or not alike("no clipping", 2)
    or abs(scaled_norm / norm - 65536) > 655
    or clipped > 1e-3 * found["limit 1.0", "torch"][0]
    or found["overflow", "torch"][0] == 0
    or found["overflow", 2] != (0, float("inf"), 65536)
)
PYTHON
