#!/usr/bin/env bash
# Mask decoders with a prediction after every layer often share one head. LoRA by peft on such heads is not what merging
# makes of it: heads that share a weight get an adapter each, and merging adds all of them to the one weight; a head
# that is one module in several places is adapted in the first place only, until it is merged.
#
# Versions:  peft 0.21.2, torch 2.13.0, transformers 5.24.0
# Behaviour: three layers, each followed by a head; LoRA of rank 2 on the heads, with weights as after training. No
#            warning is given. Three heads with one Parameter have three adapters; `merge_and_unload` changes the output
#            of every layer by more than the adapter of the last layer did. With `nn.ModuleList([head] * 3)` there is one
#            adapter, which changes the output of the first layer only; merging changes the other two.
# A guess:   a shared head has one adapter that works everywhere; merging keeps the outputs up to rounding.
# Seen:      one weight: 3 adapters change the outputs by 3.994, 1.387, 0.877, merging by 5.751, 1.544, 1.504
#            one module: 1 adapters change the outputs by 3.994, 0.000, 0.000, merging by 0.000, 0.706, 0.398
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6

"$folder/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Decoder(nn.Module):
    """A prediction after every layer, by heads that share a weight, or by one head."""

    def __init__(self, one_module):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(3))
        for head in self.heads[1:]:
            head.weight = self.heads[0].weight
        if one_module:
            self.heads = nn.ModuleList([self.heads[0]] * 3)

    def forward(self, x):
        outputs = []
        for layer, head in zip(self.layers, self.heads):
            x = torch.relu(layer(x))
            outputs.append(head(x))
        return torch.stack(outputs)


@torch.no_grad()
def changes(one_module):
    """Return the number of adapters, and how far they and then merging move the output of each layer."""
    torch.manual_seed(0)
    base, x = Decoder(one_module), torch.randn(4, 16)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=r"heads\.\d"))
    torch.manual_seed(1)
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    for matrix in matrices:
        nn.init.normal_(matrix)
    adapted = model(x)
    merged = model.merge_and_unload()(x)
    return len(matrices), *((one - two).abs().amax((1, 2)) for one, two in ((adapted, base(x)), (merged, adapted)))


def shown(values):
    return ", ".join(f"{value:.3f}" for value in values.tolist())


found = {"one weight": changes(False), "one module": changes(True)}
for name, (adapters, adapted, merged) in found.items():
    print(f"{name}: {adapters} adapters change the outputs by {shown(adapted)}, merging by {shown(merged)}")
weight, module = found.values()
same = weight[0] == 3 and bool((weight[2] > weight[1][-1]).all())
same &= module[0] == 1 and module[2][0] < 1e-5 and bool((module[1][1:] == 0).all() and (module[2][1:] > 0.1).all())
sys.exit(not same)
PYTHON
