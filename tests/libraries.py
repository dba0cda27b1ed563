# SPDX-License-Identifier: Apache-2.0
"""The libraries of the tests' environment, without those that are extras of setup.py."""

import sysconfig
from pathlib import Path

EXTRAS = {  # extra: package
    "demo": "gradio",
    "deepspeed": "deepspeed",
    "lora": "peft",
    "onnx": "onnx",
    "openvino": "openvino",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
NOT_LINKED = (*EXTRAS.values(), "effsam3", "__editable__")


def link_libraries(folder: Path) -> Path:
    """Fill a folder with links to all other libraries; returns it. The rest is as absent as if never installed."""
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(NOT_LINKED) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder
