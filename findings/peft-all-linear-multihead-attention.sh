#!/usr/bin/env bash
# peft's "all-linear" wraps the out_proj of torch's nn.MultiheadAttention, whose forward reads that layer's weight and
# never calls the layer. The adapter counts as trainable, gets no gradient and has no effect until it is merged.
# CLIP towers and DETR decoders written on nn.MultiheadAttention are concerned.
#
# Versions:  peft 0.21.2, torch 2.13.0, transformers 5.24.0
# Behaviour: an attention and a Linear, LoRA of rank 4. With "all-linear" the Linear's adapter gets a gradient and
#            out_proj's gets none; in_proj, three quarters of the attention's weights, has no adapter at all. Give the
#            adapter of out_proj weights, as loading one does: the output stays exactly the base model's, and
#            merge_and_unload then changes it. With target_modules=["attn"], the module's own name, in_proj and
#            out_proj are adapted, and merging changes nothing.
# A guess:   "all-linear" adapts the attention's projections, or leaves the module alone; merging keeps the output.
# Seen:      all-linear gradients: attn.out_proj none, fc yes
#            out_proj alone: adapter changes the output by 0.000, merging by 0.125
#            attn: adapter changes the output by 0.516, merging by 0.000
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


torch.manual_seed(0)
base, x = Block(), torch.randn(2, 5, 32)


def adapted(targets):
    """The base with adapters whose second matrix is not zero, as after training."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


model = adapted("all-linear")
model(x).square().mean().backward()
gradients = {
    name.split("base_model.model.")[1].split(".lora")[0]: "none" if parameter.grad is None else "yes"
    for name, parameter in model.named_parameters()
    if parameter.requires_grad
}
print("all-linear gradients:", ", ".join(f"{name} {found}" for name, found in gradients.items()))


@torch.no_grad()
def changes(targets):
    model = adapted(targets).eval()
    with_adapter = model(x)
    merged = model.merge_and_unload()(x)
    return float((with_adapter - base.eval()(x)).abs().max()), float((merged - with_adapter).abs().max())


effect, merging = changes(["out_proj"])
print(f"out_proj alone: adapter changes the output by {effect:.3f}, merging by {merging:.3f}")
right_effect, right_merging = changes(["attn"])
print(f"attn: adapter changes the output by {right_effect:.3f}, merging by {right_merging:.3f}")
sys.exit(
    gradients != {"attn.out_proj": "none", "fc": "yes"}
    or effect != 0
    or merging < 0.01
    or right_effect < 0.01
    or right_merging > 1e-5
)
PYTHON
