#!/usr/bin/env bash
# torch.onnx.export writes x.repeat_interleave(n, 0) wrongly when n is a dynamic size (how often each image's embedding
# is needed for its n prompts). It works for one row, the usual trial, and for n = 1; with two rows and n = 2 half of the
# rows are missing without an error; with anything more onnxruntime refuses to run it.
#
# Versions:  torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, numpy 2.4.6
# Behaviour: the export ends without a warning about it, with both axes declared dynamic. The file repeats by a count
#            that is meant for one row only.
# A guess:   the file computes what the module does for every size of its dynamic axes, or the export refuses.
# Seen:      1 x 2: right   1 x 5: right   2 x 1: right   2 x 2: 2 rows, not 4   2 x 4: refused   3 x 2: refused
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6

"$folder/venv/bin/python" - "$folder/model.onnx" <<'PYTHON'
import sys

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument


class Repeat(torch.nn.Module):
    """Each of B images once for each of N prompts."""

    def forward(self, images_BC, prompts_NC):
        return images_BC.repeat_interleave(prompts_NC.shape[0], 0)


torch.onnx.export(
    Repeat(), (torch.randn(2, 3), torch.randn(4, 3)), sys.argv[1], dynamo=True, verbose=False,
    dynamic_shapes=({0: torch.export.Dim("b")}, {0: torch.export.Dim("n")}),
)
onnxruntime.set_default_logger_severity(4)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [one.name for one in session.get_inputs()]
seen = []
for images, prompts in ((1, 2), (1, 5), (2, 1), (2, 2), (2, 4), (3, 2)):
    inputs = [torch.randn(images, 3), torch.randn(prompts, 3)]
    wanted = Repeat()(*inputs).numpy()
    try:
        [found] = session.run(None, dict(zip(names, (one.numpy() for one in inputs))))
        says = "right" if np.array_equal(found, wanted) else f"{len(found)} rows, not {len(wanted)}"
    except InvalidArgument:
        says = "refused"
    seen.append(f"{images} x {prompts}: {says}")
print("   ".join(seen))
described = "1 x 2: right   1 x 5: right   2 x 1: right   2 x 2: 2 rows, not 4   2 x 4: refused   3 x 2: refused"
sys.exit("   ".join(seen) != described)
PYTHON
