# SPDX-License-Identifier: Apache-2.0
"""A model for other runtimes: its parts as functions of tensors, written as files, and the files checked."""

import os
import sys

# Before they are imported: onnxruntime tells Microsoft of each session, and OpenVINO Google of being imported, unless
# they are told not to. Nothing leaves this machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's way to say: not to be found
