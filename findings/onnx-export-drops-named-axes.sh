#!/usr/bin/env bash
# torch.onnx.export takes dynamic_shapes with torch.export.Dim and, where the code makes such an axis a constant, writes
# the constant without a word. torch.export.export refuses the same module with the same dynamic_shapes.
#
# Versions:  torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, numpy 2.4.6
# Behaviour: a module takes its images apart with unbind(0), as torchvision's roi_align wants its boxes. Axis 0 was
#            declared Dim("images"), tried with 2. The file's input has 2 there; verbose output and warnings say nothing.
#            The other axis, Dim("boxes"), stays dynamic.
# A guess:   the export stops and names the axis, as torch.export.export does, from which it starts.
# Seen:      torch.export.export: refused, images was specialized
#            torch.onnx.export: no warning, axes [2, 4] and [2, 'boxes', 4]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6

"$folder/venv/bin/python" - "$folder/model.onnx" <<'PYTHON'
import sys
import warnings

import onnx
import torch


class ByImage(torch.nn.Module):
    """Something of every image and its boxes."""

    def forward(self, features_BC, boxes_BN4):
        pairs = zip(features_BC.unbind(0), boxes_BN4.unbind(0))
        return torch.stack([feature_C * boxes_N4.mean() for feature_C, boxes_N4 in pairs])


module, inputs = ByImage().eval(), (torch.rand(2, 4), torch.rand(2, 3, 4))
images, boxes = torch.export.Dim("images"), torch.export.Dim("boxes")
axes = ({0: images}, {0: images, 1: boxes})
try:
    torch.export.export(module, inputs, dynamic_shapes=axes)
    refused = "accepted"
except torch._dynamo.exc.UserError as error:
    refused = "refused, images was specialized" if "marked images as dynamic" in str(error) else str(error)
print("torch.export.export:", refused)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    torch.onnx.export(module, inputs, sys.argv[1], dynamo=True, dynamic_shapes=axes, verbose=False)
told = [str(one.message) for one in said if "images" in str(one.message) or "dynamic" in str(one.message)]
found = [[axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in onnx.load(sys.argv[1]).graph.input]
print("torch.onnx.export:", told or "no warning", "axes", *found)
sys.exit(not (refused.startswith("refused") and not told and found == [[2, 4], [2, "boxes", 4]]))
PYTHON
