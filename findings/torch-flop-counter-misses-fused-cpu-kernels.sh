#!/usr/bin/env bash
# torch.utils.flop_counter.FlopCounterMode counts what kernels it has formulas for. On a CPU, fused ones have none: one and
# the same layer has all, two thirds or none of its operations, by the device and by whether gradients are recorded.
#
# Versions:  torch 2.14.1, numpy 2.4.6
# Behaviour: nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True) in eval mode, 256 positions, no mask. Counted on
#            the device meta, on the CPU with gradients (attention is scaled_dot_product_attention's fused kernel), and
#            on the CPU under no_grad (the layer is one fused kernel). No warning is given.
# A guess:   the count belongs to the module and its input: 469,762,048 each time.
# Seen:      meta 469762048, CPU 402653184, CPU without gradients 0
#            scaled_dot_product_attention alone: meta 67108864, CPU 0; nn.LSTM on the CPU 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode


def counted(call, *inputs):
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


attention = torch.nn.functional.scaled_dot_product_attention
layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True).eval()
x, q = torch.randn(1, 256, 256), torch.randn(1, 4, 256, 64)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    recorded = counted(layer, x)
    with torch.no_grad():
        fused = counted(layer, x)
    alone = counted(attention, q, q, q)
    recurrent = counted(torch.nn.LSTM(32, 32), torch.randn(5, 1, 32))
    on_meta = counted(layer.to("meta"), x.to("meta")), counted(attention, *[q.to("meta")] * 3)
told = [str(one.message) for one in said if "flop" in str(one.message).lower()]
print(f"meta {on_meta[0]}, CPU {recorded}, CPU without gradients {fused}")
print(f"scaled_dot_product_attention alone: meta {on_meta[1]}, CPU {alone}; nn.LSTM on the CPU {recurrent}")
sys.exit((on_meta, recorded, fused, alone, recurrent, told) != ((469762048, 67108864), 402653184, 0, 0, 0, []))
PYTHON
